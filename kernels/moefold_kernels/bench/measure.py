"""The timing core: for a case and a contender, what is checked, what is timed, and what is recorded beside it."""

from __future__ import annotations

import functools
import statistics
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from moefold_kernels.bench import ceilings, correctness, routing, timing
from moefold_kernels.bench.cases import Case, Shape
from moefold_kernels.bench.ceilings import Ceilings
from moefold_kernels.bench.contenders import Contender, Forward
from moefold_kernels.bench.correctness import Expected
from moefold_kernels.bench.routing import Batch
from moefold_kernels.bench.weights import random_experts
from moefold_kernels.errors import BenchmarkError, WrongResultError
from moefold_kernels.reference import PackedExperts

BATCHES = 8
"""Differently routed batches that one round goes through, at least."""
TOKENS = 64
"""Of all of them together, at least. How many of a token's choices share a pair is luck, which decides what is read: a
token of DeepSeek-MoE-16B reads 5.76 pairs, 0.16 more or fewer in the mean of 8 tokens and 0.06 in that of 64.
"""

ROUNDS = 30
"""Rounds of which the median counts."""


FORMATS, FORWARDS = 5, 8
"""Words of so many formats are kept, and what so many contenders make of them."""


@dataclass(frozen=True)
class Prepared:
    """Checked, warm and ready to be timed: a round, and what to record beside its times."""

    name: str
    group: str
    rounds: timing.Rounds
    info: dict[str, Any]


@dataclass(frozen=True)
class _Work:
    """One case's inputs: the batches to be timed, one more that is only checked, and what they must give."""

    batches: list[Batch]
    expected: list[Expected]
    fresh: Batch
    fresh_expected: Expected


class Bench:
    """Prepares cases on one device; it keeps the weights of one shape and the batches of one case."""

    def __init__(self, device: torch.device, batches: int | None = None) -> None:
        """Of so many batches a case, or (None) of BATCHES and TOKENS."""
        if batches is not None and batches < 1:
            raise BenchmarkError(f"{batches} batches: write at least 1")
        self.device = device
        self.batches = batches
        self._experts = functools.lru_cache(maxsize=FORMATS)(self._make_experts)
        self._work = functools.lru_cache(maxsize=FORMATS)(self._make_work)
        self._forward = functools.lru_cache(maxsize=FORWARDS)(self._make_forward)

    @functools.cached_property
    def ceilings(self) -> Ceilings:
        """What the device can reach."""
        return ceilings.measure(self.device)

    @torch.no_grad()
    def prepare(self, case: Case, contender: Contender) -> Prepared:
        """Check the contender on this case and get it ready.

        Raises BenchmarkError when it cannot run on the device, WrongResultError when it does not compute the layer.
        """
        able, reason = contender.can(self.device)
        if not able:
            raise BenchmarkError(f"{contender.name} cannot run on {self.device}: {reason}")
        _ = self.ceilings  # before anything is timed, as a GPU has to rest behind them
        work = self._work(case, contender.format)
        call = self._forward(case.shape, contender)
        name = f"{case.name}-{contender.name}"
        try:
            error = self._check(call, work)
            rounds = timing.rounds(self.device, call, work.batches)
            error = max(error, self._check_rounds(rounds, work))
        except WrongResultError as wrong:
            raise WrongResultError(f"{name}: the output {wrong}") from None
        return Prepared(name, case.name, rounds, self._info(case, contender, work, error))

    @torch.no_grad()
    def check(self, case: Case, contender: Contender) -> float:
        """The contender's error on one batch of this case, which is not timed; WrongResultError as `prepare` does."""
        batch = routing.draw(case, self._generator(case, "check"))
        expected = Expected(self._experts(case.shape, contender.format), batch, self._generator(case, "sample"))
        call = self._forward(case.shape, contender)
        try:
            with correctness.poisoned():
                return expected.error(call(batch))
        except WrongResultError as wrong:
            raise WrongResultError(f"{case.name}-{contender.name}: the output {wrong}") from None

    def _check(self, call: Forward, work: _Work) -> float:
        """On a batch of its own, with every fresh tensor poisoned."""
        with correctness.poisoned():
            out = call(work.fresh)
        return work.fresh_expected.error(out)

    def _check_rounds(self, rounds: timing.Rounds, work: _Work) -> float:
        """What is timed is what is checked: poison what a captured graph writes to, run a round, compare."""
        for out in rounds.outputs:
            out.fill_(torch.nan)
        rounds()
        return max(one.error(out) for one, out in zip(work.expected, rounds.outputs, strict=True))

    def _info(self, case: Case, contender: Contender, work: _Work, error: float) -> dict[str, Any]:
        experts = statistics.mean(map(routing.experts_hit, work.batches))
        pairs = statistics.mean(
            routing.pairs_hit(b, self._experts(case.shape, contender.format).pairs) for b in work.batches
        )
        unit = case.shape.pair_bytes(contender.format) if contender.reads == "pairs" else case.shape.unit_bytes
        read = unit * (pairs if contender.reads == "pairs" else experts)
        return {
            "case": case.name,
            "contender": contender.name,
            "shape": case.shape.name,
            "tokens": case.tokens,
            "routing": case.routing,
            "batches": len(work.batches),
            "experts_hit": experts,
            "pairs_hit": pairs,
            "bytes": read,  # of weights; tokens are small beside them
            "flops": case.flops,
            "read_bandwidth": self.ceilings.read_bandwidth,
            "matmul_rate": self.ceilings.matmul_rate,
            "amax_bandwidth": self.ceilings.amax_bandwidth,
            "floor": self.ceilings.floor(read, case.flops),
            "bound": self.ceilings.bound(read, case.flops),
            "error": error,
        }

    def _generator(self, *of: object) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(zlib.crc32(repr(of).encode()))

    def _make_experts(self, shape: Shape, format: str) -> PackedExperts:
        return random_experts(shape, self._generator(shape), format)

    def _make_work(self, case: Case, format: str) -> _Work:
        experts = self._experts(case.shape, format)
        sampling = self._generator(case, "sample")
        count = self.batches or max(BATCHES, -(-TOKENS // case.tokens))
        *batches, fresh = (routing.draw(case, self._generator(case, n)) for n in range(count + 1))
        expected = [Expected(experts, batch, sampling) for batch in (*batches, fresh)]
        return _Work(batches, expected[:-1], fresh, expected[-1])

    def _make_forward(self, shape: Shape, contender: Contender) -> Forward:
        return contender.prepare(self._experts(shape, contender.format))
