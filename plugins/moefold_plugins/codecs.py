"""The codecs that come with moefold; the bits are laid out in moefold_kernels.layout."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from moefold import Codec, Coded, Json, MergedPair, hookimpl
from moefold.errors import FormatError
from moefold_kernels import FormatError as KernelsFormatError
from moefold_kernels import layout, reference


class Exponent(Codec):
    """Two experts in one 16-bit word: two signs, two keep bits, 5 exponent and 7 fraction bits (PuzzleMoE)."""

    name: ClassVar[str] = layout.EXPONENT
    version: ClassVar[int] = 1
    window: Annotated[
        int | None,
        Field(
            ge=1,
            le=layout.LARGEST_EXPONENT,
            description="top of the window of 32 bf16 exponents (biased); by default the largest one present",
        ),
    ] = None

    def fit(self, matrix: str, weights: Tensor) -> Json:
        """The window's top: the biased exponent of the largest |weight|, rounded to bf16.

        A merged magnitude is a mean of two, or one of them, and rounding is monotone: none is above this window.
        """
        if self.window is not None:
            return self.window
        least, most = torch.aminmax(weights)  # no copy of the layer, as abs() would be
        largest = torch.maximum(-least, most).to(torch.bfloat16)
        if not torch.isfinite(largest):
            raise FormatError(f"{matrix}: weights lie in {least.item()} .. {most.item()}, and bf16 has to hold them")
        return max(int(largest.view(torch.int16)) >> layout.FRACTION_BITS, 1)

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        """The words, exact for every bf16 inside the window; others are clipped or flushed, and counted."""
        try:
            words, counts = reference.encode(pair.magnitude, pair.negative, pair.keep, settings)
        except KernelsFormatError as error:
            raise FormatError(str(error)) from error
        return Coded(words, {name: counts[name] for name in ("clipped", "flushed")})

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        """What expert `slot` reads."""
        try:
            return reference.decode(words, settings, slot)
        except KernelsFormatError as error:
            raise FormatError(str(error)) from error

    def size(self, rows: int, columns: int) -> int:
        """Two bytes a position."""
        return rows * columns * torch.int16.itemsize


@hookimpl
def moefold_codecs() -> list[type[Codec]]:
    return [Exponent]
