"""Decoding in Triton: one program a block of words, each of which gives two columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefold_log8.codec import HALF_STEP, KEEP, SIGN

BLOCK = 1024


@triton.jit
def _decode(words, out, largest, count, pairs, columns, SIGN: tl.constexpr, KEEP: tl.constexpr, HALF: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + at, mask=at < count, other=0).to(tl.int32)
    row, column = at // pairs, 2 * (at % pairs)
    for half in tl.static_range(2):
        bits = (word >> (8 * half)) & 0xFF
        octave = (bits & 15) >> 1
        power = ((127 - octave) << 23).to(tl.float32, bitcast=True)  # 2 ** -octave
        magnitude = largest * tl.where((bits & 1) == 1, HALF, 1.0) * power
        value = tl.where((bits >> SIGN) & 1 == 1, -magnitude, magnitude)
        value = tl.where((bits >> KEEP) & 1 == 1, value, 0.0)
        tl.store(out + row * columns + column + half, value, mask=(at < count) & (column + half < columns))


def decode(words: Tensor, largest: float, columns: int, slot: int) -> Tensor:
    """One slot of words [..., rows, words]: [..., rows, columns] float32, exact before it is rounded to bfloat16."""
    words = words.contiguous()
    out = torch.empty(*words.shape[:-1], columns, dtype=torch.float32, device=words.device)
    grid = (triton.cdiv(words.numel(), BLOCK),)
    _decode[grid](
        words, out, largest, words.numel(), words.shape[-1], columns, SIGN[slot], KEEP[slot], HALF_STEP, BLOCK
    )
    return out
