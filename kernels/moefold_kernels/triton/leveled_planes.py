"""Where a program of leveled.py or e4m3.py finds its part of the planes, and its entries."""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl

from moefold_kernels.triton.leveled_stage import STEP, low_words, plane_layout


@gluon.jit
def _rows_in(first_row, inner, w_up, ROWS: gl.constexpr, layout: gl.constexpr):
    """Gate and up rows by eights, and where the up rows are: (row, rows to skip)."""
    stacked = gl.arange(0, 2 * ROWS, gl.SliceLayout(1, layout))
    row = (first_row + stacked // 16 * 8 + stacked % 8) % inner
    return row + gl.where(stacked % 16 >= 8, w_up, 0)


@gluon.jit
def _rows_out(first_row, hidden, ROWS: gl.constexpr, layout: gl.constexpr):
    return (first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))) % hidden


@gluon.jit
def _plane_at(plane, unit, row, rows, words, skipped, WORDS: gl.constexpr, layout: gl.constexpr):
    """Pointers to the first WORDS words, from `skipped` on, of some rows of a unit; a plane is contiguous."""
    start = (unit.to(gl.int64) * rows + row) * words + skipped
    if WORDS > 1:
        start = gl.multiple_of(start, min(WORDS, 4))  # whole steps: 16 bytes
    return plane + start[:, None] + gl.arange(0, WORDS, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def planes_in(
    words, low, scale, unit, first_row, inner, hidden, w_up,
    ROWS: gl.constexpr, FORMAT: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The first step's words, other bits and scales (of HALVES * STEP columns) of ROWS gate rows and their up rows."""
    wide: gl.constexpr = plane_layout(STEP // 8, gl.num_warps())
    lows: gl.constexpr = plane_layout(low_words(FORMAT, STEP), gl.num_warps())
    few: gl.constexpr = plane_layout(HALVES, gl.num_warps())
    return (
        _plane_at(
            words, unit, _rows_in(first_row, inner, w_up, ROWS, wide), 2 * inner, hidden // 8, 0, STEP // 8, wide
        ),
        _plane_at(
            low, unit, _rows_in(first_row, inner, w_up, ROWS, lows), 2 * inner,
            hidden * low_words(FORMAT, STEP) // STEP, 0, low_words(FORMAT, STEP), lows,
        ),
        _plane_at(scale, unit, _rows_in(first_row, inner, w_up, ROWS, few), 2 * inner, hidden // STEP, 0, HALVES, few),
    )  # fmt: skip


@gluon.jit
def planes_out(
    words, low, scale, unit, first_row, hidden, inner, begin,
    ROWS: gl.constexpr, FORMAT: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The same of ROWS rows of down, from column `begin` on."""
    wide: gl.constexpr = plane_layout(STEP // 8, gl.num_warps())
    lows: gl.constexpr = plane_layout(low_words(FORMAT, STEP), gl.num_warps())
    few: gl.constexpr = plane_layout(HALVES, gl.num_warps())
    return (
        _plane_at(
            words, unit, _rows_out(first_row, hidden, ROWS, wide), hidden, inner // 8, begin // 8, STEP // 8, wide
        ),
        _plane_at(
            low, unit, _rows_out(first_row, hidden, ROWS, lows), hidden, inner * low_words(FORMAT, STEP) // STEP,
            begin * low_words(FORMAT, STEP) // STEP, low_words(FORMAT, STEP), lows,
        ),
        _plane_at(
            scale, unit, _rows_out(first_row, hidden, ROWS, few), hidden, inner // STEP, begin // STEP, HALVES, few
        ),
    )  # fmt: skip


@gluon.jit
def entries_of(offsets, unit, slot, skipped, PAIRED: gl.constexpr):
    """(begin, end) of the first place's entries in a tile, and of the second's."""
    place = 2 * unit + (0 if PAIRED else slot)
    begin0, end0 = gl.load(offsets + place) + skipped, gl.load(offsets + place + 1)
    begin1, end1 = end0, end0
    if PAIRED:
        begin1, end1 = end0 + skipped, gl.load(offsets + place + 2)
    return place, begin0, end0, begin1, end1
