"""The few-bit pair formats to bf16 operands in plain Triton: for the interpreter, and for GPUs other than Hopper.

`row` [ROWS] int64 are numbers of rows over all units; `planes` is (words, low, scale, pointers [ROWS] to a matrix's
integers of levels.row_tables, columns, column to begin at), with contiguous planes, by rows or in BANDS, as
layout_pairs.py has them. (A constant in a tuple would be a variable to the function that gets it.)
Every element is addressed by itself, so any number of columns goes; leveled.py is the fast way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moefold_kernels import layout_pairs
from moefold_kernels.levels import BITS as BITS_AT
from moefold_kernels.levels import INTEGERS

TABLE = tl.constexpr(INTEGERS)
"""Integers of a matrix (levels.py)."""
BITS = tl.constexpr(BITS_AT)
"""Where among them the levels' bf16 bits are."""


BAND, STEP = tl.constexpr(layout_pairs.BAND), tl.constexpr(layout_pairs.STEP)
"""Rows of a band, and columns of its pieces."""


@triton.jit
def _position(column):
    """layout_pairs.ORDER's position of a column, within all."""
    place = column % 64
    low = place % 2 * 2 + place // 8 % 2  # e, h
    return column - place + place % 8 // 2 * 16 + place // 32 * 8 + place // 16 % 2 * 4 + low


@triton.jit
def _at(row, column, groups, GROUP: tl.constexpr, ACROSS: tl.constexpr, BANDS: tl.constexpr):
    """Where the words of positions (`column`: layout_pairs.ORDER's) are: a word has ACROSS, and 64 have GROUP words."""
    if BANDS:
        piece = row // BAND * (groups // 2) + column // STEP
        at = (piece * BAND + row % BAND) * (2 * GROUP) + column % STEP // ACROSS
    else:
        at = row * (GROUP * groups) + column // ACROSS
    return at


@triton.jit
def _fields(row, planes, column, inside, LOW: tl.constexpr, BANDS: tl.constexpr):
    """States, and the bits of levels times scales, bf16: int32 [ROWS, columns]; what is not inside is finite."""
    words, low, scale, levels, columns, begin = planes
    column += begin
    groups = (columns + 63) // 64
    inside, column, row = inside[None, :], _position(column)[None, :], row[:, None]
    nibble = tl.load(words + _at(row, column, groups, 8, 8, BANDS), mask=inside, other=0) >> 4 * (column % 8) & 15
    number = nibble >> 3 << LOW
    if LOW > 0:
        across: tl.constexpr = 32 // LOW  # positions a word
        word = tl.load(low + _at(row, column, groups, 2 * LOW, across, BANDS), mask=inside, other=0)
        first = 8 * (column % 4) + column % 8 // 4 * 4 if LOW == 4 else 4 * (column % 8) + LOW * (column % across // 8)
        number |= word >> first & (1 << LOW) - 1
    level = (tl.load(levels[:, None] + BITS + number) << 16).to(tl.float32, bitcast=True)
    bits = tl.load(scale + _at(row, column, groups, 1, 64, BANDS), mask=inside, other=0).to(tl.int32)
    product = (level * (bits << 16).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return nibble & 7, product + 0x7FFF + (product >> 16 & 1) >> 16  # to nearest even: the interpreter cuts bits off


@triton.jit
def _signed(state, magnitude, slot):
    """What a slot reads, of states and magnitudes."""
    shared = state < 4
    negative = tl.where(shared, state >> slot, state) & 1
    kept = shared | ((state >> 1 & 1) == slot)
    bits = tl.where(kept, magnitude | negative << 15, 0)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def levels_slot(row, planes, column, inside, slot, LOW: tl.constexpr, BANDS: tl.constexpr):
    """One slot's operands."""
    state, magnitude = _fields(row, planes, column, inside, LOW, BANDS)
    return _signed(state, magnitude, slot)


@triton.jit
def levels_both(row, planes, column, inside, LOW: tl.constexpr, BANDS: tl.constexpr):
    """Both slots' operands."""
    state, magnitude = _fields(row, planes, column, inside, LOW, BANDS)
    return _signed(state, magnitude, 0), _signed(state, magnitude, 1)
