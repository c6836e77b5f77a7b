"""Where each bit of the few-bit pair formats is: pair4, pair5, pair6 and pair8, version 1.

A position of a pair of experts is a state of 3 bits, which signs the experts read with and which of them reads it at
all, and a magnitude of b = 1, 2, 3 or 5 bits, a number of a level. A magnitude is levels[number] times a bf16 scale,
which 64 consecutive columns of a row share, and so do both experts; there is no zero.

    state  0 .. 3   both experts read it: bit 0 is the sign of slot 0, bit 1 that of slot 1
           4, 5     slot 0 alone, with the sign in bit 0
           6, 7     slot 1 alone, with the sign in bit 0

Words have 32 bits and hold consecutive columns of one row, in two planes. The nibble plane, `words`, is the same in
every format: the state and the level's highest bit, eight columns a word,

    31 .. 28     ...     7 .. 4       3       2 .. 0
    column 7     ...     column 1     level   state      (of column 0)

and the plane of the w = b - 1 other bits, `low` (pair4 has none), has 32 / w columns a word. Column c of a word begins
at bit 4 * (c % 8) + w * (c // 8), so that nibble i always belongs to a column 8 j + i:

    pair5, w = 1     nibble i: columns i, 8 + i, 16 + i, 24 + i from its lowest bit up
    pair6, w = 2     nibble i: columns i (bits 1, 0) and 8 + i (bits 3, 2)
    pair8, w = 4     nibble i: column i

Why: `prmt` looks four bytes up in a table of eight by the lower three bits of four nibbles, and the table is two
registers. So `words & 0x77777777` are selectors of states as they are, of a table of bf16 high bytes for +1, -1 and 0
for each slot; and `(low >> w * j) & 0x33333333 | (words >> 1) & 0x44444444` are selectors of eight levels for pair6,
with masks 0x11111111 and (words >> 2) & 0x22222222 for pair5, and 0x11111111 of words >> 3 for pair4. Two look-ups
give the two bytes of four levels. The 32 levels of pair8 lie on eight straight pieces of four (`pieces`): the upper
three bits of a number (low >> 2 & 0x33333333 | words >> 1 & 0x44444444) look up where a piece begins and its step,
and one fused multiply-add with the lower two (low & 0x33333333) gives the level, exactly as stored.

Rows are padded to whole groups of 64 columns with clear bits, which decode to what nobody asked for: readers cut. So
each plane's rows are multiples of 8 bytes (the nibble plane's: of 32), and a split between groups cuts no word.
"""

from __future__ import annotations

from moefold_kernels.errors import FormatError

MAGNITUDE_BITS = {"pair4": 1, "pair5": 2, "pair6": 3, "pair8": 5}
"""Format -> the bits b of a level's number."""

GROUP = 64
"""Columns of a row that share a scale."""

WORD = 32
NIBBLE = 4
STATE_BITS = 3
ALONE = 4
"""The state from which on one slot alone reads: this plus twice the slot, plus its sign."""

PIECES, PER_PIECE = 8, 4
"""Of the levels of pair8."""


def magnitude_bits(format: str) -> int:
    """The bits of a level's number in one of the formats; raises FormatError for another."""
    if format not in MAGNITUDE_BITS:
        raise FormatError(f"format {format!r} is none of {', '.join(MAGNITUDE_BITS)}")
    return MAGNITUDE_BITS[format]


def low_bits(format: str) -> int:
    """Bits of a level's number in the plane `low`: 0 where there is no such plane."""
    return magnitude_bits(format) - 1


def groups(columns: int) -> int:
    """How many scales a row of so many columns has."""
    return -(-columns // GROUP)


def word_columns(columns: int, bits: int) -> int:
    """The width of a plane of so many bits a position, in 32-bit words."""
    return groups(columns) * GROUP * bits // WORD


def shapes(format: str, rows: int, columns: int) -> dict[str, tuple[int, int]]:
    """The planes and scales of one matrix of a pair: `words`, `low` where there is one, and `scale`."""
    found = {"words": (rows, word_columns(columns, NIBBLE))}
    if low_bits(format):
        found["low"] = (rows, word_columns(columns, low_bits(format)))
    return found | {"scale": (rows, groups(columns))}


def size(format: str, rows: int, columns: int) -> int:
    """Bytes of one matrix of a pair, scales included."""
    each = {"words": 4, "low": 4, "scale": 2}
    return sum(each[name] * height * width for name, (height, width) in shapes(format, rows, columns).items())
