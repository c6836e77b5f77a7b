"""A column of two experts as one magnitude, two signs, and who keeps it: the best of three choices, element by element.

With costs c_i, c_j of an error in this column and row, and a = |w|, the candidates are

    shared    m = (c_i a_i + c_j a_j) / (c_i + c_j)    costs c_i (a_i - m)^2 + c_j (a_j - m)^2
    only i    m = a_i                                   costs c_i (a_i - m)^2 + c_j a_j^2
    only j    m = a_j                                   costs c_i a_i^2       + c_j (a_j - m)^2

each with m as the format rounds it; there is no threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from moefold import LevelLoop, Levels
from moefold.errors import InputError
from moefold_kernels import layout
from moefold_kernels.columns import Rounding, can_code, code_strip
from moefold_kernels.layout_pairs import GROUP

HEADROOM = 2
"""Exponents above the largest weight's that a compensated one may reach before it is clipped."""

KEPT = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
"""Who reads the magnitude, by candidate: both, the first, the second."""


class Grid(Protocol):
    """The magnitudes that a format has."""

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None: there are no scales."""
        ...

    def open(self, start: int, magnitude: Tensor | None) -> None:
        """Set the scales of the columns from `start` on, for [pair, column, rows] as merged; None: they are set."""
        ...

    def round(self, magnitude: Tensor) -> Tensor:
        """The nearest that the format has, float32 and bf16 numbers, of [pair, candidate, rows]."""
        ...

    def clipped(self, magnitude: Tensor) -> int:
        """How many of these rounded magnitudes may have been more than the format holds."""
        ...

    def rounding(self) -> Rounding:
        """The same magnitudes for a kernel, with the scales of the group that was opened last."""
        ...


class Window:
    """bf16 inside a window of exponents: smaller magnitudes are flushed to zero, larger ones clipped."""

    group = None

    def __init__(self, smallest: float, largest: float) -> None:
        self.smallest, self.largest = smallest, largest

    @classmethod
    def over(cls, weights: Tensor, members: Sequence[int]) -> Self:
        """The window of `exponent` for the members of `weights` [expert, ...], with HEADROOM.

        One is looked at after another, so that none is copied; raises InputError for what bf16 cannot hold.
        """
        ends = torch.stack([torch.stack(torch.aminmax(weights[expert])) for expert in members])
        least, most = ends[:, 0].amin(), ends[:, 1].amax()
        largest = torch.maximum(-least, most).bfloat16()
        if not bool(largest.isfinite()):
            raise InputError(f"weights lie in {least.item()} .. {most.item()}, and bf16 has to hold them")
        exponent = int(largest.view(torch.int16)) >> layout.FRACTION_BITS
        top = min(max(exponent, 1) + HEADROOM, layout.LARGEST_EXPONENT)
        bits = torch.tensor([layout.smallest(top), layout.largest(top)], dtype=torch.int16)
        return cls(*bits.view(torch.bfloat16).tolist())

    def open(self, start: int, magnitude: Tensor | None) -> None:
        """There is nothing to set."""

    def round(self, magnitude: Tensor) -> Tensor:
        rounded = magnitude.bfloat16().float().clamp_(max=self.largest)
        return rounded.mul_(rounded >= self.smallest)

    def clipped(self, magnitude: Tensor) -> int:
        return int((magnitude >= self.largest).sum())

    def rounding(self) -> Rounding:
        return Rounding(self.smallest, self.largest)


class Leveled:
    """Levels times a scale for each row of a pair and group of columns."""

    group = GROUP

    def __init__(self, levels: Levels, device: torch.device) -> None:
        self.loop = LevelLoop(levels, device)
        self.present = 0

    def open(self, start: int, magnitude: Tensor | None) -> None:
        if magnitude is not None:
            by_row = magnitude.movedim(1, 2).contiguous()  # what the loop goes over, many times
            self.loop.open(start, by_row.movedim(1, 2))
        self.present = start // self.group

    def round(self, magnitude: Tensor) -> Tensor:
        return self.loop.grid.round(magnitude, self.loop.scale[self.present][:, None])[1]

    def clipped(self, magnitude: Tensor) -> int:  # noqa: ARG002  (scales span what there is)
        return 0

    def rounding(self) -> Rounding:
        return Rounding(levels=self.loop.grid.levels, bounds=self.loop.grid.bounds, scale=self.loop.scale[self.present])

    def scales(self) -> Tensor:
        """All that were set: [pair, rows, groups] bfloat16."""
        return self.loop.scales()


class PairCoder:
    """Codes columns of many pairs at once."""

    def __init__(self, grid: Grid, weight: Tensor) -> None:
        """`weight` [pair, 2, rows]: how much the errors in an expert's rows count, positive."""
        self.grid, self.weight = grid, weight
        self.kept = torch.tensor(KEPT, device=weight.device)[None, :, :, None]  # [1, 3, 2, 1]
        self.cost = torch.empty(0)
        self.at_once = can_code(weight.device)[0]

    def weigh(self, cost: Tensor) -> None:
        """Take what a squared error in a column costs each expert, in a row of weight 1: [pair, 2, columns]."""
        self.cost = cost

    @property
    def group(self) -> int | None:
        """Columns that share a scale."""
        return self.grid.group

    def open(self, start: int, columns: Tensor | None) -> None:
        """Have the grid set its scales for what the group would become without rounding."""
        if columns is None:
            self.grid.open(start, None)
            return
        size = columns.abs().movedim(1, 2)  # [pair, column, 2, rows]
        some = slice(start, start + size.shape[1])
        cost = self.cost[:, :, some].mT[..., None] * self.weight[:, None]  # [pair, column, 2, rows]
        values = _candidates(size, cost)
        chosen, _ = self._choose(size, values, cost)
        self.grid.open(start, values.gather(2, chosen[:, :, None])[:, :, 0])

    def code(self, number: int, column: Tensor) -> Tensor:
        """What both experts read: [pair, 2, rows]."""
        size, cost = column.abs(), self.cost[:, :, number, None] * self.weight
        values = self.grid.round(_candidates(size, cost))
        chosen, reads = self._choose(size, values, cost)
        read = reads.gather(1, chosen[:, None, None].expand(-1, 1, 2, -1))[:, 0]
        return read.copysign_(column)

    def strip(self, start: int, target: Tensor, whole: Tensor, follow: Tensor) -> Tensor | None:
        """What both experts read of some columns: [pair, 2, columns, rows]; None where there is no kernel for it."""
        if not self.at_once:
            return None
        cost = self.cost[:, :, start : start + target.shape[2]].contiguous()
        return code_strip(target, whole, follow, cost, self.weight, self.grid.rounding())

    def _choose(self, size: Tensor, values: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """The cheapest candidate [..., rows], and what both would read of each, [..., 3, 2, rows]."""
        reads = values[..., None, :] * self.kept
        costs = ((size[..., None, :, :] - reads).square_() * cost[..., None, :, :]).sum(dim=-2)  # [..., 3, rows]
        return costs.argmin(dim=-2), reads


def least_cost(first: Tensor, second: Tensor, cost: Tensor, other: Tensor) -> Tensor:
    """What the best of the three choices costs, without rounding, of sizes |w_i|, |w_j| and costs c_i, c_j >= 0."""
    shared = (first - second).square_().mul_(cost * other / _positive(cost + other))
    return torch.minimum(torch.minimum(shared, cost * first.square()), other * second.square())


def read_cost(first: Tensor, second: Tensor, cost: Tensor, other: Tensor) -> Tensor:
    """What an error as large as what is then read would cost: rounding is a share of it."""
    both = _positive(cost + other)
    alone, left = cost * first.square(), other * second.square()
    shared = (first - second).square_().mul_(cost * other / both)
    read = torch.where(left <= alone, alone, left)  # the choice that leaves the other out
    return torch.where(shared <= torch.minimum(alone, left), (cost * first + other * second).square_() / both, read)


def _positive(cost: Tensor) -> Tensor:
    """Where no error costs anything (a neuron that never fires) anything may be read."""
    return cost.clamp(min=torch.finfo(cost.dtype).tiny)


def _candidates(size: Tensor, cost: Tensor) -> Tensor:
    """Shared, only the first's, only the second's: [..., 3, rows] of sizes and costs [..., 2, rows]."""
    share = cost / cost.sum(dim=-2, keepdim=True)
    return torch.cat([(size * share).sum(dim=-2, keepdim=True), size], dim=-2)
