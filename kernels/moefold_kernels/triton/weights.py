"""One layer's experts as the kernels take them: packed in pairs, alone, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from moefold_kernels import layout
from moefold_kernels.errors import FormatError


class Projections(NamedTuple):
    """The matrices of one kind of units: words [pair, ...] int16, or weights [expert, ...] bfloat16."""

    gate: Tensor | None  # [unit, inner, hidden]; None where the experts have no gate
    up: Tensor  # [unit, inner, hidden]
    down: Tensor  # [unit, hidden, inner]
    tops: tuple[int, int, int] = (127, 127, 127)
    """The windows' tops of gate, up and down, where there are words."""

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.gate is not None

    @property
    def inner(self) -> int:
        """Rows of up."""
        return self.up.shape[1]

    @property
    def hidden(self) -> int:
        """Rows of down."""
        return self.down.shape[1]


class Planes(NamedTuple):
    """One fused matrix of every pair in a few-bit format, as layout_pairs.py has it, contiguous."""

    words: Tensor  # [pair, rows, words] int32, or [pair, rows / 16, 16 * words]; the others alike
    low: Tensor | None  # [pair, rows, words] int32; pair4 has none
    scale: Tensor  # [pair, rows, groups] int16


class Leveled(NamedTuple):
    """The matrices of pairs in a few-bit format."""

    format: str
    wide: Planes  # gate rows before up rows
    narrow: Planes  # down
    levels: Tensor  # [3, INTEGERS] int32: of gate, up and down, as levels.py has them
    gated: bool
    inner: int
    """Rows of up."""
    hidden: int
    """Rows of down."""
    coded: bool = False
    """Whether all levels are e4m3 numbers times a factor (levels.coded)."""


class Biases(NamedTuple):
    """Biases by original expert; gate and up are views of one tensor."""

    gate: Tensor | None  # [expert, inner]
    up: Tensor  # [expert, inner]
    down: Tensor  # [expert, hidden]


@dataclass(frozen=True)
class Weights:
    """One layer's experts as the kernels take them."""

    packed: Projections | Leveled | None
    alone: Projections | None
    places: Tensor  # [expert] int32: 2 * pair + slot, or after all pairs the number among those alone
    experts: Tensor  # [place] int32: the inverse
    biases: Biases | None = None

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return 0 if self.packed is None else len(units(self.packed))

    @property
    def singles(self) -> int:
        """How many experts stand alone."""
        return 0 if self.alone is None else len(self.alone.up)

    @property
    def format(self) -> str:
        """Of the pairs; of experts alone, "exponent"."""
        return self.packed.format if isinstance(self.packed, Leveled) else layout.EXPONENT

    @property
    def any(self) -> Projections | Leveled:
        """Either kind, for what both have."""
        found = self.packed or self.alone
        assert found is not None
        return found


def check_rows(name: str, matrices: Tensor) -> None:
    """Raise FormatError unless the numbers of a row of matrices [unit, row, column] lie side by side.

    Units and rows may lie as they like. Nothing is copied, as every call would do so with all of a layer's weights.
    """
    if matrices.shape[2] > 1 and matrices.stride(2) != 1 and matrices.numel():
        raise FormatError(
            f"{name} has strides {tuple(matrices.stride())}, and the kernels read rows whose numbers lie side by side "
            f"(a last stride of 1): give {name}.contiguous(), once"
        )


def units(matrices: Projections | Leveled) -> Tensor:
    """A tensor of as many units."""
    return matrices.narrow.words if isinstance(matrices, Leveled) else matrices.down


def contiguous(planes: Planes) -> Planes:
    """The planes as the kernels address them; copies only what is not contiguous."""
    return Planes(*(None if part is None else part.contiguous() for part in planes))  # type: ignore[arg-type]


def planes_of(kind: Leveled, matrix: Planes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words, bits of `low` (any tensor, where nothing is read), scales, and the levels of all matrices."""
    return matrix.words, matrix.words if matrix.low is None else matrix.low, matrix.scale, kind.levels


def rescaling(top: int) -> float:
    """What sums of a matrix with the window top `top` are multiplied with, beside decode.RESTORE (decode.rescale)."""
    return 2.0 ** (layout.low(top) - 96)


def stride_of(tensor: Tensor | None, dimension: int) -> int:
    """A dimension's stride; 0 where there is no tensor."""
    return 0 if tensor is None else tensor.stride(dimension)


def elements_between(one: Tensor | None, other: Tensor) -> int:
    """How many elements lie between the beginnings of two tensors of the same strides; 0 where there is but one."""
    return 0 if one is None else (other.data_ptr() - one.data_ptr()) // one.element_size()
