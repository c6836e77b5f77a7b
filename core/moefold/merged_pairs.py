"""Merged pairs as results: what a merge that costs more than a look at each element leaves for a codec to lay out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from moefold.artifact import Json
from moefold.artifacts import MergedPair, Paired, tensor_bytes

NEGATIVE, KEEP = (1, 2), (4, 8)
"""Bits of `flags`, by slot."""


@dataclass(frozen=True)
class MergedPairs(Paired):
    """One layer's merged pairs, each value one that `format` holds exactly, three bytes for each position.

    Packing them rounds nothing: what was rounded was rounded while its error could still be made up for.
    """

    format: str
    pairs: list[list[int]]
    alone: list[int]
    magnitude: dict[str, Tensor]  # "gate_proj", "up_proj", "down_proj" -> [pair, rows, columns] bfloat16
    flags: dict[str, Tensor]  # the same names -> [pair, rows, columns] uint8
    experts: dict[str, Tensor]  # the same names -> [expert left alone, rows, columns], source dtype
    scale: dict[str, Tensor] = field(default_factory=dict)
    """For formats that have scales: the same names -> [pair, rows, groups] bfloat16."""
    settings: dict[str, Json] = field(default_factory=dict)
    """What the format needs to know beside that, such as its levels."""
    route: list[int] | None = None
    """The expert that router output i means, where experts were merged before (None: expert i)."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """`gate_up_bias` and `down_bias` where experts have them, in the order of the neurons."""
    figures: dict[str, Json] = field(default_factory=dict)
    """What its maker measured, for the report."""

    def to(self, device: torch.device) -> Self:
        """The same with the merged tensors, three bytes for each position, on a device; the rest stays where it is."""
        magnitude, flags, scale = (
            {name: tensor.to(device) for name, tensor in part.items()}
            for part in (self.magnitude, self.flags, self.scale)
        )
        return replace(self, magnitude=magnitude, flags=flags, scale=scale)

    @staticmethod
    def flag(negative: Tensor, keep: Tensor) -> Tensor:
        """One byte for each position of `negative` and `keep` [pair, 2, rows, columns] bool."""
        parts = zip((*negative.unbind(1), *keep.unbind(1)), (*NEGATIVE, *KEEP), strict=True)
        return sum((part.to(torch.uint8) * bit for part, bit in parts), torch.zeros((), dtype=torch.uint8))

    def pair(self, matrix: str, index: int) -> MergedPair:
        """One matrix of one pair."""
        flags = self.flags[matrix][index]
        negative, keep = (torch.stack([(flags & bit) != 0 for bit in bits]) for bits in (NEGATIVE, KEEP))
        return MergedPair(self.magnitude[matrix][index].float(), negative, keep)

    def merged(self, matrix: str) -> Iterator[MergedPair]:
        """One matrix of every pair, in order."""
        return (self.pair(matrix, index) for index in range(len(self.pairs)))

    def read(self, matrix: str, index: int, slot: int) -> Tensor:
        """What an expert of a pair reads: [rows, columns] bfloat16."""
        magnitude, negative, keep = self.pair(matrix, index)
        return torch.where(negative[slot], -magnitude, magnitude).mul_(keep[slot]).bfloat16()

    def bytes(self) -> int:
        """Bytes that this takes itself, which is not what it packs to."""
        parts = (self.magnitude, self.flags, self.experts, self.scale, self.biases)
        return sum(tensor_bytes(tensor) for part in parts for tensor in part.values())

    def facts(self) -> dict[str, Json]:
        return {"format": self.format, "pairs": self.pairs, "alone": self.alone, "figures": self.figures}
