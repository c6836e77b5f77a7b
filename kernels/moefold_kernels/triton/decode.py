"""Words to bf16 operands in registers: the inner step of every kernel that reads packed experts.

For each slot kept, bits 15 .. 0 of an operand are: sign, 0, then the exponent field plus 33, then the fraction. So an
operand is the weight times 2 ** (33 - low), exactly, and the accumulator is scaled back once per tile (`rescale`).

Why 33: with KEEP_BITS set, the low twelve bits of a word are a bf16 of exponent 96 + field. The sign and keep bit alone
(bits 15 and 13 after a shift by the slot) are a bf16 of +-2 ** (64 - 127), or zero where the slot is not kept. Their
product is exact (a power of two), has the sign, and is zero where it must be: two 32-bit logical operations and one
packed multiplication a slot and two words, and the logical operations that make the magnitudes are shared by both
slots. Masks by sign-replicating `prmt` took ten integer operations for both slots; this takes three, a shift, and two
multiplications in a pipe that is idle otherwise (counted in the machine code for sm_90).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moefold_kernels import layout

FIELD_BIAS = tl.constexpr(33)
"""An operand's biased exponent minus its word's exponent field."""

RESTORE = tl.constexpr(2.0**63)
"""What undoes the factor of the sign and keep bit."""


def _twice(bits: int) -> str:
    """A constant for both words of a 32-bit register."""
    return f"0x{bits << 16 | bits:08X}"


_MASKS = {
    "magnitude": _twice(layout.MAGNITUDE_BITS),
    "keep": _twice(layout.KEEP_BITS),
    "own": _twice(1 << layout.SIGN_SHIFT[0] | 1 << layout.KEEP_SHIFT[0]),
}

BOTH = tl.constexpr(
    """{{
    .reg .b32 magnitude, own, other, none;
    mov.b32 none, 0x80008000;
    lop3.b32 magnitude, $2, {magnitude}, {keep}, 0xEA;
    and.b32 own, $2, {own};
    fma.rn.bf16x2 $0, magnitude, own, none;
    shl.b32 other, $2, 1;
    and.b32 other, other, {own};
    fma.rn.bf16x2 $1, magnitude, other, none;
    }}""".format(**_MASKS)
)
"""PTX: two words in $2 to the operands of slot 0 in $0 and of slot 1 in $1."""

SLOT = tl.constexpr(
    """{{
    .reg .b32 magnitude, kept, none, slot;
    mov.b32 none, 0x80008000;
    mov.u32 slot, %ctaid.x;
    and.b32 slot, slot, 1;
    lop3.b32 magnitude, $1, {magnitude}, {keep}, 0xEA;
    shl.b32 kept, $1, slot;
    and.b32 kept, kept, {own};
    fma.rn.bf16x2 $0, magnitude, kept, none;
    }}""".format(**_MASKS)
)
"""PTX: two words in $1 to the operands in $0 of the slot that is the lowest bit of the program number."""

CELL = tl.constexpr(
    """{{
    .reg .b32 magnitude, kept, none;
    mov.b32 none, 0x80008000;
    lop3.b32 magnitude, $1, {magnitude}, {keep}, 0xEA;
    mul.lo.u32 kept, $1, $2;
    and.b32 kept, kept, {own};
    fma.rn.bf16x2 $0, magnitude, kept, none;
    }}""".format(**_MASKS)
)
"""The same of the slot whose power of two is in $2: products have a pipe of their own, shifts share the logical one."""

_MAGNITUDE = tl.constexpr(layout.MAGNITUDE_BITS)
_OFFSET = tl.constexpr(33 << layout.FRACTION_BITS)
_FIRST_KEEP = tl.constexpr(layout.KEEP_SHIFT[0])


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
def decode_cell(cells, slot, ASM: tl.constexpr):
    """The operands of a slot (an int32, or a tensor of them) of two words an integer, two an integer as well."""
    if ASM:
        return tl.inline_asm_elementwise(CELL, "=r,r,r", [cells, 1 << slot], dtype=tl.int32, is_pure=True, pack=1)
    low, high = _operand(cells & 0xFFFF, slot), _operand(cells >> 16 & 0xFFFF, slot)
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | high.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def _operand(words, slot):
    """The same in plain Triton, for the interpreter and for devices without this assembly."""
    bits = words.to(tl.int32)
    kept = (bits << slot) >> _FIRST_KEEP & 1
    sign = (bits << slot) & 0x8000
    operand = (sign | ((bits & _MAGNITUDE) + _OFFSET)) * kept
    return operand.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rescale(accumulator, shift):
    """The accumulator of a matrix whose operands are to be multiplied by 2 ** 63 and by `shift` = 2 ** (low - 96)."""
    return accumulator * RESTORE * shift
