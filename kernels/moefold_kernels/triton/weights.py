"""One layer's experts as the kernels take them: packed in pairs, alone, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Projections(NamedTuple):
    """The matrices of one kind of units: words [pair, ...] int16, or weights [expert, ...] bfloat16."""

    gate: Tensor | None  # [unit, inner, hidden]; None where the experts have no gate
    up: Tensor  # [unit, inner, hidden]
    down: Tensor  # [unit, hidden, inner]
    tops: tuple[int, int, int] = (127, 127, 127)
    """The windows' tops of gate, up and down, where there are words."""


class Biases(NamedTuple):
    """Biases by original expert; gate and up are views of one tensor."""

    gate: Tensor | None  # [expert, inner]
    up: Tensor  # [expert, inner]
    down: Tensor  # [expert, hidden]


@dataclass(frozen=True)
class Weights:
    """One layer's experts as the kernels take them."""

    packed: Projections | None
    alone: Projections | None
    places: Tensor  # [expert] int32: 2 * pair + slot, or after all pairs the number among those alone
    experts: Tensor  # [place] int32: the inverse
    biases: Biases | None = None

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return 0 if self.packed is None else len(self.packed.up)

    @property
    def singles(self) -> int:
        """How many experts stand alone."""
        return 0 if self.alone is None else len(self.alone.up)

    @property
    def any(self) -> Projections:
        """Either kind, for what both have."""
        found = self.packed or self.alone
        assert found is not None
        return found
