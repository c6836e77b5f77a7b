"""Many tokens of one slot by warps apart (apart.py): overlapped.py with four warps that copy and eight that multiply.

A stage is a step of COLUMNS columns. Operands are made of PART columns at a time, as in leveled.py: a warp cannot go on
while its products queue.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from moefold_kernels.triton.apart import COPYING, barriers, entries_and_gates, keep, rows_in, rows_out, write_kept
from moefold_kernels.triton.overlapped import (
    after_the_one_before,
    copy_layout,
    operand_of,
    product_layout,
    share,
    write_slot_inner,
    write_slot_outer,
)
from moefold_kernels.triton.overlapped_stage import buffers_of, extra_of, tokens_of, words_of

PART = gl.constexpr(32)
"""Columns of one set of operands."""


@gluon.jit
def _words_in(words, unit, first_row, inner, w_unit, w_row, w_up, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """overlapped.words_in as bases, of gate rows and of up rows, and offsets."""
    layout: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    stacked = gl.arange(0, 2 * ROWS, gl.SliceLayout(1, layout))
    row = (first_row + stacked // 16 * 8 + stacked % 8) % inner
    base = words + unit.to(gl.int64) * w_unit + gl.where(stacked % 16 >= 8, w_up, 0)[:, None]
    offset = gl.multiple_of(row * w_row, 8)[:, None] + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    return base, offset


@gluon.jit
def _words_out(words, unit, first_row, hidden, w_unit, w_row, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """overlapped.words_out likewise."""
    layout: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    row = (first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))) % hidden
    offset = gl.multiple_of(row * w_row, 8)[:, None] + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    return words + unit.to(gl.int64) * w_unit, offset


@gluon.jit
def _copy(
    buffers, come, free, w, behind, offsets, x, tokens, more, steps,
    COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Bring tokens from `x` on and words from `w` on, for `steps` times COLUMNS columns; beyond, zeros.

    Offsets are elements: `offsets` [rows, COLUMNS], `tokens` [TOKENS, COLUMNS], `more` [EXTRA, COLUMNS]. All of that
    BLOCKS times, from behind one block's words `behind` further on to the next one's, for the same tokens; where that
    is more than once, `steps` is a number of PLACES.
    """
    phase = 1  # nothing has been read: as if all were free
    left = steps
    for first in range(0, BLOCKS * steps, PLACES):
        for place in gl.static_range(PLACES):
            wanted = True if BLOCKS > 1 else first + place < steps
            mbarrier.wait(free[place], phase)
            async_copy.async_copy_global_to_shared(buffers[words_of(place, 1)], w + offsets, mask=wanted)
            to = buffers[tokens_of(place, 1, 0)].index(0).slice(0, TOKENS, 0)
            async_copy.async_copy_global_to_shared(to, x + tokens, mask=wanted)
            if EXTRA:
                async_copy.async_copy_global_to_shared(buffers[extra_of(place, 1, 0)].index(0), x + more, mask=wanted)
            async_copy.mbarrier_arrive(come[place], increment_count=False)
            w += COLUMNS
            x += COLUMNS
        phase ^= 1
        if BLOCKS > 1:
            left -= PLACES
            last = left == 0
            w += gl.where(last, behind, 0)
            x -= gl.where(last, steps * COLUMNS, 0)
            left = gl.where(last, steps, left)
    async_copy.wait_group(0)


@gluon.jit
def _copy_in(
    buffers, come, free, x, words, order, unit, first_row, begin, end, hidden, inner, w_unit, w_row, w_up, top_k, x_row,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Copying warps' part of the first projection."""
    w, offsets = _words_in(words, unit, first_row, inner, w_unit, w_row, w_up, ROWS, COLUMNS)
    tokens = rows_in(order, begin, end, top_k, x_row, COLUMNS, TOKENS)
    more = rows_in(order, begin + TOKENS, end, top_k, x_row, COLUMNS, max(EXTRA, 16))
    _copy(buffers, come, free, w, 0, offsets, x, tokens, more, hidden // COLUMNS, COLUMNS, TOKENS, EXTRA, PLACES, 1)


@gluon.jit
def _copy_out(
    given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    BLOCKS: gl.constexpr,
):  # fmt: skip
    """The same of down's."""
    buffers, come, free, x, words, unit, first_row, begin, end, hidden, inner, w_unit, w_row = given
    w, offsets = _words_out(words, unit, first_row, hidden, w_unit, w_row, ROWS, COLUMNS)
    tokens = rows_out(begin, end, inner, COLUMNS, TOKENS)
    more = rows_out(begin + TOKENS, end, inner, COLUMNS, max(EXTRA, 16))
    after_the_one_before()
    steps = inner // COLUMNS
    behind = ROWS * w_row - steps * COLUMNS
    _copy(buffers, come, free, w, behind, offsets, x, tokens, more, steps, COLUMNS, TOKENS, EXTRA, PLACES, BLOCKS)


@gluon.jit
def _products(
    buffers, come, free, steps, phase,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Sums [ROWS, TOKENS] and [ROWS, EXTRA], as overlapped._products, and the next turn's `phase`."""
    gl.assume(steps > 0)
    rest: gl.constexpr = max(EXTRA, 16)
    mma: gl.constexpr = product_layout(TOKENS, gl.num_warps())
    mma_extra: gl.constexpr = product_layout(rest, gl.num_warps())
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    left_extra: gl.constexpr = gl.DotOperandLayout(0, mma_extra, 2)
    sums = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    extra = warpgroup_mma_init(gl.zeros((ROWS, rest), gl.float32, mma_extra))
    for first in range(0, steps, PLACES):
        for place in gl.static_range(PLACES):
            nothing = first >> 30  # which the compiler does not know
            mbarrier.wait(come[place], phase)
            fence_async_shared()  # what was copied is what products read
            for part in gl.static_range(COLUMNS // PART):
                operand = operand_of(buffers[words_of(place, 1)].slice(PART * part, PART, 1).load(left))
                right = buffers[tokens_of(place, 1, 0)].index(nothing).slice(0, TOKENS, 0)
                right = right.slice(PART * part, PART, 1).permute((1, 0))
                sums = warpgroup_mma(operand, right, sums, is_async=True)
                if EXTRA:
                    again = gl.convert_layout(operand, left_extra, assert_trivial=True)
                    right = buffers[extra_of(place, 1, 0)].index(nothing).slice(PART * part, PART, 1).permute((1, 0))
                    extra = warpgroup_mma(again, right, extra, is_async=True)
                    sums, extra = warpgroup_mma_wait(2, deps=(sums, extra))  # the other set's products have ended
                    extra = warpgroup_mma_init(extra)
                else:
                    sums = warpgroup_mma_wait(1, deps=(sums,))
                sums = warpgroup_mma_init(sums)
                if part == 0:  # so nobody of this thread's reads the step before
                    if place > 0:
                        async_copy.mbarrier_arrive(free[place - 1], increment_count=False)
                    elif first > 0:
                        async_copy.mbarrier_arrive(free[PLACES - 1], increment_count=False)
        phase ^= 1
    sums, extra = warpgroup_mma_wait(0, deps=(sums, extra))
    return sums, extra, phase


@gluon.jit
def _multiply(
    buffers, come, free, steps,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Multiplying warps' part."""
    phase = 0
    sums, extra, phase = _products(buffers, come, free, steps, phase, ROWS, COLUMNS, TOKENS, EXTRA, PLACES)
    return sums, extra


@gluon.jit
def _multiply_out(
    buffers, come, free, order, weights, begin, end, steps,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """The same of down's, with entries and gate weights, which are read while the first copies come."""
    after_the_one_before()
    entries, more = entries_and_gates(order, weights, begin, end, TOKENS, EXTRA)
    sums, extra = _multiply(buffers, come, free, steps, ROWS, COLUMNS, TOKENS, EXTRA, PLACES)
    return sums, extra, entries, more


@gluon.jit
def _multiply_in_turn(
    buffers, come, free, order, weights, begin, end, steps, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    BLOCKS: gl.constexpr,
):  # fmt: skip
    """The same for BLOCKS blocks of rows, each of which is written while the next one's copies come."""
    out, first_row, hidden, shift, expert, bias, bias_expert, bias_row = given
    after_the_one_before()
    kept, more = keep(order, weights, begin, end, TOKENS, EXTRA)
    phase = 0
    for block in range(0, BLOCKS + (end >> 30)):  # a number that the compiler does not know
        sums, extra, phase = _products(buffers, come, free, steps, phase, ROWS, COLUMNS, TOKENS, EXTRA, PLACES)
        async_copy.mbarrier_arrive(free[PLACES - 1], increment_count=False)
        to = out, first_row + block * ROWS, hidden, shift, expert, bias, bias_expert, bias_row
        first = begin + ((block + end) >> 30)  # so that the compiler does not keep what comes of it
        write_kept(sums, extra, kept, more, first, end, to, ROWS, TOKENS, EXTRA)


@gluon.jit(do_not_specialize=["top_k", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"])
def project_in(
    x, words, out, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, capacity, x_row, w_unit, w_row, w_up,
    gate_shift, up_shift, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr,
    PLACES: gl.constexpr, ACTIVATION: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """overlapped.project_in; copying warps have so many REGISTERS a thread."""
    after_the_one_before()
    tile, first_row = share(gl.program_id(0) // 2, gl.cdiv(inner, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)
    if unit < 0:
        return
    place = 2 * unit + gl.program_id(0) % 2
    begin = gl.load(offsets + place) + gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    end = gl.load(offsets + place + 1)
    if begin >= end:
        return
    buffers = buffers_of(2 * ROWS, COLUMNS, TOKENS, EXTRA, PLACES, 1)
    come, free = barriers(PLACES)
    expert = gl.load(experts + place)
    given = (
        come, free, x, words, out, order, unit, begin, end, hidden, w_unit, w_row, w_up, top_k, x_row, first_row, inner,
        gate_shift, up_shift, expert, bias, bias_expert, bias_row, bias_up, limit, alpha,
    )  # fmt: skip
    half: gl.constexpr = max(TOKENS // 2, 8)
    quarter: gl.constexpr = max(TOKENS // 4, 8)
    if EXTRA and end - begin > TOKENS:
        _in(buffers, given, ROWS, COLUMNS, TOKENS, EXTRA, PLACES, ACTIVATION, REGISTERS)
    elif end - begin > half:
        _in(buffers, given, ROWS, COLUMNS, TOKENS, 0, PLACES, ACTIVATION, REGISTERS)
    elif end - begin > quarter:
        _in(buffers, given, ROWS, COLUMNS, half, 0, PLACES, ACTIVATION, REGISTERS)
    else:
        _in(buffers, given, ROWS, COLUMNS, quarter, 0, PLACES, ACTIVATION, REGISTERS)


@gluon.jit
def _in(
    buffers, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    (
        come, free, x, words, out, order, unit, begin, end, hidden, w_unit, w_row, w_up, top_k, x_row, first_row, inner,
        gate_shift, up_shift, expert, bias, bias_expert, bias_row, bias_up, limit, alpha,
    ) = given  # fmt: skip
    sums, extra = gl.warp_specialize(
        [
            (_multiply, (buffers, come, free, hidden // COLUMNS, 2 * ROWS, COLUMNS, TOKENS, EXTRA, PLACES)),
            (_copy_in, (
                buffers, come, free, x, words, order, unit, first_row, begin, end, hidden, inner, w_unit, w_row, w_up,
                top_k, x_row, ROWS, COLUMNS, TOKENS, EXTRA, PLACES,
            )),
        ],
        [COPYING], [REGISTERS],
    )  # fmt: skip
    write_slot_inner(
        sums, extra, out, begin, end, first_row, inner, gate_shift, up_shift, expert, bias, bias_expert, bias_row,
        bias_up, limit, alpha, ROWS, TOKENS, EXTRA, ACTIVATION,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["capacity", "bias_expert", "bias_row"])
def project_out(
    x, words, out, order, offsets, tiles, experts, weights, bias,
    inner, hidden, capacity, w_unit, w_row, shift, bias_expert, bias_row,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr,
    PLACES: gl.constexpr, REGISTERS: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """overlapped.project_out for BLOCKS times ROWS rows a program, one after another, as leveled.project_out."""
    tile, first_row = share(gl.program_id(0) // 2, gl.cdiv(hidden, BLOCKS * ROWS), BLOCKS * ROWS, GROUP)
    unit = gl.load(tiles + tile)  # the tables are of two kernels before
    if unit < 0:
        after_the_one_before()  # also here: that this kernel has ended must mean that the one before it has
        return
    place = 2 * unit + gl.program_id(0) % 2
    begin = gl.load(offsets + place) + gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    end = gl.load(offsets + place + 1)
    if begin >= end:
        after_the_one_before()
        return
    buffers = buffers_of(ROWS, COLUMNS, TOKENS, EXTRA, PLACES, 1)
    come, free = barriers(PLACES)
    expert = gl.load(experts + place)
    given = (
        come, free, x, words, out, order, weights, unit, begin, end, w_unit, w_row, first_row, inner, hidden, shift,
        expert, bias, bias_expert, bias_row,
    )  # fmt: skip
    half: gl.constexpr = max(TOKENS // 2, 8)
    quarter: gl.constexpr = max(TOKENS // 4, 8)
    if EXTRA and end - begin > TOKENS:
        _out(buffers, given, ROWS, COLUMNS, TOKENS, EXTRA, PLACES, REGISTERS, BLOCKS)
    elif end - begin > half:
        _out(buffers, given, ROWS, COLUMNS, TOKENS, 0, PLACES, REGISTERS, BLOCKS)
    elif end - begin > quarter:
        _out(buffers, given, ROWS, COLUMNS, half, 0, PLACES, REGISTERS, BLOCKS)
    else:
        _out(buffers, given, ROWS, COLUMNS, quarter, 0, PLACES, REGISTERS, BLOCKS)


@gluon.jit
def _out(
    buffers, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    REGISTERS: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    (
        come, free, x, words, out, order, weights, unit, begin, end, w_unit, w_row, first_row, inner, hidden, shift,
        expert, bias, bias_expert, bias_row,
    ) = given  # fmt: skip
    copied = buffers, come, free, x, words, unit, first_row, begin, end, hidden, inner, w_unit, w_row
    if BLOCKS > 1:
        to = out, first_row, hidden, shift, expert, bias, bias_expert, bias_row
        gl.warp_specialize(
            [
                (_multiply_in_turn, (
                    buffers, come, free, order, weights, begin, end, inner // COLUMNS, to,
                    ROWS, COLUMNS, TOKENS, EXTRA, PLACES, BLOCKS,
                )),
                (_copy_out, (copied, ROWS, COLUMNS, TOKENS, EXTRA, PLACES, BLOCKS)),
            ],
            [COPYING], [REGISTERS],
        )  # fmt: skip
    else:
        sums, extra, entries, more = gl.warp_specialize(
            [
                (_multiply_out, (
                    buffers, come, free, order, weights, begin, end, inner // COLUMNS,
                    ROWS, COLUMNS, TOKENS, EXTRA, PLACES,
                )),
                (_copy_out, (copied, ROWS, COLUMNS, TOKENS, EXTRA, PLACES, BLOCKS)),
            ],
            [COPYING], [REGISTERS],
        )  # fmt: skip
        write_slot_outer(
            sums, extra, out, entries, more, begin, end, first_row, hidden, shift, expert, bias, bias_expert, bias_row,
            ROWS, TOKENS, EXTRA,
        )  # fmt: skip
