"""Both projections in one launch: the down projection begins as soon as what it reads is there, not when all is.

A kernel loses about 15 microseconds to its start and its end, when its programs do not keep the memory busy. Here the
programs of the down projection come behind those of the first in one grid, and take the places of those that end. Such
a program waits until all blocks of rows of its tile have been written (`ready` counts them), and meanwhile asks for its
words. There is one loop, with its pointers chosen before it, because two would cost registers and shared memory
(docs/kernels.md, "Rules that kernels keep"); so blocks of both projections have the same height, twice ROWS.

Programs start in the order of their numbers (single-pass scans rely on that, too), and those of the first projection
wait for no other: so there is always one that gets on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moefold_kernels.triton.portability import after_the_one_before
from moefold_kernels.triton.project import (
    DENSE,
    PAIR,
    SLOT,
    both_slots,
    entries_of,
    one_slot,
    prefetch,
    share,
    write_inner,
    write_outer,
)
from moefold_kernels.triton.sorting import READY


@triton.jit
def _columns(source, order, begin, end, k, top_k, row, second, N: tl.constexpr):
    """Pointers to what N entries from `begin` are multiplied with: their tokens, or their activations."""
    n = begin + tl.arange(0, N)
    live = n < end
    token = tl.load(order + n, mask=live, other=0) // top_k
    at = tl.where(second, tl.where(live, n, 0), token)
    return source + at.to(tl.int64)[None, :] * row + k[:, None], live


@triton.jit
def _wait(ready, wanted, words, LINES: tl.constexpr, ASM: tl.constexpr):
    """Until `ready` says so many; what the device writes before it counts can be read then."""
    arrived = tl.atomic_add(ready, 0, sem="acquire")
    if arrived < wanted:
        if ASM:
            prefetch(words, LINES)
        while arrived < wanted:
            arrived = tl.atomic_add(ready, 0, sem="acquire")


@triton.jit
def _write(
    sums, between, parts, order, weights, begin, end, block, second, hidden, inner, expert, gate_shift, up_shift,
    down_shift, bias, bias_expert, bias_row, bias_up, down_bias, down_bias_expert, down_bias_row, limit, alpha,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One slot's sums, as either projection has them."""
    if second:
        write_outer(
            sums, parts, order, weights, begin, end, block, hidden, expert, down_shift,
            down_bias, down_bias_expert, down_bias_row, 2 * ROWS, TOKENS, MODE, KEEP,
        )  # fmt: skip
    else:
        write_inner(
            sums, between, begin, end, block, inner, expert, gate_shift, up_shift,
            bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, TOKENS, MODE, True, ACTIVATION, KEEP,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "top_k", "first", "units", "capacity", "bias_expert", "bias_row", "bias_up", "down_bias_expert",
        "down_bias_row", "limit", "alpha",
    ]
)  # fmt: skip
def project(
    x, words, between, down, parts, order, offsets, tiles, ready, experts, weights, bias, down_bias,
    hidden, inner, top_k, first, units, capacity, x_row, w_unit, w_row, w_up, down_unit, down_row,
    gate_shift, up_shift, down_shift, bias_expert, bias_row, bias_up, down_bias_expert, down_bias_row, limit, alpha,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr,
    MODE: tl.constexpr, ACTIVATION: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr, CHAIN: tl.constexpr,
    LINES: tl.constexpr, GUESS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """project_in, writing `between` [entry in order, inner], and project_out, writing `parts` [entry, hidden].

    `hidden` and `inner` are whole numbers of COLUMNS; `ready` is Tables.ready. KEEP: what is written stays in L2.
    """
    height: tl.constexpr = 2 * ROWS
    n_first = tl.cdiv(inner, ROWS)
    if GUESS:
        guess, block, _ = share(tl.program_id(0), n_first, GROUP, MODE)
        row = (block * ROWS + tl.arange(0, height) // 16 * 8 + tl.arange(0, height) % 8) % inner
        line = words + row.to(tl.int64) * w_row + tl.where(tl.arange(0, height) % 16 >= 8, w_up, 0)
        if guess < units:
            prefetch(line[:, None] + guess.to(tl.int64) * w_unit, LINES)
    after_the_one_before(CHAIN)
    begins = tl.cdiv(tl.load(ready), GROUP) * GROUP * n_first * (2 if MODE == SLOT else 1)
    second = tl.program_id(0) >= begins
    number = tl.program_id(0) - tl.where(second, begins, 0)
    tile, block, slot = share(number, tl.where(second, tl.cdiv(hidden, height), n_first), GROUP, MODE)
    stacked = tl.arange(0, height)
    above = ((block * ROWS + stacked // 16 * 8 + stacked % 8) % inner).to(tl.int64) * w_row
    above += tl.where(stacked % 16 >= 8, w_up, 0)
    below = ((block * height + stacked) % hidden).to(tl.int64) * down_row
    w = tl.where(second, down, words) + tl.multiple_of(tl.where(second, below, above), 8)[:, None]
    w_unit = tl.where(second, down_unit, w_unit).to(tl.int64)
    if tile >= capacity:
        return
    unit, number = tl.load(tiles + tile), tl.load(tiles + capacity + tile)
    if unit < 0:
        return
    place = first + unit if MODE == DENSE else 2 * unit + (slot if MODE == SLOT else 0)
    begin, end = entries_of(offsets, place, number, TOKENS + EXTRA)
    if MODE == SLOT and begin >= end:
        return
    k = tl.arange(0, COLUMNS)
    w += unit * w_unit
    ready += READY + (2 * tile + slot if MODE == SLOT else tile)
    if second:
        _wait(ready, n_first, w, LINES, ASM)
    w += k[None, :]
    source, length = tl.where(second, between, x), tl.where(second, inner, hidden)
    row = tl.multiple_of(tl.where(second, inner, x_row), 8)
    a, live = _columns(source, order, begin, end, k, top_k, row, second, TOKENS)
    b, b_live = a, live
    if EXTRA:
        b, b_live = _columns(source, order, begin + TOKENS, end, k, top_k, row, second, EXTRA)
    if MODE == PAIR:
        begin1, end1 = entries_of(offsets, place + 1, number, TOKENS + EXTRA)
        a1, live1 = _columns(source, order, begin1, end1, k, top_k, row, second, TOKENS)
        b1, b_live1 = a1, live1
        if EXTRA:
            b1, b_live1 = _columns(source, order, begin1 + TOKENS, end1, k, top_k, row, second, EXTRA)
        sums, sums1, extra, extra1 = both_slots(
            w, (words,), a, a1, live, live1, b, b1, b_live, b_live1, length,
            height, COLUMNS, TOKENS, EXTRA, -1, False, True, ASM, UPCAST,
        )  # fmt: skip
        other = tl.load(experts + place + 1)
        _write(
            sums1, between, parts, order, weights, begin1, end1, block, second, hidden, inner, other, gate_shift,
            up_shift, down_shift, bias, bias_expert, bias_row, bias_up, down_bias, down_bias_expert, down_bias_row,
            limit, alpha, ROWS, TOKENS, MODE, ACTIVATION, KEEP,
        )  # fmt: skip
        if EXTRA:
            _write(
                extra1, between, parts, order, weights, begin1 + TOKENS, end1, block, second, hidden, inner, other,
                gate_shift, up_shift, down_shift, bias, bias_expert, bias_row, bias_up, down_bias, down_bias_expert,
                down_bias_row, limit, alpha, ROWS, EXTRA, MODE, ACTIVATION, KEEP,
            )  # fmt: skip
    else:
        sums, extra = one_slot(
            w, (words,), a, live, b, b_live, slot, length,
            height, COLUMNS, TOKENS, EXTRA, MODE, -1, False, True, ASM, UPCAST,
        )  # fmt: skip
    expert = tl.load(experts + place)
    _write(
        sums, between, parts, order, weights, begin, end, block, second, hidden, inner, expert, gate_shift,
        up_shift, down_shift, bias, bias_expert, bias_row, bias_up, down_bias, down_bias_expert, down_bias_row,
        limit, alpha, ROWS, TOKENS, MODE, ACTIVATION, KEEP,
    )  # fmt: skip
    if EXTRA:
        _write(
            extra, between, parts, order, weights, begin + TOKENS, end, block, second, hidden, inner, expert,
            gate_shift, up_shift, down_shift, bias, bias_expert, bias_row, bias_up, down_bias, down_bias_expert,
            down_bias_row, limit, alpha, ROWS, EXTRA, MODE, ACTIVATION, KEEP,
        )  # fmt: skip
    if not second:
        tl.debug_barrier()  # all threads have written; what one thread then releases is the whole block's
        tl.atomic_add(ready, 1, sem="release")
