"""The codecs that come with moefold; the bits are laid out in moefold_kernels.layout."""

from __future__ import annotations

import logging
from typing import Annotated, ClassVar, NoReturn

import torch
from pydantic import Field
from torch import Tensor

from moefold import Codec, Coded, CodedLayer, DualMask, Json, MergedPair, PairMerge, hookimpl
from moefold.errors import FormatError
from moefold_kernels import FormatError as KernelsFormatError
from moefold_kernels import layout, reference
from moefold_kernels.packing import can_pack, pack_matrices

_log = logging.getLogger("moefold.pack")
_SLOW = "pair by pair in plain torch (%s)"


class Exponent(Codec):
    """Two experts in one 16-bit word: two signs, two keep bits, 5 exponent and 7 fraction bits (PuzzleMoE)."""

    name: ClassVar[str] = layout.EXPONENT
    version: ClassVar[int] = 2  # counts of each pair
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
        return Coded(words, {name: counts[name] for name in ("clipped", "flushed") if name in counts})

    def pack_layer(self, merge: PairMerge) -> CodedLayer | None:
        """A dual-mask merge on a CUDA device in one pass over each matrix; on the CPU, and of other merges, None."""
        experts = merge.experts
        able, why = can_pack(experts.down.device, experts.down.dtype)
        if merge.rule is None:
            able, why = False, "the recipe is not the dual-mask rule"
        elif not all(norms.dtype == torch.float32 for norms in merge.rule.norms.values()):
            able, why = False, "norms are not float32"
        missed = experts.down.is_cuda and merge.rule is not None and not able
        _log.log(logging.WARNING if missed else logging.DEBUG, "pack.%s: %s", self.name, why if able else _SLOW % why)
        return self._at_once(merge, merge.rule) if able and merge.rule else None

    def _at_once(self, merge: PairMerge, rule: DualMask) -> CodedLayer:
        matrices = merge.experts.matrices()
        found = pack_matrices(matrices, merge.pairs, rule.norms, rule.threshold, self.window)
        counts: dict[str, Json] = {}
        for matrix, words in found.words.items():
            if found.tops[matrix] > layout.LARGEST_EXPONENT or found.counts[matrix][-1]:
                self._refuse(merge, matrix)
            held = reference.counts_as_merged(found.counts[matrix], words.numel())
            counts = {name: counts.get(name, 0) + held[name] for name in held}
        return CodedLayer(found.words, dict(found.tops), counts)

    def _refuse(self, merge: PairMerge, matrix: str) -> NoReturn:
        """Say which values cannot be packed, as going pair by pair would have."""
        top = self.fit(matrix, merge.experts.matrices()[matrix][[e for pair in merge.pairs for e in pair]])
        for pair in merge.merged(matrix):
            self.encode(pair, top)
        raise FormatError(f"{matrix}: merged magnitudes are not finite, and bf16 has to hold them")

    @classmethod
    def packer(cls, device: torch.device) -> str:
        """The fused pass, or why not."""
        able, why = can_pack(device)
        return why if able else _SLOW % why

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
