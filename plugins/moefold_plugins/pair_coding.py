"""A column of two experts as one magnitude, two signs, and who keeps it: the best of three choices, element by element.

With costs c_i, c_j of an error in this column, and a = |w|, the candidates are

    shared    m = (c_i a_i + c_j a_j) / (c_i + c_j)    costs c_i (a_i - m)^2 + c_j (a_j - m)^2
    only i    m = a_i                                   costs c_i (a_i - m)^2 + c_j a_j^2
    only j    m = a_j                                   costs c_i a_i^2       + c_j (a_j - m)^2

each with m as the format rounds it; there is no threshold.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moefold import MergedPairs

KEPT = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
"""Who reads the magnitude, by candidate: both, the first, the second."""


class Grid(Protocol):
    """The magnitudes that a format has."""

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None: there are no scales."""

    def open(self, start: int, magnitude: Tensor) -> None:
        """Set the scales of the group of columns that comes next, for magnitudes [pair, column, rows] as merged."""

    def round(self, magnitude: Tensor) -> Tensor:
        """The nearest that the format has, float32 and bf16 numbers, of [pair, candidate, rows]."""

    def clipped(self, magnitude: Tensor) -> int:
        """How many of these rounded magnitudes are the largest there is, and may have been more."""


class Window:
    """bf16 inside a window of exponents: smaller magnitudes are flushed to zero, larger ones clipped."""

    group = None

    def __init__(self, smallest: float, largest: float) -> None:
        self.smallest, self.largest = smallest, largest

    def open(self, start: int, magnitude: Tensor) -> None:
        """There is nothing to set."""

    def round(self, magnitude: Tensor) -> Tensor:
        rounded = magnitude.bfloat16().float().clamp_(max=self.largest)
        return rounded.mul_(rounded >= self.smallest)

    def clipped(self, magnitude: Tensor) -> int:
        return int((magnitude >= self.largest).sum())


class PairCoder:
    """Codes columns of many pairs at once, and holds what they became."""

    def __init__(self, cost: Tensor, rows: int, grid: Grid) -> None:
        """`cost` [pair, 2, columns]: what a squared error in a column of an expert costs."""
        self.grid, self.cost = grid, cost.mT[..., None].contiguous()  # [pair, columns, 2, 1]
        self.share = self.cost / self.cost.sum(dim=2, keepdim=True)
        pairs, _, columns = cost.shape
        self.magnitude = torch.empty(pairs, columns, rows, dtype=torch.bfloat16, device=cost.device)
        self.choice = torch.empty(pairs, columns, rows, dtype=torch.uint8, device=cost.device)
        self.kept = torch.tensor(KEPT, device=cost.device)[None, :, :, None]  # [1, 3, 2, 1]

    @property
    def group(self) -> int | None:
        """Columns that share a scale."""
        return self.grid.group

    def open(self, start: int, columns: Tensor) -> None:
        """Have the grid set its scales for what the group would become without rounding."""
        stop = start + columns.shape[2]
        values = _candidates(columns.abs().movedim(1, 2), self.share[:, start:stop])  # [pair, column, 3, rows]
        chosen = self._choose(columns.abs().movedim(1, 2), values, self.cost[:, start:stop])[0]
        self.grid.open(start, values.gather(2, chosen[:, :, None])[:, :, 0])

    def code(self, number: int, column: Tensor) -> Tensor:
        """What both experts read: [pair, 2, rows]."""
        size = column.abs()
        values = self.grid.round(_candidates(size, self.share[:, number]))
        chosen, reads = self._choose(size, values, self.cost[:, number])
        self.choice[:, number] = chosen
        self.magnitude[:, number] = values.gather(1, chosen[:, None])[:, 0]
        read = reads.gather(1, chosen[:, None, None].expand(-1, 1, 2, -1))[:, 0]
        return read.copysign_(column)

    def flags(self, coded: Tensor) -> Tensor:
        """MergedPairs' flags [pair, columns, rows], for what the columns were when they were coded."""
        held = self.magnitude != 0
        keep = torch.stack([(self.choice != 2) & held, (self.choice != 1) & held], dim=1)
        return MergedPairs.flag(coded < 0, keep)

    def _choose(self, size: Tensor, values: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """The cheapest candidate [..., rows], and what both would read of each, [..., 3, 2, rows]."""
        reads = values[..., None, :] * self.kept
        costs = ((size[..., None, :, :] - reads).square_() * cost[..., None, :, :]).sum(dim=-2)  # [..., 3, rows]
        return costs.argmin(dim=-2), reads


def _candidates(size: Tensor, share: Tensor) -> Tensor:
    """Shared, only the first's, only the second's: [..., 3, rows] of sizes [..., 2, rows]."""
    return torch.cat([(size * share).sum(dim=-2, keepdim=True), size], dim=-2)
