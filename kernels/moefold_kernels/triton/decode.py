"""Words to bf16 operands in registers: the inner step of every kernel that reads packed experts.

Bits 15 .. 0 of an operand are: sign, 0, keep, 0, the exponent field, the fraction, each where the word has it (those of
slot 1 a bit further left). The keep bit adds 64 to a bf16's exponent, so that what a slot keeps is the weight times
2 ** (64 - low), exactly, and the accumulator is scaled back once per tile (`rescale`). What a slot does not keep is not
zero but 2 ** -64 of what it would be: as exponents of a window are at most 31 apart, less than 2 ** -32 of the smallest
weight that could be kept, which no sum in float32 shows beside weights that are.

Slot 0 takes one logical operation for two words, slot 1 a shift and two, of which both slots share one; a slot that a
program learns when it runs takes a product, which has a pipe of its own, or a shift, and two. With true zeros, as the
product of the magnitude with sign and keep bit as bf16, that was four instructions instead of three (docs/kernels.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moefold_kernels import layout

RESTORE = tl.constexpr(2.0**32)
"""Part of the factor that undoes an operand's, 2 ** (low - 64), which as one number may be too large for float32."""


def _twice(bits: int) -> str:
    """A constant for both words of a 32-bit register."""
    return f"0x{bits << 16 | bits:08X}"


_OWN_BITS = 1 << layout.SIGN_SHIFT[0] | 1 << layout.KEEP_SHIFT[0]
_MASKS = {
    "magnitude": _twice(layout.MAGNITUDE_BITS),
    "own": _twice(_OWN_BITS),
    "first": _twice(layout.MAGNITUDE_BITS | _OWN_BITS),
}

BOTH = tl.constexpr(
    """{{
    .reg .b32 magnitude, other;
    and.b32 $0, $2, {first};
    and.b32 magnitude, $2, {magnitude};
    shl.b32 other, $2, 1;
    lop3.b32 $1, other, {own}, magnitude, 0xEA;
    }}""".format(**_MASKS)
)
"""PTX: two words in $2 to the operands of slot 0 in $0 and of slot 1 in $1."""

SLOT = tl.constexpr(
    """{{
    .reg .b32 kept, slot;
    mov.u32 slot, %ctaid.x;
    and.b32 slot, slot, 1;
    shl.b32 kept, $1, slot;
    and.b32 kept, kept, {own};
    lop3.b32 $0, $1, {magnitude}, kept, 0xEA;
    }}""".format(**_MASKS)
)
"""PTX: two words in $1 to the operands in $0 of the slot that is the lowest bit of the program number."""

_MAGNITUDE = tl.constexpr(layout.MAGNITUDE_BITS)
_OWN = tl.constexpr(_OWN_BITS)
_MAGNITUDES = tl.constexpr(layout.MAGNITUDE_BITS * 0x10001)
_OWNS = tl.constexpr(_OWN_BITS * 0x10001 - 2**32)
"""Both for two words, as an int32."""


@triton.jit
def decode_both(words, ASM: tl.constexpr):
    """Both slots' operands (bf16, shape of `words`, an int16 tile)."""
    if ASM:
        first, second = tl.inline_asm_elementwise(
            BOTH,
            "=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        first, second = _operand(words, 0), _operand(words, 1)
    return first, second


@triton.jit
def decode_slot(words, slot, ASM: tl.constexpr):
    """One slot's operand. The assembly takes `slot` from where project.py put it: the lowest bit of the program number.

    As an operand it would be a tensor, which keeps Triton from loading words in the layout of the product (they would
    go through shared memory twice); two loops in one kernel make ptxas wait for every single product.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            SLOT,
            "=r,r",
            [words],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return _operand(words, slot)


@triton.jit
def decode_cell(cells, slot):
    """The operands of a slot (0 or 1, an int32) of two words an integer, two an integer as well.

    Multiplied, not shifted: products have a pipe of their own, shifts share that of the logical operations.
    """
    return cells & _MAGNITUDES | (cells * (1 + slot)) & _OWNS


@triton.jit
def _operand(words, slot):
    """The same in plain Triton, for the interpreter and for devices without this assembly."""
    bits = words.to(tl.int32)
    operand = bits & _MAGNITUDE | (bits << slot) & _OWN
    return operand.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rescale(accumulator, shift):
    """The accumulator of a matrix whose operands are to be multiplied by 2 ** 32 and by `shift` = 2 ** (low - 96)."""
    return accumulator * RESTORE * shift
