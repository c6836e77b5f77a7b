"""The format: where each bit is, and what it means."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moefold import Codec, Coded, Json, MergedPair
from moefold.errors import FormatError

SIGN, KEEP = (7, 6), (5, 4)
CODES = 15
HALF_STEP = 0.7071067690849304
"""The float32 next to the square root of 1/2."""


class Log8(Codec):
    """A pair in 8 bits a position: magnitudes in half octaves below the largest of the matrix."""

    name: ClassVar[str] = "log8"
    version: ClassVar[int] = 1

    def fit(self, matrix: str, weights: Tensor) -> Json:
        """The largest weight, a float32, and how many columns there are: words hold two."""
        largest = float(weights.float().abs().amax())
        if not largest < float("inf"):
            raise FormatError(f"{matrix}: weights reach {largest}; they must be finite")
        return {"largest": largest, "columns": weights.shape[-1]}

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        """The nearest code by its logarithm; what is below half the smallest magnitude is flushed to zero."""
        magnitude, top = pair.magnitude.double(), settings["largest"]
        if not magnitude.is_meta and not bool((magnitude.isfinite() & (magnitude >= 0)).all()):
            raise FormatError("magnitudes must be finite and not negative")
        octaves = torch.log2(magnitude / top) if top else torch.full_like(magnitude, -torch.inf)
        held = octaves > -CODES / 2 - 1
        code = (-2 * octaves).round().clamp(0, CODES).nan_to_num(0).to(torch.int32)
        kept = pair.keep & held
        bytes_ = code * (kept[0] | kept[1])
        for slot in (0, 1):
            bytes_ = bytes_ | (kept[slot] & pair.negative[slot]).to(torch.int32) << SIGN[slot]
            bytes_ = bytes_ | kept[slot].to(torch.int32) << KEEP[slot]
        if bytes_.shape[-1] % 2:
            bytes_ = torch.nn.functional.pad(bytes_, (0, 1))
        words = (bytes_[..., 0::2] | bytes_[..., 1::2] << 8).to(torch.int16)
        if magnitude.is_meta:
            return Coded(words, {})
        wanted = pair.keep[0] | pair.keep[1]
        clipped, flushed = wanted & (octaves > 0.25), wanted & ~held & (magnitude > 0)
        return Coded(words, {"clipped": int(clipped.sum()), "flushed": int(flushed.sum())})

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        """What expert `slot` reads."""
        both = torch.stack([words & 0xFF, words >> 8 & 0xFF], dim=-1).flatten(-2).to(torch.int32)
        bits = both[..., : settings["columns"]]
        odd = torch.where((bits & 1).bool(), HALF_STEP, 1.0)
        largest = torch.tensor(settings["largest"], dtype=torch.float32, device=bits.device)
        magnitude = torch.ldexp(largest * odd, -((bits & CODES) >> 1))
        sign = 1 - 2 * (bits >> SIGN[slot] & 1)
        return (magnitude * sign * (bits >> KEEP[slot] & 1)).bfloat16()

    def size(self, rows: int, columns: int) -> int:
        """A byte a position, in rows of whole words."""
        return 2 * rows * -(-columns // 2)
