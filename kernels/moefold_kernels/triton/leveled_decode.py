"""The few-bit pair formats to bf16 operands in registers, on Hopper: PTX for four positions of a row at a time.

A thread of a product holds columns 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of every 16 (t: its number in a group of four), so
byte t of each of two words: one `prmt` gathers its four nibbles in 16 bits, and they are selectors at once. A state
looks up the high byte of +2, -2 or 0 for each slot; magnitudes come as layout_pairs.py says, exactly as the definition
rounds them: the level times the scale, rounded once. Their product is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl

from moefold_kernels import layout, layout_pairs
from moefold_kernels.layout_pairs import ALONE

_PLUS, _MINUS = 0x40, 0xC0  # high bytes of +2 and -2


def _signs(slot: int) -> tuple[str, str]:
    """The table of states for a slot: eight bytes, in two registers."""
    codes = []
    for state in range(2 * ALONE):
        shared, own = state < ALONE, (state - ALONE) >> 1 == slot
        negative = state >> (slot if shared else 0) & 1
        codes.append((_MINUS if negative else _PLUS) if shared or own else 0)
    return tuple("0x" + bytes(reversed(codes[i : i + 4])).hex().upper() for i in (0, 4))  # type: ignore[return-value]


def _join(shift: int, low: str, mask: int) -> str:
    """PTX of selectors c: the bits `mask` of `low`, and above them the level bits of `a`, moved by `shift`."""
    top = 0x8888 >> shift
    return f"""
    shr.u32 d, a, {shift};
    and.b32 d, d, 0x{top:04X};
    lop3.b32 c, {low}, 0x{mask:04X}, d, 0xEA;"""


def _look_up(found: tuple[str, str], tables: Sequence[str]) -> str:
    """PTX of bf16 of four positions in two registers, by selectors c in tables of high bytes and of low bytes."""
    return f"""
    prmt.b32 high, {tables[0]}, {tables[1]}, c;
    prmt.b32 less, {tables[2]}, {tables[3]}, c;
    prmt.b32 {found[0]}, less, high, 0x5140;
    prmt.b32 {found[1]}, less, high, 0x7362;"""


_SCALED = """
    mul.rn.bf16x2 m, m, {0};
    mul.rn.bf16x2 n, n, {0};"""


def _magnitudes(format: str, low: Sequence[str], scale: str, tables: Sequence[str]) -> str:
    """PTX of m and n: the magnitudes of four positions, scaled; `a` holds their nibbles."""
    if format == "pair4":  # the two levels come scaled; a mask for each half by the sign of a byte
        return f"""
    shl.b32 b, a, 4;
    prmt.b32 m, a, b, 0x88CC;
    prmt.b32 n, a, b, 0x99DD;
    lop3.b32 m, m, {tables[1]}, {tables[0]}, 0xCA;
    lop3.b32 n, n, {tables[1]}, {tables[0]}, 0xCA;"""
    if format == "pair8":  # begin + i * step; 0x43.. is 128 + i
        return f"""
    prmt.b32 b, {low[0]}, {low[1]}, $GATHER;
    shr.u32 c, b, 2;{_join(1, "c", 0x3333)}{_look_up(("m", "n"), tables[:4])}{_look_up(("x", "y"), tables[4:])}
    and.b32 b, b, 0x3333;
    prmt.b32 b, numbers, b, b;
    prmt.b32 c, b, plus, 0x5140;
    prmt.b32 d, b, plus, 0x5342;
    add.rn.bf16x2 c, c, minus;
    add.rn.bf16x2 d, d, minus;
    fma.rn.bf16x2 m, c, x, m;
    fma.rn.bf16x2 n, d, y, n;""" + _SCALED.format(scale)
    bits = layout_pairs.low_bits(format)
    own = _join(3 - bits, "b", {1: 0x1111, 2: 0x3333}[bits])
    return f"""
    shr.u32 b, {low[0]}, {bits};
    prmt.b32 b, {low[0]}, b, $GATHER;{own}{_look_up(("m", "n"), tables)}""" + _SCALED.format(scale)


TABLES = {"pair4": 2, "pair5": 4, "pair6": 4, "pair8": 8}
"""Registers that a row's levels take: two scaled levels; high bytes of eight, low bytes; those of pieces and steps."""
LOWS = {"pair4": 0, "pair5": 1, "pair6": 1, "pair8": 2}
"""Words of the plane `low` for 16 columns (pair5's is moved to them before)."""


def assembly(format: str, slots: int) -> str:
    """PTX of four positions: for each slot two registers of two operands.

    Operands: the results; two words; `prmt`'s selector of the thread's bytes; words of `low`; the scale twice in a
    register (not for pair4); for one slot its two tables of signs; the row's levels.
    """
    names = iter(f"${number}" for number in range(2 * slots, 99))
    words, gather = [next(names), next(names)], next(names)
    low = [next(names) for _ in range(LOWS[format])]
    scale = "" if format == "pair4" else next(names)
    signs = [next(names), next(names)] if slots == 1 else []
    tables = [next(names) for _ in range(TABLES[format])]
    return block(format, [f"${number}" for number in range(2 * slots)], words, gather, low, scale, signs, tables)


def block(
    format: str,
    results: Sequence[str],
    words: Sequence[str],
    gather: str,
    low: Sequence[str],
    scale: str,
    signs: Sequence[str],
    tables: Sequence[str],
) -> str:
    """The same with names of one's own for the operands."""
    each = [tuple(signs)] if signs else [_signs(slot) for slot in range(layout.SLOTS)]
    lines = _magnitudes(format, low, scale, tables).replace("$GATHER", gather)
    for slot, (shared, alone) in enumerate(each):
        lines += f"""
    mov.b32 x, {shared};
    mov.b32 y, {alone};
    prmt.b32 high, x, y, s;
    prmt.b32 x, high, none, 0x1404;
    prmt.b32 y, high, none, 0x3424;
    mul.rn.bf16x2 {results[2 * slot]}, x, m;
    mul.rn.bf16x2 {results[2 * slot + 1]}, y, n;"""
    return f"""{{
    .reg .b32 a, b, c, d, s, m, n, x, y, high, less, none, numbers, plus, minus;
    mov.b32 none, 0;
    mov.b32 numbers, 0x03020100;
    mov.b32 plus, 0x43434343;
    mov.b32 minus, 0xC300C300;
    prmt.b32 a, {words[0]}, {words[1]}, {gather};
    and.b32 s, a, 0x7777;{lines}
    }}"""


def constraints(format: str, slots: int) -> str:
    """Of `assembly`, as Triton wants them."""
    given = 3 + LOWS[format] + (format != "pair4") + 2 * (slots == 1) + TABLES[format]
    return ",".join(["=r"] * 2 * slots + ["r"] * given)


SLOT_SIGNS = tl.constexpr(tuple(int(code, 16) for slot in range(layout.SLOTS) for code in _signs(slot)))
