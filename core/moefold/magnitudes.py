"""Few magnitudes for a merged pair: levels learnt once, and a bf16 scale per row and group of 64 columns.

A magnitude of the few-bit formats is `bf16(levels[number] * scale)`; moefold_kernels.layout_pairs has the bits. Who
rounds inside a loop over columns sets the scales of 64 columns when it comes to the first of them, from what they would
be unrounded, and then rounds column by column (`LevelLoop`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor

from moefold.artifact import Artifact, Json
from moefold.errors import FormatError
from moefold.level_fitting import SPACING, Fitting
from moefold_kernels import layout_pairs
from moefold_kernels.layout_pairs import GROUP

MULTIPLES = (0.7, 1.4, 29)
"""Of the root mean square: those tried for a scale, from, to, and how many."""
SHORTLIST, TRIED = 12, 512
"""Sets of levels, and groups among the samples, with which scales are searched before one set is chosen."""


@dataclass(frozen=True)
class Levels:
    """The 2 ** bits magnitudes of a format, increasing, in units of the scale; each is a bf16 number."""

    bits: int
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.bits not in layout_pairs.MAGNITUDE_BITS.values() or len(self.values) != 1 << self.bits:
            raise FormatError(f"{len(self.values)} levels for {self.bits} bits; formats have 2, 4, 8 or 32 levels")
        if not all(0 < value < float("inf") for value in self.values):
            raise FormatError(f"levels {list(self.values)}: each is a positive number")
        if torch.tensor(self.values, dtype=torch.float64, device="cpu").bfloat16().tolist() != list(self.values):
            raise FormatError(f"levels {list(self.values)}: each is a bf16 number")
        if any(larger < (1 + SPACING) * smaller for smaller, larger in pairwise(self.values)):
            raise FormatError(f"levels {list(self.values)}: each is at least {1 + SPACING} times the one before")

    @classmethod
    def learn(cls, samples: Tensor, bits: int) -> Self:
        """Levels for magnitudes in units of their scale, on the format's grid of fp8 numbers (level_fitting).

        Deterministic. Of the sets that leave the least squared error of all samples as they are, the one that leaves
        the least when groups choose their scale; 64 samples one after the other are taken for a group. Raises
        FormatError when the samples are too few or too much alike for so many levels.
        """
        ordered = samples.detach().flatten().to("cpu", torch.float64).abs().sort().values
        count = 1 << bits
        if len(ordered) < 16 * count or not bool(torch.isfinite(ordered[-1:]).all()):
            raise FormatError(f"{len(ordered)} magnitudes are too few for {count} levels, or not all are finite")
        if not ordered[-1] > 0:
            raise FormatError(f"all {len(ordered)} magnitudes are 0, and levels are positive")
        fitting = Fitting(ordered)
        sets = fitting.candidates(count)
        least = fitting.errors(sets).argsort(stable=True)[:SHORTLIST]
        found = [cls(bits, tuple(row)) for row in sets[least].tolist()]
        groups = _some_groups(samples)
        return min(found, key=lambda levels: levels.on("cpu").error(groups))

    def on(self, device: torch.device | str) -> Grid:
        """The levels on a device, to round there."""
        levels = torch.tensor(self.values, dtype=torch.float32, device=device)
        return Grid(levels, (levels[1:] + levels[:-1]) / 2)


class Grid(NamedTuple):
    """Levels on a device: what loops round with."""

    levels: Tensor  # [2 ** bits] float32
    bounds: Tensor  # [2 ** bits - 1] float32: where, in units of the scale, rounding goes on to the next level

    def round(self, magnitude: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The number of the level nearest to each magnitude (uint8), and its value (float32, a bf16 number).

        The two broadcast: [pair, rows] both for one column of many pairs. Where a scale is zero, so is the value.
        """
        own = scale.float()
        level = torch.bucketize((magnitude.float() / torch.where(own > 0, own, torch.inf)).contiguous(), self.bounds)
        return level.to(torch.uint8), self.values(level, own)

    def values(self, level: Tensor, scale: Tensor) -> Tensor:
        """`bf16(levels[level] * scale)` in float32."""
        return (self.levels[level.long()] * scale.float()).bfloat16().float()

    def scale(self, magnitude: Tensor) -> Tensor:
        """The scale of each group of magnitudes [..., at most 64 columns]: bfloat16 [...].

        Of 29 multiples of the root mean square, that with the least squared error. Of Gaussian weights' merged
        magnitudes it leaves, for b = 1, 2, 3 and 5, 0.97, 0.87, 0.76 and 0.63 of the error that the root mean square
        itself leaves; 41 multiples from 0.5 to 1.5 left 0.997 of that at best. With free levels the largest magnitude,
        and levels learnt for it, left 1.04, 0.96, 0.85 and 0.66; two steps of least squares 0.98, 0.95, 0.93 and 0.88.
        """
        own = magnitude.float()
        mean = own.square().mean(dim=-1).sqrt()
        best, least = mean.bfloat16(), torch.full_like(mean, torch.inf)
        for multiple in torch.linspace(*MULTIPLES).tolist():
            scale = (mean * multiple).bfloat16()
            error = (self.round(own, scale[..., None])[1] - own).square().sum(dim=-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best

    def error(self, magnitude: Tensor) -> float:
        """The mean squared error that groups of magnitudes [group, at most 64 columns] have with their scales."""
        return float((self.round(magnitude, self.scale(magnitude)[:, None])[1] - magnitude).double().square().mean())

    def scales(self, magnitude: Tensor) -> Tensor:
        """The scales of whole rows [..., columns]: bfloat16 [..., groups]; the last group may be shorter."""
        whole = magnitude.shape[-1] // GROUP * GROUP
        rows = magnitude[..., :whole].unflatten(-1, (-1, GROUP))  # [..., group, column]
        rest = [self.scale(magnitude[..., whole:])[..., None]] if whole < magnitude.shape[-1] else []
        return torch.cat([self.scale(rows), *rest], dim=-1)


class LevelLoop:
    """Rounds inside a loop over columns, for many pairs at once; remembers the scales that it has set."""

    group = GROUP

    def __init__(self, levels: Levels, device: torch.device | str) -> None:
        self.levels, self.grid = levels, levels.on(device)
        self.scale: list[Tensor] = []
        """Of each group of columns so far: [pair, rows] bfloat16."""

    def open(self, start: int, magnitude: Tensor) -> None:
        """Set the scales of the columns from `start` on, for unrounded magnitudes [pair, column, rows]."""
        if start != GROUP * len(self.scale):
            raise FormatError(f"column {start} begins no group: groups of {GROUP} columns come in their order")
        self.scale.append(self.grid.scale(magnitude.movedim(1, 2)))

    def round(self, magnitude: Tensor) -> Tensor:
        """The nearest values, float32 and bf16 numbers, of [pair, any, rows] in one column of the present group."""
        return self.grid.round(magnitude, self.scale[-1][:, None])[1]

    def scales(self) -> Tensor:
        """All of them: [pair, rows, groups] bfloat16."""
        return torch.stack(self.scale, dim=-1)

    def numbers(self, magnitude: Tensor) -> Tensor:
        """The levels' numbers (uint8) of rounded magnitudes [pair, rows, columns], once every group is set."""
        each = self.scales().repeat_interleave(GROUP, dim=-1)[..., : magnitude.shape[-1]]
        return self.grid.round(magnitude, each)[0]


class LeveledPair(NamedTuple):
    """Two experts' matrices as one: expert s reads `(-1) ** negative[s] * keep[s] * bf16(levels[level] * scale)`.

    There is no zero: every position is kept by one of the two, or by both.
    """

    level: Tensor  # [rows, columns] uint8
    scale: Tensor  # [rows, groups of 64 columns] bfloat16
    negative: Tensor  # [2, rows, columns] bool
    keep: Tensor  # [2, rows, columns] bool


@dataclass(frozen=True)
class LevelTable(Artifact):
    """The levels of a model's few-bit formats, learnt from a sample of its experts."""

    values: dict[str, list[float]]
    """Bits of a level's number (a string, as JSON has it) -> the levels."""
    sampled: dict[str, Json] = field(default_factory=dict)
    """What they were learnt from, for the report."""

    def levels(self, bits: int) -> Levels:
        """Those of so many bits."""
        return Levels(bits, tuple(self.values[str(bits)]))

    def facts(self) -> dict[str, Json]:
        return {"values": self.values, "sampled": self.sampled}


def _some_groups(samples: Tensor) -> Tensor:
    """At most TRIED groups, spread over all samples: [group, at most 64] float32 on the CPU."""
    flat = samples.detach().flatten()
    groups = flat[: len(flat) // GROUP * GROUP].view(-1, GROUP) if len(flat) >= GROUP else flat[None]
    spread = torch.linspace(0, len(groups) - 1, min(TRIED, len(groups)), device=groups.device).round().long()
    return groups[spread].to("cpu", torch.float32).abs()
