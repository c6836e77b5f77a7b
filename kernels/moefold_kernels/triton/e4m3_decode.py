"""The few-bit pair formats to e4m3 operands in registers, on Hopper: PTX for a word, which is eight positions of a row.

An operand register is four e4m3 numbers, so four selectors of one `prmt` make one: the nibbles of a word as they lie.
States look up a sign and a mask of magnitude bits, or nothing, for each slot; a second byte, the same for both slots,
is the level's magnitude with its highest bit set, and the operand is the AND of the two:

    pair4          `prmt` of (words) repeats a byte's sign where the level's bit, a nibble's fourth, is set: 0xFF; else
                   it is the lower level's byte, all of whose bits the upper level's (what states look up) has
    pair5, pair6   the levels' bytes are a table of eight, and (low, words) its selectors
    pair8          a level's number is its byte: four bits of (low), and a fifth of (words) as in pair4

Scales are not in an operand: they multiply sums of 64 columns (e4m3.py). Eight positions and both slots take 13
instructions (pair4), 17 (pair5, pair6) and 16 (pair8), where bf16 operands (leveled_decode.py) take 33 to 38.
"""

from __future__ import annotations

from collections.abc import Sequence

LOWS = {"pair4": 0, "pair5": 1, "pair6": 1, "pair8": 1}
"""Words of `low` for eight positions; pair5's and pair6's are moved so that a position's bits are the lowest."""
TABLES = {"pair4": 1, "pair5": 2, "pair6": 2, "pair8": 2}
"""Registers of levels (levels.e4m3_table): constants come from memory, too, or ptxas makes them anew at each use."""
_LOW_MASK = {"pair5": 0x11111111, "pair6": 0x33333333}


def _magnitudes(format: str, word: str, low: str, tables: Sequence[str]) -> str:
    """PTX of m and n: magnitudes of four positions each, their highest bits set. `h` is the upper half of the word."""
    if format == "pair4":
        return f"""
    prmt.b32 m, {tables[0]}, {tables[0]}, {word};
    prmt.b32 n, {tables[0]}, {tables[0]}, h;"""
    if format == "pair8":
        return f"""
    prmt.b32 m, {tables[0]}, {tables[0]}, {word};
    prmt.b32 n, {tables[0]}, {tables[0]}, h;
    shr.u32 b, {low}, 4;
    lop3.b32 c, {low}, 0x0F0F0F0F, {tables[1]}, 0xEA;
    lop3.b32 d, b, 0x0F0F0F0F, {tables[1]}, 0xEA;"""
    mask = _LOW_MASK[format]
    shift, top = {"pair5": (2, 0x22222222), "pair6": (1, 0x44444444)}[format]
    return f"""
    shr.u32 a, {word}, {shift};
    and.b32 a, a, 0x{top:08X};
    lop3.b32 a, {low}, 0x{mask:08X}, a, 0xEA;
    shr.u32 b, a, 16;
    prmt.b32 m, {tables[0]}, {tables[1]}, a;
    prmt.b32 n, {tables[0]}, {tables[1]}, b;"""


def assembly(format: str, slots: int) -> str:
    """PTX of eight positions: for each slot two registers of four operands, in their order.

    Operands: the results; a word; a word of `low` (LOWS); a row's registers of levels (TABLES); the two of each slot's
    `levels.state_table`.
    """
    names = iter(f"${number}" for number in range(2 * slots, 99))
    word = next(names)
    low = next(names) if LOWS[format] else ""
    tables = [next(names) for _ in range(TABLES[format])]
    states = [(next(names), next(names)) for _ in range(slots)]
    lines = _magnitudes(format, word, low, tables)
    for slot, (first, second) in enumerate(states):
        for half, (state, magnitude, digits) in enumerate((("s", "m", "c"), ("z", "n", "d"))):
            result = f"${2 * slot + half}"
            lines += f"""
    prmt.b32 t, {first}, {second}, {state};"""
            lines += (
                f"""
    lop3.b32 {result}, t, {magnitude}, {digits}, 0x80;"""
                if format == "pair8"
                else f"""
    and.b32 {result}, t, {magnitude};"""
            )
    return f"""{{
    .reg .b32 a, b, c, d, h, m, n, s, t, z;
    and.b32 s, {word}, 0x77777777;
    shr.u32 z, s, 16;
    shr.u32 h, {word}, 16;{lines}
    }}"""


def constraints(format: str, slots: int) -> str:
    """Of `assembly`, as Triton wants them."""
    given = 1 + LOWS[format] + TABLES[format] + 2 * slots
    return ",".join(["=r"] * 2 * slots + ["r"] * given)
