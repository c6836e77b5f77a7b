"""The few-bit pair formats to bf16 operands in registers, on Hopper: PTX for a word, which is eight positions of a row.

A bf16 number is two bytes, so two look-ups of four positions each and one `prmt` that puts bytes side by side make two
operand registers; nibbles of a word are the look-ups' selectors as they lie. Positions 0 and 2, 1 and 3, ... of a word
share a register: they are neighbours among columns (layout_pairs.ORDER).

    pair4, pair5, pair6   high and low bytes of the levels are tables of eight. The high byte gets the state's sign and
                          is dropped where the state drops the position; then the level is multiplied by the row's
                          scale, as the definition rounds it. What is dropped keeps its level's low byte, as a number
                          below 2 ** -125, times the scale
    pair8                 a level's number n is the byte of an fp8 number (eighths.py), and n * 16 the bits of a bf16
                          number: 2 ** -120 of it. Its low byte is four bits of (low) in the upper nibble, or nothing
                          where the state drops the position; its high byte the fifth bit and the sign, or nothing
                          (`prmt` of (words) repeats 0xFE's sign where a nibble's fourth bit is set: 0xFF, else 0xFE).
                          For both slots the number is made once, without sign, and each slot multiplies it by 2, -2 or
                          0: the high byte of that is looked up by the state, and the low one is a selector with its
                          fourth bit set, which repeats the sign of 2

Eight positions take 17 (pair4) and 18 (the others) integer instructions for one slot, 25 (pair4, pair8) and 26 for
both, and four multiplications a slot (pair8 four more for both). Looked up and masked for each slot, both took pair8
30. Four positions at a time, of words that all four threads of a row had to read, took 20 to 44, and 4 to 16
multiplications (docs/kernel-log.md).
"""

from __future__ import annotations

from collections.abc import Sequence

LOWS = {"pair4": 0, "pair5": 1, "pair6": 1, "pair8": 1}
"""Words of `low` for eight positions; pair5's and pair6's are moved so that a position's bits are the lowest."""
TABLES = 4
"""Registers of levels (levels.operand_table): high bytes of eight, low bytes; of pair8 two of what one slot keeps."""
EVEN, ODD = 0, 1
"""Of the two registers of four positions: that of positions 0 and 2, that of 1 and 3."""
_LOW_MASK = {"pair5": 0x11111111, "pair6": 0x33333333}
_TOP = {"pair4": (3, 0x11111111), "pair5": (2, 0x22222222), "pair6": (1, 0x44444444)}
"""How far the nibbles' fourth bits are moved to be the highest bits of selectors, and their mask."""
_BY_SIGN = 0xA8
"""`lop3`'s (a | b) & c: a number, its sign bits set, and what a state keeps of it."""
_PRODUCT = "mul.rn.bf16x2 {result}, m, {scale}"
_PRODUCT_OF_AMPERE = "fma.rn.bf16x2 {result}, m, {scale}, e"
"""The same where there is no multiplication of two bf16 numbers; `e` is zero, with its sign set."""
SCALE_EXPONENT = 64
"""pair8's scales are given times two to this, so that products with numbers near 2 ** -125 are no subnormal ones (for
scales from 2 ** -60 on); scales have to be below 2 ** 64."""
NUMBERS = 2.0 ** (120 - SCALE_EXPONENT)
"""What pair8's products of numbers and scales have to be multiplied with, beside the factor (levels.FACTOR)."""


def tables_of(format: str, slots: int) -> int:
    """How many registers of TABLES the assembly takes."""
    if format != "pair8":
        return TABLES
    return 2 if slots == 1 else 0


def _selectors(format: str, word: str, low: str) -> str:
    """PTX of c and d: selectors of levels of the word's first four positions and of the others."""
    shift, top = _TOP[format]
    lines = f"""
    and.b32 s, {word}, 0x77777777;
    shr.u32 z, s, 16;
    shr.u32 c, {word}, {shift};
    and.b32 c, c, 0x{top:08X};"""
    if format in _LOW_MASK:
        lines += f"""
    lop3.b32 c, {low}, 0x{_LOW_MASK[format]:08X}, c, 0xEA;"""
    return (
        lines
        + """
    shr.u32 d, c, 16;"""
    )


def _levels(scale: str, tables: Sequence[str], slots: Sequence[tuple[str, str]]) -> str:
    """PTX for pair4, pair5 and pair6 behind _selectors; without a scale, levels."""
    lines = f"""
    prmt.b32 a, {tables[0]}, {tables[1]}, c;
    prmt.b32 b, {tables[0]}, {tables[1]}, d;
    prmt.b32 c, {tables[2]}, {tables[3]}, c;
    prmt.b32 d, {tables[2]}, {tables[3]}, d;"""
    for slot, (first, second) in enumerate(slots):
        for four, (state, high, less) in enumerate((("s", "a", "c"), ("z", "b", "d"))):
            lines += f"""
    prmt.b32 t, {first}, {second}, {state};
    lop3.b32 t, {high}, 0x80808080, t, 0x{_BY_SIGN:02X};"""
            for half, bytes_of in ((EVEN, 0x6240), (ODD, 0x7351)):
                result = f"${4 * slot + 2 * four + half}"
                lines += f"""
    prmt.b32 {"x" if scale else result}, {less}, t, 0x{bytes_of:04X};"""
                if scale:
                    lines += f"""
    mul.rn.bf16x2 {result}, x, {scale};"""
    return lines


def _numbers(
    word: str, scale: str, low: str, tables: Sequence[str], slots: Sequence[tuple[str, str]], multiply: str = _PRODUCT
) -> str:
    """PTX for pair8, of one slot."""
    ((first, second),) = slots
    lines = f"""
    and.b32 s, {word}, 0x77777777;
    shr.u32 z, s, 16;
    shr.u32 d, {word}, 16;
    mov.b32 t, 0xFEFEFEFE;
    prmt.b32 c, t, t, {word};
    prmt.b32 d, t, t, d;
    shl.b32 a, {low}, 4;"""
    for four, (state, fifth, less) in enumerate((("s", "c", "a"), ("z", "d", low))):
        lines += f"""
    prmt.b32 t, {first}, {second}, {state};
    prmt.b32 x, {tables[0]}, {tables[1]}, {state};
    and.b32 t, t, {fifth};
    and.b32 x, x, {less};"""
        for half, bytes_of in ((EVEN, 0x6240), (ODD, 0x7351)):
            lines += f"""
    prmt.b32 m, x, t, 0x{bytes_of:04X};
    {multiply.format(result=f"${2 * four + half}", scale=scale)};"""
    return lines


def _numbers_of_both(word: str, scale: str, low: str, slots: Sequence[tuple[str, str]]) -> str:
    """PTX for pair8, of both slots: s and x select factors of even and odd positions, z and y of the other four's."""
    lines = f"""
    shl.b32 s, {word}, 4;
    lop3.b32 s, s, 0x70707070, 0x08080808, 0xEA;
    lop3.b32 x, {word}, 0x70707070, 0x08080808, 0xEA;
    shr.u32 z, s, 16;
    shr.u32 y, x, 16;
    shr.u32 d, {word}, 16;
    mov.b32 t, 0xFEFEFEFE;
    prmt.b32 c, t, t, {word};
    prmt.b32 d, t, t, d;
    shl.b32 a, {low}, 4;
    and.b32 a, a, 0xF0F0F0F0;
    and.b32 b, {low}, 0xF0F0F0F0;
    and.b32 c, c, 0x01010101;
    and.b32 d, d, 0x01010101;"""
    for four, (fifth, less, states) in enumerate((("c", "a", ("s", "x")), ("d", "b", ("z", "y")))):
        for half, (state, bytes_of) in enumerate(zip(states, (0x6240, 0x7351), strict=True)):
            lines += f"""
    prmt.b32 m, {less}, {fifth}, 0x{bytes_of:04X};
    mul.rn.bf16x2 m, m, {scale};"""
            for slot, (first, second) in enumerate(slots):
                lines += f"""
    prmt.b32 t, {first}, {second}, {state};
    mul.rn.bf16x2 ${4 * slot + 2 * four + half}, m, t;"""
    return lines


def assembly(format: str, slots: int, scaled: bool = True) -> str:
    """PTX of eight positions: for each slot, of the first four and of the others, the registers EVEN and ODD.

    Not `scaled`, of one slot, they are levels, or pair8's numbers times two to SCALE_EXPONENT, as its scales are given.

    Operands: the results; a word; a word of `low` (LOWS); the row's scale twice in a register (`scale_assembly`); the
    row's registers of levels (tables_of); the two of each slot's states (levels.operand_table), or for both slots of
    pair8 those of levels.factor_table.
    """
    names = iter(f"${number}" for number in range(4 * slots, 99))
    word = next(names)
    low = next(names) if LOWS[format] else ""
    scale = next(names) if scaled else "f" if format == "pair8" else ""
    tables = [next(names) for _ in range(tables_of(format, slots))]
    states = [(next(names), next(names)) for _ in range(slots)]
    if format != "pair8":
        lines = _selectors(format, word, low) + _levels(scale, tables, states)
    elif slots == 1:
        lines = _numbers(word, scale, low, tables, states)
        if not scaled:
            lines = f"""
    mov.b32 e, 0x80008000;
    mov.b32 f, {_twice(SCALE_EXPONENT)};"""
            lines += _numbers(word, scale, low, tables, states, _PRODUCT_OF_AMPERE)
    else:
        lines = _numbers_of_both(word, scale, low, states)
    return f"""{{
    .reg .b32 a, b, c, d, e, f, m, s, t, x, y, z;{lines}
    }}"""


def constraints(format: str, slots: int, scaled: bool = True) -> str:
    """Of `assembly`, as Triton wants them."""
    given = 1 + scaled + LOWS[format] + tables_of(format, slots) + 2 * slots
    return ",".join(["=r"] * 4 * slots + ["r"] * given)


def scale_assembly(format: str, group: int, slots: int) -> str:
    """PTX: of the two scales in $1 the first or the second one, twice; for pair8 times 2 ** SCALE_EXPONENT.

    Or half of that, where both slots' factors are 2 or -2.
    """
    twice = f"prmt.b32 $0, $1, $1, 0x{(0x1010, 0x3232)[group]:04X};"
    if format != "pair8":
        return twice
    return f"""{{
    .reg .b32 s, f;
    mov.b32 f, {_twice(SCALE_EXPONENT - (slots - 1))};
    prmt.b32 s, $1, $1, 0x{(0x1010, 0x3232)[group]:04X};
    mul.rn.bf16x2 $0, s, f;
    }}"""


def _twice(exponent: int) -> str:
    """Two to that, as two bf16 numbers in a register."""
    bits = 127 + exponent << 7
    return f"0x{bits << 16 | bits:08X}"
