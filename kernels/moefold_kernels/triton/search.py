"""The search for one number of tokens: every candidate timed alone, the best few together, the winner checked."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moefold_kernels import layout
from moefold_kernels.bench import routing, timing
from moefold_kernels.bench.cases import Case, Shape
from moefold_kernels.bench.correctness import Expected, poisoned
from moefold_kernels.bench.routing import Batch
from moefold_kernels.errors import BenchmarkError, WrongResultError
from moefold_kernels.reference import PackedExperts
from moefold_kernels.triton import by_entry_launch, configs, e4m3_launch, layer, leveled_launch
from moefold_kernels.triton.candidates import Room, by_entry, candidates, streamed
from moefold_kernels.triton.compilation import Compiler, Job, Part, reason
from moefold_kernels.triton.plans import STREAMED, Plan, Tile, alone, join
from moefold_kernels.triton.portability import Target
from moefold_kernels.triton.routing import Tables, by_work
from moefold_kernels.triton.weights import Weights

FINALISTS = 3
"""Of each projection, timed together."""
JOINED = 6
"""Of the first projection, timed with both projections in one launch."""
AHEAD, AHEAD_BY_ENTRY = (1, 8), (1, 2, 4)
"""Values of Tile.ahead that the best plan is tried with, beside its own; by entry of down alone."""
ROUNDS, DUEL_ROUNDS = 5, 15
"""Rounds of which the median counts: of a candidate; of the winner and the plan before, in turns."""


class Work(NamedTuple):
    """A batch, and its tables for one plan (a whole layer makes its own)."""

    batch: Batch
    tables: Tables
    """For a whole layer by entry, which has none, those of a rule."""


class Timer(Protocol):
    """Makes what a candidate is timed with."""

    def __call__(
        self, plan: Plan, part: Part, call: Callable[[Work], Tensor], inputs: Sequence[Work], /
    ) -> timing.Rounds: ...


@dataclass(frozen=True)
class Ground:
    """What all searches of one shape share."""

    shape: Shape
    device: torch.device
    dense: bool
    experts: PackedExperts
    weights: Weights
    compiler: Compiler
    timer: Timer
    progress: Callable[[str, int, int], None]
    deadline: float


@dataclass(frozen=True)
class Found:
    """The plan for one number of tokens; times are seconds of a whole layer."""

    shape: configs.Shape
    plan: Plan
    seconds: float
    before: Plan
    seconds_before: float | None
    """None when the plan before cannot be run here, or is wrong."""
    error: float
    read: float
    """Bytes of weights that a batch needs, on average."""
    tried: int
    late: int
    """Tiles that time was too short for."""
    rejected: dict[str, str]
    """What was never chosen, and why: it cannot be run, or gives a wrong result."""


class Search:
    """One number of tokens on some ground."""

    def __init__(self, ground: Ground, tokens: int) -> None:
        shape = ground.shape
        self.ground, self.tokens = ground, tokens
        format = layout.EXPONENT if ground.dense else ground.weights.format
        sizes = shape.hidden, shape.inner, shape.experts, shape.top_k
        self.shape = configs.Shape(*sizes, ground.dense, tokens, format)
        self.before = configs.choose(self.shape, ground.device)
        self.case = Case(shape, tokens)
        self.batches = [routing.draw(self.case, self._generator(n)) for n in range(_batches(tokens))]
        self.rejected: dict[str, str] = {}
        self.tried = self.late = 0
        self._tables: dict[object, list[Work]] = {}

    @torch.no_grad()
    def run(self) -> Found | None:
        """The best plan, or nothing when there was no time to find one; WrongResultError when no plan is right."""
        sides = candidates(self.shape, Room.of(self.ground.weights.places), self.before)
        firsts, seconds = self._best("first", sides[0]), self._best("second", sides[1])
        if self.late and not (set(firsts) - {self.before.first} and set(seconds) - {self.before.second}):
            return None
        plans = [
            Plan(first, second)
            for terms in (0, 2)
            for first, second in itertools.product(_best_of(firsts, terms), _best_of(seconds, terms))
        ]
        plans += self._joined(firsts)
        one_stream = streamed(self.shape, Room.of(self.ground.weights.places))
        plans += [plan for plan in one_stream if layer.joins(self.ground.weights, layer.SILU, plan.first)]
        able, weights = by_entry_launch.takes, self.ground.weights
        plans += [plan for plan in by_entry(self.shape) if able(weights, plan, self.tokens, self.shape.top_k)]
        times = self._times(list(dict.fromkeys([*plans, self.before])), "whole")
        if times:
            fastest = min(times, key=lambda plan: times[plan])
            times |= self._times([plan for plan in self._ahead(fastest) if plan not in times], "whole")
        ranked = sorted(times, key=lambda plan: times[plan])
        errors = self._right(ranked)
        plan, seconds_ours, seconds_before = self._duel(next(iter(errors)), self.before in errors)
        shape = self.ground.shape
        read = self._units() * (shape.unit_bytes if self.ground.dense else shape.pair_bytes(self.shape.format))
        return Found(
            self.shape, plan, seconds_ours, self.before, seconds_before, errors[plan], read,
            self.tried, self.late, self.rejected,
        )  # fmt: skip

    def _best(self, part: Part, tiles: Sequence[Tile]) -> list[Tile]:
        """The tiles of one projection, timed alone, the fastest first."""
        plans = [alone(tile, part == "second") for tile in tiles]
        times = self._times(plans, part)
        self.tried += len(times)
        self.late += len(tiles) - len(times) - sum(_name(plan, part) in self.rejected for plan in plans)
        return [_tile(plan, part) for plan in sorted(times, key=lambda plan: times[plan])]

    def _joined(self, tiles: Sequence[Tile]) -> list[Plan]:
        """The first few that one launch can do both projections with."""
        able = (tile for tile in tiles if not tile.overlapped and layer.joins(self.ground.weights, layer.SILU, tile))
        return [join(tile) for tile in itertools.islice(able, JOINED)]

    def _times(self, plans: Sequence[Plan], part: Part) -> dict[Plan, float]:
        """Seconds of each plan's part; those that cannot be run are named, and time ends only what is not whole."""
        ground, what = self.ground, f"{self.tokens} tokens, {_WHAT[part]}"
        deadline = float("inf") if part == "whole" else ground.deadline
        jobs = [
            Job(ground.shape, ground.dense, self.tokens, plan, part, str(ground.device), self.shape.format)
            for plan in plans
        ]
        compiled, refused = ground.compiler.compile(
            jobs, deadline, lambda done, of: ground.progress(f"{what}: compiling", done, of)
        )
        self.rejected |= {_name(job.plan, part): why for job, why in refused.items()}
        times: dict[Plan, float] = {}
        for done, job in enumerate(compiled, start=1):
            if time.monotonic() >= deadline:
                break
            seconds = self._median(job.plan, part)
            if seconds is not None:
                times[job.plan] = seconds
            ground.progress(f"{what}: timing", done, len(compiled))
        return times

    def _median(self, plan: Plan, part: Part) -> float | None:
        rounds = self._rounds(plan, part)  # its graph and what that writes are freed before the next one's are made
        return None if rounds is None else statistics.median(rounds() for _ in range(ROUNDS))

    def _rounds(self, plan: Plan, part: Part) -> timing.Rounds | None:
        """The part ready to be timed; nothing (its name and why are kept) when it cannot be run."""
        try:
            return self.ground.timer(plan, part, self._call(plan, part), self._work(plan))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a launch raises condemns one plan
            self.rejected[_name(plan, part)] = reason(error)
            self._survive(plan, error)
            return None

    def _survive(self, plan: Plan, error: Exception) -> None:
        """After an illegal access nothing runs in this process any more: say so now, not of every other plan."""
        if self.ground.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.ground.device)
        except RuntimeError:
            raise BenchmarkError(f"{plan} broke the device for this process ({reason(error)}); report it") from error

    def _call(self, plan: Plan, part: Part) -> Callable[[Work], Tensor]:
        weights, top_k = self.ground.weights, self.ground.shape.top_k
        if part == "first":
            return lambda one: layer.gate_up(weights, one.batch.hidden, top_k, one.tables, plan).values
        if part == "whole":
            return lambda one: layer.forward(
                weights, one.batch.hidden, one.batch.top_k_index, one.batch.top_k_weights, plan=plan
            )
        x = self._activations
        held = layer.Inner(x, e4m3_launch.between(x, plan), leveled_launch.takes(weights, plan))
        return lambda one: layer.down(
            weights, held, one.batch.top_k_index, one.batch.top_k_weights, one.tables, plan, torch.bfloat16
        )

    @cached_property
    def _activations(self) -> Tensor:
        size = self.tokens * self.ground.shape.top_k, self.ground.shape.inner
        return torch.randn(size, generator=self._generator(-1), device=self.ground.device).bfloat16()

    def _work(self, plan: Plan) -> list[Work]:
        """The batches with their tables, which depend on few things of a plan."""
        key = plan.by_entry, *((tile.entries, tile.group) for tile in (plan.first, plan.second)), by_work(plan)
        if key not in self._tables:
            self._tables[key] = [self._one(batch, plan) for batch in self.batches]
        return self._tables[key]

    def _one(self, batch: Batch, plan: Plan) -> Work:
        sorting = configs.rule(self.shape) if plan.by_entry else plan
        return Work(batch, layer.route_for(self.ground.weights, batch.top_k_index, sorting))

    def _ahead(self, plan: Plan) -> list[Plan]:
        """The plan with other numbers of cache lines asked for ahead, in one projection at a time."""
        target = Target.of(self.ground.weights.places)
        few = self.shape.format != layout.EXPONENT and (plan.by_entry or target.overlap)
        if plan.first.mode == STREAMED or not target.chain or few:  # in few bits only project.py asks for some
            return []
        if plan.by_entry:
            return [replace(plan, second=replace(plan.second, ahead=ahead)) for ahead in AHEAD_BY_ENTRY]
        if plan.joined:
            return [join(replace(plan.first, ahead=ahead)) for ahead in AHEAD]
        firsts = [replace(plan, first=replace(plan.first, ahead=ahead)) for ahead in AHEAD]
        return firsts + [replace(plan, second=replace(plan.second, ahead=ahead)) for ahead in AHEAD]

    def _right(self, ranked: Sequence[Plan]) -> dict[Plan, float]:
        """The errors of the first plan that is right, and of the one before if it is."""
        errors: dict[Plan, float] = {}
        for plan in (*ranked, *([self.before] if self.before in ranked else [])):
            if (errors and plan != self.before) or plan in errors or str(plan) in self.rejected:
                continue
            try:
                errors[plan] = self._error(plan)
            except WrongResultError as wrong:
                self.rejected[str(plan)] = f"the output {wrong}"
        if not errors:
            last = "; ".join(f"{name}: {why}" for name, why in list(self.rejected.items())[-3:])
            raise WrongResultError(f"{self.ground.shape.name}, {self.tokens} tokens: no plan is right ({last})")
        return errors

    def _error(self, plan: Plan) -> float:
        """The error on fresh batches, balanced and skewed, with every fresh tensor poisoned."""
        errors = []
        for number, kind in enumerate(("balanced", "skewed"), start=1):
            batch = routing.draw(replace(self.case, routing=kind), self._generator(1000 + number))
            expected = Expected(self.ground.experts, batch, self._generator(2000 + number))
            with poisoned():
                out = self._call(plan, "whole")(self._one(batch, plan))
            errors.append(expected.error(out))
        return max(errors)

    def _duel(self, plan: Plan, against: bool) -> tuple[Plan, float, float | None]:
        """The faster of a plan and the one before, timed in turns; its seconds, and those of the one before."""
        ours = self._rounds(plan, "whole")
        theirs = self._rounds(self.before, "whole") if against and plan != self.before else None
        if ours is None:
            raise BenchmarkError(f"{plan} was timed, and then not: {self.rejected[str(plan)]}")
        turns = [(ours(), theirs() if theirs else None) for _ in range(DUEL_ROUNDS)]
        mine = statistics.median(one for one, _ in turns)
        if theirs is None:
            return plan, mine, mine if plan == self.before else None
        other = statistics.median(one for _, one in turns if one is not None)
        return (self.before, other, other) if other <= mine else (plan, mine, other)

    def _units(self) -> float:
        """Pairs or experts that a batch hits, on average."""
        if self.ground.dense:
            return statistics.mean(map(routing.experts_hit, self.batches))
        return statistics.mean(routing.pairs_hit(batch, self.ground.experts.pairs) for batch in self.batches)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator(self.ground.device).manual_seed(10_000 * self.tokens + number + 10)


_WHAT: dict[Part, str] = {"first": "gate and up", "second": "down", "whole": "both"}


def _name(plan: Plan, part: Part) -> str:
    """What a user is told of a plan, or of the tile that a part is about."""
    return str(plan) if part == "whole" else f"{_WHAT[part]} {_tile(plan, part)}"


def _tile(plan: Plan, part: Part) -> Tile:
    """The tile that a part is about."""
    return plan.second if part == "second" else plan.first


def _best_of(tiles: Sequence[Tile], terms: int) -> Sequence[Tile]:
    """The first few of one kind: the projections' tiles must be of one."""
    return [tile for tile in tiles if tile.terms == terms][:FINALISTS]


def _batches(tokens: int) -> int:
    """So many differently routed batches that few tokens do not find their weights in L2."""
    return 8 if tokens <= 64 else 4 if tokens <= 512 else 2
