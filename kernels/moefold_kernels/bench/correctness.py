"""Correct first: what is timed is compared with float64 before its time counts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import silu

from moefold_kernels.bench import kernel
from moefold_kernels.bench.routing import Batch
from moefold_kernels.errors import WrongResultError
from moefold_kernels.reference import PackedExperts
from moefold_kernels.reference_pairs import LeveledExperts

TOLERANCE = 1e-2
"""Largest ||out - ref|| / ||ref|| of a bf16 layer."""

INTERPRETED = 2e-2
"""The same under Triton's interpreter, which cuts float32 off to bf16 where a GPU rounds (3.6 and 3.7)."""

SAMPLE = 32
"""Tokens of a batch that are compared; that every element was written is checked for all of them."""


class Expected:
    """The float64 outputs of a sample of one batch's tokens, from the decoded weights, nothing rounded on the way."""

    def __init__(self, experts: PackedExperts, batch: Batch, generator: torch.Generator, sample: int = SAMPLE) -> None:
        tokens = batch.hidden.shape[0]
        self.shape = batch.hidden.shape
        self.rows = torch.randperm(tokens, generator=generator, device=batch.hidden.device)[:sample]
        self.values = _float64(experts, batch, self.rows)

    def error(self, out: Tensor) -> float:
        """The relative Frobenius error of the sample; WrongResultError when it or anything unwritten condemns `out`."""
        if out.shape != self.shape or out.dtype != torch.bfloat16:
            raise WrongResultError(f"is {tuple(out.shape)} {out.dtype}, not {tuple(self.shape)} torch.bfloat16")
        missing = int((~out.isfinite()).any(-1).sum())
        if missing:
            raise WrongResultError(f"left {missing} of {len(out)} rows unwritten or not finite")
        error = float((out[self.rows].double() - self.values).norm() / self.values.norm())
        limit = INTERPRETED if kernel.interpreted() else TOLERANCE
        if not error <= limit:
            raise WrongResultError(f"is off float64 by {error:.2e}, more than {limit:.0e}")
        return error


def _float64(experts: PackedExperts, batch: Batch, rows: Tensor) -> Tensor:
    hidden, index, scale = batch.hidden[rows].double(), batch.top_k_index[rows], batch.top_k_weights[rows].double()
    place = {expert: (pair, slot) for pair, members in enumerate(experts.pairs) for slot, expert in enumerate(members)}
    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        pair, slot = place[expert]
        gate, up, down = (
            one_pair(experts, pair).decoded(name, slot)[0].double() for name in ("gate_proj", "up_proj", "down_proj")
        )
        token, position = torch.where(index == expert)
        x = hidden[token]
        made = ((silu(x @ gate.T) * (x @ up.T)) @ down.T) * scale[token, position, None]
        out.index_add_(0, token, made)  # a token may name an expert twice
    return out


def one_pair(experts: PackedExperts, pair: int) -> PackedExperts:
    """The same with one pair alone; views."""

    def cut(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[pair : pair + 1] for name, tensor in part.items()}

    one = replace(experts, words=cut(experts.words), pairs=[experts.pairs[pair]])
    return replace(one, low=cut(one.low), scale=cut(one.scale)) if isinstance(one, LeveledExperts) else one


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN (integers their largest value): what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # a property of a module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some operations have no deterministic form is no matter here
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
