"""Levels for magnitudes: Lloyd-Max, and the sets of fp8 numbers times a factor that are near to it.

Kernels for Hopper multiply levels as fp8 numbers (moefold_kernels.eighths), so only such are learnt. What is left to
choose is the factor, one of eight in an octave, and the numbers: any for pair5 and pair6, the lower one for pair4, none
for pair8.

With scales searched that leaves of free levels' squared error, for b = 1, 2, 3 and 5: of Gaussian weights' merged
magnitudes 1.000, 0.996, 1.005 and 1.386; of the shipped model's 0.998, 0.995, 1.004 and 1.314; of Student's t with 4
degrees of freedom 0.994, 1.002, 1.000 and 0.976; of evenly spread weights 1.000, 0.997, 1.007 and 3.18, where pair8's
numbers are the wrong ones. More of Lloyd's steps on the grid change nothing: nearly every set is at rest after one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from moefold.errors import FormatError
from moefold_kernels.eighths import EIGHTHS, LARGEST, UPPER, scaled, value

STEPS = 200
"""At most so many of Lloyd's steps; it has settled long before."""
SETTLED = 1e-6
"""The largest relative change of a level in a step that ends the search."""
SPACING = 1 / 64
"""How much larger a level is than the one before it, at least: four roundings to bf16, so numbers stay apart."""
STRETCHES = (0.92, 0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06, 1.08)
"""Of Lloyd-Max's levels before they are rounded: scales follow, so sets that differ by a multiple are as good. Without
them the grid would cost pair6 1.018 for Gaussian weights."""
NUMBERS = torch.tensor([value(byte) for byte in range(LARGEST + 1)], dtype=torch.float64, device="cpu")
"""All fp8 numbers without a sign."""
STRAIGHT = 32
"""The levels of pair8."""


class Fitting:
    """Magnitudes [any] in ascending order, float64 on the CPU, and sums of them."""

    def __init__(self, ordered: Tensor) -> None:
        self.ordered = ordered
        self.sums = F.pad(ordered.cumsum(0), (1, 0))
        self.square = ordered.square().sum()

    def errors(self, sets: Tensor) -> Tensor:
        """The sum of squared errors with each set of levels: [set] of [set, level]."""
        numbers, sums = self._cells(sets)
        return self.square + (numbers * sets.square() - 2 * sets * sums).sum(dim=1)

    def lloyd_max(self, count: int) -> Tensor:
        """Levels [count] at a local minimum of the squared error; raises FormatError where two come together."""
        quantiles = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
        levels = self.ordered[(quantiles * len(self.ordered)).long()]
        for _ in range(STEPS):
            numbers, sums = (part[0] for part in self._cells(levels[None]))
            after = torch.where(numbers > 0, sums / numbers.clamp(min=1), levels)
            done = bool(((after - levels).abs() <= SETTLED * after.abs()).all())
            levels = after
            if done:
                break
        for smaller, larger in pairwise(levels.tolist()):
            if larger <= 0 or larger < (1 + SPACING) * smaller:
                raise FormatError(
                    f"magnitudes are too much alike for {count} levels: the best are {smaller:.6g} and {larger:.6g} "
                    f"among others, and each has to be at least {1 + SPACING} times the one before"
                )
        return levels

    def candidates(self, count: int) -> Tensor:
        """Sets of so many levels that a format can have, near the best: [set, level]."""
        if count == STRAIGHT:
            return self._straight()
        best = self.lloyd_max(count)
        return _two(best) if count == 2 else _sets([_near(best * each, k) for each in STRETCHES for k in EIGHTHS])

    def _straight(self) -> Tensor:
        """Those of pair8, with their largest anywhere between the root mean square and the largest magnitude."""
        mean, most = math.sqrt(float(self.square) / len(self.ordered)), float(self.ordered[-1])
        largest = value(STRAIGHT - 1)
        octaves = range(_octave(mean / largest), _octave(most / largest) + 1)
        factors = [math.ldexp(eighths / 8, octave) for octave in octaves for eighths in EIGHTHS]
        return _sets([scaled(range(STRAIGHT), factor) for factor in factors])

    def _cells(self, sets: Tensor) -> tuple[Tensor, Tensor]:
        """How many magnitudes are nearest to each level, and their sums: [set, level]."""
        inside = torch.searchsorted(self.ordered, (sets[:, 1:] + sets[:, :-1]) / 2)
        ends = F.pad(F.pad(inside, (1, 0)), (0, 1), value=len(self.ordered))
        return ends.diff(dim=1), self.sums[ends].diff(dim=1)


def _two(best: Tensor) -> Tensor:
    """Those of pair4, with the upper one within half an octave of the best and any lower one."""
    first = float(best[-1]) / value(UPPER) / math.sqrt(2)
    factors = [math.ldexp(eighths / 8, _octave(first * 8 / eighths) + 1) for eighths in EIGHTHS]
    return _sets([scaled((lower, UPPER), factor) for factor in factors for lower in range(1, UPPER)])


def _near(levels: Tensor, eighths: int) -> tuple[float, ...]:
    """The nearest fp8 numbers times a factor of so many eighths; what would coincide goes up by one number."""
    factor = math.ldexp(eighths / 8, _octave(float(levels[-1]) * 8 / eighths))
    found: list[int] = []
    for byte in torch.bucketize(levels / factor, (NUMBERS[1:] + NUMBERS[:-1]) / 2).tolist():
        found.append(max(byte, found[-1] + 1 if found else 1))
    return scaled(found, factor)


def _sets(rows: Sequence[tuple[float, ...]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _octave(number: float) -> int:
    """The exponent of the power of two at or below a number."""
    return math.frexp(number)[1] - 1
