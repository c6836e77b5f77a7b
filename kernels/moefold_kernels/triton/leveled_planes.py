"""Where a program of leveled.py or e4m3.py finds its part of the planes, and its entries."""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl

from moefold_kernels.triton.leveled_stage import BAND, STEP, low_words, plane_layout, scale_layout


@gluon.jit
def rows_of(first_row, size, w_up, ROWS: gl.constexpr, GATED: gl.constexpr, layout: gl.constexpr):
    """ROWS rows of `size` from a first one; of gate and up as many of each, by eights, up rows `w_up` rows behind."""
    row = gl.arange(0, 2 * ROWS if GATED else ROWS, gl.SliceLayout(1, layout))
    if GATED:
        gate = (first_row + row // 16 * 8 + row % 8) % size
        row = gate + gl.where(row % 16 >= 8, w_up, 0)
    else:
        row = (first_row + row) % size
    return row


@gluon.jit
def in_unit(row, words, WORDS: gl.constexpr):
    """Where within a unit some rows' first WORDS words are, those of a step, of `words` in a whole row."""
    return row // BAND * (BAND * words) + row % BAND * WORDS


@gluon.jit
def _plane_at(plane, unit, row, rows, words, step, WORDS: gl.constexpr, layout: gl.constexpr):
    """Pointers to the WORDS words of a step, of some rows of a unit; a plane is contiguous, and in bands."""
    start = unit.to(gl.int64) * rows * words + in_unit(row.to(gl.int64), words, WORDS) + step * (BAND * WORDS)
    if WORDS > 1:
        start = gl.multiple_of(start, min(WORDS, 4))  # 16 bytes
    return plane + start[:, None] + gl.arange(0, WORDS, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def planes_at(
    words, low, scale, unit, first_row, size, columns, begin, w_up,
    ROWS: gl.constexpr, FORMAT: gl.constexpr, HALVES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The first step's words, other bits and scales (of HALVES * STEP columns from `begin` on) of some rows of a unit.

    Those are ROWS of down's `size` rows, or (GATED) ROWS gate rows and their up rows, of `size` each.
    """
    wide: gl.constexpr = plane_layout(STEP // 8, gl.num_warps())
    lows: gl.constexpr = plane_layout(low_words(FORMAT, STEP), gl.num_warps())
    few: gl.constexpr = scale_layout(HALVES, gl.num_warps())
    each: gl.constexpr = low_words(FORMAT, STEP)
    row = rows_of(first_row, size, w_up, ROWS, GATED, wide)
    rows = 2 * size if GATED else size
    of_words = _plane_at(words, unit, row, rows, columns // 8, begin // STEP, STEP // 8, wide)
    row = rows_of(first_row, size, w_up, ROWS, GATED, lows)
    of_low = _plane_at(low, unit, row, rows, columns * each // STEP, begin // STEP, each, lows)
    row = rows_of(first_row, size, w_up, ROWS, GATED, few)
    of_scales = _plane_at(scale, unit, row, rows, columns // STEP, begin // STEP, 1, few)
    return of_words, of_low, of_scales + BAND * gl.arange(0, HALVES, gl.SliceLayout(0, few))[None, :]


@gluon.jit
def entries_of(offsets, unit, slot, skipped, PAIRED: gl.constexpr):
    """(begin, end) of the first place's entries in a tile, and of the second's."""
    place = 2 * unit + (0 if PAIRED else slot)
    begin0, end0 = gl.load(offsets + place) + skipped, gl.load(offsets + place + 1)
    begin1, end1 = end0, end0
    if PAIRED:
        begin1, end1 = end0 + skipped, gl.load(offsets + place + 2)
    return place, begin0, end0, begin1, end1
