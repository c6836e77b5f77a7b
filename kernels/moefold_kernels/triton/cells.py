"""Weights as integers of 32 bits, and their products with tokens in float32, for by_entry.py.

A cell is two weights of a row: of the 16-bit format's words, or of bfloat16. In a few-bit format it is a word of the
nibble plane, eight weights, with its bits of `low` and its scale. A thread reads cells, makes two bf16 weights a
register of them, and multiplies each with a token's value: no product of tensor cores, so that a program may have as
few rows as fill the device evenly. What that costs is instructions: two to unpack a register and two that multiply,
beside those that decode (decode.py, leveled_decode.py).

Pointers, rows, slots and what is live are [rows, 1] or [1, 1]; cells and what is read [rows, CELLS].
"""

# ruff: noqa: RET505 - without an `else` the compiler looks at what comes behind a constant condition, too

# mypy: disable-error-code="assignment"
# (tuples that grow)

from __future__ import annotations

import triton
import triton.language as tl

from moefold_kernels import layout_pairs
from moefold_kernels.levels import FACTOR
from moefold_kernels.triton import leveled_decode
from moefold_kernels.triton.decode import decode_cell
from moefold_kernels.triton.decode_levels import BAND, BITS, STEP

FACTOR_AT = tl.constexpr(FACTOR)
"""Where among a matrix's integers (levels.py) the factor of e4m3 numbers is."""
NUMBERS = tl.constexpr(leveled_decode.NUMBERS)
"""What pair8's numbers have to be multiplied with beside it, as assembly makes them."""
_PAIR4, _PAIR5, _PAIR6, _PAIR8 = (
    tl.constexpr(leveled_decode.assembly(format, 1, scaled=False)) for format in layout_pairs.MAGNITUDE_BITS
)
_TAKES4, _TAKES5, _TAKES6, _TAKES8 = (
    tl.constexpr(leveled_decode.constraints(format, 1, scaled=False)) for format in layout_pairs.MAGNITUDE_BITS
)


@triton.jit
def cells_of(columns, LOW: tl.constexpr):
    """How many cells a row of so many columns has."""
    return columns // 2 if LOW < 0 else tl.cdiv(columns, 64) * 8


@triton.jit
def planes_of(words, low, scale, unit, rows, first, columns, w_unit, w_row, LOW: tl.constexpr):
    """Where a unit's words, bits of `low` and scales begin, from its row `first` on, of `rows` in a unit (int64)."""
    if LOW < 0:
        return words + unit * w_unit + first * w_row, words, words
    else:
        row, groups = unit * rows + first, tl.cdiv(columns, 64)
        return words + row * (8 * groups), low + row * (2 * LOW * groups), scale + row * groups


@triton.jit
def offsets_of(row, cell, columns, w_row, LOW: tl.constexpr, BANDS: tl.constexpr):
    """Where cells [rows, CELLS] of rows [rows, 1] are behind that: of words, of `low`, of scales."""
    if LOW < 0:
        words = row * w_row + cell
        return words, words, words
    else:
        groups = tl.cdiv(columns, 64)
        # Not written so that the compiler sees what lies side by side: it would read words by 16 bytes, in a layout
        # that neither scales nor tokens can have, and move words, or what is made of them, through shared memory.
        cell = 8 * cell // 8
        if BANDS:
            band, line, piece, within = row // BAND * BAND, row % BAND, cell // 16 * BAND, 8 * cell % STEP // 8
            words = band * (8 * groups) + line * 16 + piece * 16 + within
            low = band * (2 * LOW * groups) + line * (4 * LOW) + piece * (4 * LOW) + within * LOW // 4
            return words, low, band * groups + line * 2 + piece * 2 + within // 8
        else:
            return row * (8 * groups) + cell, row * (2 * LOW * groups) + cell * LOW // 4, row * groups + cell // 8


@triton.jit
def moved(planes, by, N: tl.constexpr):
    """The planes of N units, of 16 bits, so many cells further on."""
    found = ()
    for n in tl.static_range(N):
        found += ((planes[n][0] + by, planes[n][1], planes[n][2]),)
    return found


@triton.jit
def read(planes, offsets, start, inside, LOW: tl.constexpr, BANDS: tl.constexpr):
    """Cells from `start` on (whole STEPs of columns), their words of `low`, and their scales' bits."""
    of_words, of_low, of_scales = offsets
    words, low, scale = planes
    rows: tl.constexpr = BAND if BANDS else 1  # that lie between a row's columns
    if LOW < 0:
        # of no use once read: tokens and activations had better stay near
        word = tl.load(words + start + of_words, mask=inside, other=0, eviction_policy="evict_first")
        return word, word, word
    else:
        word = tl.load(words + start * rows + of_words, mask=inside, other=0)
        bits = tl.load(low + start * LOW // 4 * rows + of_low, mask=inside, other=0) if LOW > 0 else word
        return word, bits, tl.load(scale + start // 8 * rows + of_scales, mask=inside, other=0).to(tl.int32)


@triton.jit
def place_of(column):
    """Where a column of a token is if its values lie as cells' registers take them, group by group of 64.

    Of column 32 s + 16 u + 8 h + 2 t + e that is 16 t + 8 s + 4 u + 2 h + e (layout_pairs.ORDER has e before h).
    """
    pair, half = column % 64 // 2 % 4, column % 64 // 8
    return column // 64 * 64 + 16 * pair + 2 * half + column % 2


@triton.jit
def tokens(
    x, start, cell, rows, inside, length, LOW: tl.constexpr, ORDERED: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """A token's values for cells [rows, CELLS], two an integer: one each, or four (LOW >= 0).

    `x` points to a token of `length` values, in their order, whole groups of 64 or not, or (ORDERED) as `place_of`
    says; `rows` is [rows, 1], and zero: the values come in the layout that words have.
    """
    if LOW < 0:
        found = tl.load(x + start + (cell + rows), mask=inside, other=0)
        return found, found, found, found
    elif ORDERED:
        at = x.to(tl.pointer_type(tl.int64)) + (2 * (start + cell) + rows)
        two, other = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)
        return two.to(tl.int32), (two >> 32).to(tl.int32), other.to(tl.int32), (other >> 32).to(tl.int32)
    else:
        at = (start + cell) // 8 * 32 + cell % 2 * 16 + cell % 8 // 2 + rows
        if WHOLE:
            return (
                tl.load(x + at, mask=inside, other=0), tl.load(x + at + 4, mask=inside, other=0),
                tl.load(x + at + 8, mask=inside, other=0), tl.load(x + at + 12, mask=inside, other=0),
            )  # fmt: skip
        else:
            last = length // 2  # what is behind it is not read
            return (
                tl.load(x + at, mask=inside & (at < last), other=0),
                tl.load(x + at + 4, mask=inside & (at + 4 < last), other=0),
                tl.load(x + at + 8, mask=inside & (at + 8 < last), other=0),
                tl.load(x + at + 12, mask=inside & (at + 12 < last), other=0),
            )  # fmt: skip


@triton.jit
def _pair(sums, weights, x):
    """`sums` and both products of registers of two bf16 numbers each."""
    sums += (weights << 16).to(tl.float32, bitcast=True) * (x << 16).to(tl.float32, bitcast=True)
    high = (weights & -65536).to(tl.float32, bitcast=True)
    return sums + high * (x & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _first(weights, x):
    """Those products alone."""
    high = (weights & -65536).to(tl.float32, bitcast=True) * (x & -65536).to(tl.float32, bitcast=True)
    return high + (weights << 16).to(tl.float32, bitcast=True) * (x << 16).to(tl.float32, bitcast=True)


@triton.jit
def tables_of(levels, slot, LOW: tl.constexpr):
    """Registers of levels and of a slot's states (levels.operand_table)."""
    states = levels + 16 + 8 * slot
    if LOW == 4:
        kept = levels + 8 * slot
        return tl.load(kept), tl.load(kept + 4), tl.load(states), tl.load(states + 4)
    else:
        high, low = (tl.load(levels), tl.load(levels + 4)), (tl.load(levels + 8), tl.load(levels + 12))
        return high[0], high[1], low[0], low[1], tl.load(states), tl.load(states + 4)


@triton.jit
def _eight(word, low, tables, LOW: tl.constexpr):
    """Four registers of two bf16 numbers each: levels with signs, or (pair8) numbers."""
    kinds: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    a, b, c, d = tables[0], tables[1], tables[2], tables[3]
    if LOW == 0:
        given = [word, a, b, c, d, tables[4], tables[5]]
        return tl.inline_asm_elementwise(_PAIR4, _TAKES4, given, kinds, is_pure=True, pack=1)
    elif LOW == 1:
        given = [word, low, a, b, c, d, tables[4], tables[5]]
        return tl.inline_asm_elementwise(_PAIR5, _TAKES5, given, kinds, is_pure=True, pack=1)
    elif LOW == 2:
        given = [word, low, a, b, c, d, tables[4], tables[5]]
        return tl.inline_asm_elementwise(_PAIR6, _TAKES6, given, kinds, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(_PAIR8, _TAKES8, [word, low, a, b, c, d], kinds, is_pure=True, pack=1)


@triton.jit
def _plain(word, low, levels, slot, number: tl.constexpr, LOW: tl.constexpr):
    """One of those registers, for the interpreter and for devices without this assembly; pair8's with its levels."""
    made = word * 0
    for half in tl.static_range(2):
        position: tl.constexpr = number // 2 * 4 + 2 * half + number % 2
        nibble = word >> 4 * position
        level = (nibble >> 3 & 1) << LOW
        if LOW > 0:
            first: tl.constexpr = 8 * (position % 4) + position // 4 * 4 if LOW == 4 else 4 * position
            level |= low >> first & (1 << LOW) - 1
        shared = (nibble & 4) == 0
        kept = shared | ((nibble >> 1 & 1) == slot)
        sign = tl.where(shared, nibble >> slot, nibble) & 1
        bits = tl.where(kept, tl.load(levels + BITS + level) | sign << 15, 0)
        made |= bits << 16 * half
    return made


@triton.jit
def multiplied(
    sums, found, x, cell, levels, tables, slot,
    DENSE: tl.constexpr, LOW: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`sums` [rows, CELLS] and the products of cells that `read` found with `tokens`, of a slot."""
    word, bits, scales = found
    if LOW < 0:
        return _pair(sums, word if DENSE else decode_cell(word, slot), x[0])
    else:
        if LOW == 1 or LOW == 2:
            bits = bits >> LOW * (cell % (4 // LOW))  # cells share a word
        if ASM:
            made = _eight(word, bits, tables, LOW)
        else:
            made = (
                _plain(word, bits, levels, slot, 0, LOW), _plain(word, bits, levels, slot, 1, LOW),
                _plain(word, bits, levels, slot, 2, LOW), _plain(word, bits, levels, slot, 3, LOW),
            )  # fmt: skip
        eight = _pair(_pair(_first(made[0], x[0]), made[1], x[1]), made[2], x[2])
        return sums + _pair(eight, made[3], x[3]) * (scales << 16).to(tl.float32, bitcast=True)


@triton.jit
def numbers(levels, LOW: tl.constexpr, ASM: tl.constexpr):
    """What sums of a few-bit format have to be multiplied with: 1 unless pair8's numbers were summed."""
    if LOW == 4 and ASM:
        return tl.load(levels + FACTOR_AT).to(tl.float32, bitcast=True) * NUMBERS
    else:
        return 1.0
