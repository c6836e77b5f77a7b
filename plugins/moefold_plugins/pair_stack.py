"""One stack of a layer's matrices, gate and up or down, and what has been merged of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from moefold import MergedPairs


class Coded(NamedTuple):
    """Pairs of one stack as coded."""

    read: Tensor  # [pair, 2, columns, rows] bfloat16
    damage: Tensor  # [pair, 2]
    raised: list[int]
    scale: Tensor | None  # [pair, rows, groups] bfloat16
    clipped: int

    def experts(self) -> Tensor:
        """What the experts read: [member, rows, columns]."""
        return self.read.mT.flatten(0, 1)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Pairs that were coded one after the other."""
        scale = [part.scale for part in parts if part.scale is not None]
        return cls(
            torch.cat([part.read for part in parts]),
            torch.cat([part.damage for part in parts]),
            [count for part in parts for count in part.raised],
            torch.cat(scale) if scale else None,
            sum(part.clipped for part in parts),
        )


@dataclass
class Stack:
    """Gate and up as one, or down, and what has been merged of them: chunks of [pair, rows, columns]."""

    weights: Tensor  # [expert, rows, columns]
    magnitude: list[Tensor] = field(default_factory=list)
    flags: list[Tensor] = field(default_factory=list)
    scale: list[Tensor] = field(default_factory=list)
    damage: list[list[float]] = field(default_factory=list)
    """What coding costs the experts of each pair: tr((W - Q) H (W - Q)^T), H with its damping; of down, W is D*."""
    raised: dict[str, int] = field(default_factory=dict)
    clipped: int = 0

    def keep(self, members: Sequence[int], coded: Coded) -> None:
        """Add a chunk of pairs, of these experts."""
        read = coded.read
        self.magnitude.append(read.abs().amax(dim=1).mT.contiguous())
        self.flags.append(MergedPairs.flag(read < 0, read != 0).mT.contiguous())
        self.scale += [] if coded.scale is None else [coded.scale]
        self.clipped += coded.clipped
        self.damage += coded.damage.tolist()
        self.raised |= {str(e): count for e, count in zip(members, coded.raised, strict=True) if count}
