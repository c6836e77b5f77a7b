"""Some tens of tokens per expert on Hopper: both slots of a pair from one reading of the words, products overlapped.

Here reading, decoding and multiplying take about as long as one another, so they have to run at the same time: as in
overlapped.py, two sets of operand registers take turns (a set now holds both slots' operands), and as in project.py's
PAIR a tile of words is read once. A slot's product is as wide as the fuller slot needs: TOKENS and EXTRA, TOKENS, or
half of it.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from moefold_kernels.triton.decode import BOTH
from moefold_kernels.triton.overlapped import (
    after_the_one_before,
    barrier,
    end_copies,
    entries_at,
    gates_of,
    positions_at,
    product_layout,
    share,
    tokens_at,
    words_in,
    words_out,
    write_outer,
    write_slot_inner,
)
from moefold_kernels.triton.overlapped_stage import (
    begin_words,
    buffers_of,
    extra_of,
    start_tokens,
    start_words,
    tokens_of,
    unrolled,
    words_of,
)


@gluon.jit
def operands_of(words):
    """decode.decode_both."""
    return gl.inline_asm_elementwise(
        BOTH,
        "=r,=r,r",
        [words],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _begin_tokens(
    buffers, x, live, steps, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr
):  # fmt: skip
    """overlapped._begin_tokens of both slots."""
    x0, x1, x2, x3 = x
    for step in gl.static_range(PLACES - 1):
        start_tokens(buffers, (x0, x1, x2, x3), live, step, 2, step < steps, TOKENS, EXTRA)
        async_copy.commit_group()  # of nothing: in the loop words come as a group of their own
        x0 += COLUMNS
        x1 += COLUMNS
        if EXTRA:
            x2 += COLUMNS
            x3 += COLUMNS
    return x0, x1, x2, x3


@gluon.jit
def _products(
    buffers, w, x, live, steps,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """overlapped._products for both slots: sums of the slots [ROWS, TOKENS], then their extra sums [ROWS, EXTRA]."""
    gl.assume(steps > 0)  # as in project.one_slot
    mma: gl.constexpr = product_layout(TOKENS, gl.num_warps())
    mma_extra: gl.constexpr = product_layout(max(EXTRA, 16), gl.num_warps())
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    left_extra: gl.constexpr = gl.DotOperandLayout(0, mma_extra, 2)
    x0, x1, x2, x3 = x
    sums0 = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    sums1 = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    extra0 = warpgroup_mma_init(gl.zeros((ROWS, max(EXTRA, 16)), gl.float32, mma_extra))
    extra1 = warpgroup_mma_init(gl.zeros((ROWS, max(EXTRA, 16)), gl.float32, mma_extra))
    async_copy.wait_group(2 * PLACES - 3)
    barrier()
    read = buffers[words_of(0, 2)].load(left)
    for first in range(0, steps, unrolled(PLACES)):
        for number in gl.static_range(unrolled(PLACES)):
            nothing = first >> 30  # which the compiler does not know
            own, other = operands_of(read)
            right = buffers[tokens_of(number % PLACES, 2, 0)].index(nothing).slice(0, TOKENS, 0).permute((1, 0))
            sums0 = warpgroup_mma(own, right, sums0, is_async=True)
            right = buffers[tokens_of(number % PLACES, 2, 1)].index(nothing).slice(0, TOKENS, 0).permute((1, 0))
            sums1 = warpgroup_mma(other, right, sums1, is_async=True)
            if EXTRA:
                own = gl.convert_layout(own, left_extra, assert_trivial=True)
                other = gl.convert_layout(other, left_extra, assert_trivial=True)
                right = buffers[extra_of(number % PLACES, 2, 0)].index(nothing).permute((1, 0))
                extra0 = warpgroup_mma(own, right, extra0, is_async=True)
                right = buffers[extra_of(number % PLACES, 2, 1)].index(nothing).permute((1, 0))
                extra1 = warpgroup_mma(other, right, extra1, is_async=True)
                sums0, sums1, extra0, extra1 = warpgroup_mma_wait(4, deps=(sums0, sums1, extra0, extra1))
                extra0, extra1 = warpgroup_mma_init(extra0), warpgroup_mma_init(extra1)
            else:
                sums0, sums1 = warpgroup_mma_wait(2, deps=(sums0, sums1))  # the other set's products have ended
            sums0, sums1 = warpgroup_mma_init(sums0), warpgroup_mma_init(sums1)
            if PLACES > 2:
                async_copy.wait_group(2 * PLACES - 5)  # the next tile has come
            barrier()  # for all; nobody reads the tokens of the one before any more, nor this one's words
            if PLACES > 2:  # before copies, behind which reading would queue
                read = buffers[words_of((number + 1) % PLACES, 2)].load(left)
            ahead = first + number + PLACES
            start_tokens(
                buffers, (x0, x1, x2, x3), live, (number + PLACES - 1) % PLACES, 2, ahead - 1 < steps, TOKENS, EXTRA
            )
            start_words(buffers, w, number % PLACES, 2, ahead < steps)
            w += COLUMNS
            x0 += COLUMNS
            x1 += COLUMNS
            if EXTRA:
                x2 += COLUMNS
                x3 += COLUMNS
            if PLACES == 2:
                async_copy.wait_group(1)  # the next tile has come
                barrier()
                read = buffers[words_of((number + 1) % PLACES, 2)].load(left)
    sums0, sums1, extra0, extra1 = warpgroup_mma_wait(0, deps=(sums0, sums1, extra0, extra1))
    end_copies()
    return sums0, sums1, extra0, extra1


@gluon.jit(do_not_specialize=["top_k", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"])
def project_in(
    x, words, out, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, capacity, x_row, w_unit, w_row, w_up,
    gate_shift, up_shift, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr,
    PLACES: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """project.project_in for PAIR; `hidden` is an even number of COLUMNS."""
    after_the_one_before()
    program = gl.program_id(0)
    tile, first_row = share(program, gl.cdiv(inner, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)
    if unit < 0:
        return
    skipped = gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    middle, end1 = gl.load(offsets + 2 * unit + 1), gl.load(offsets + 2 * unit + 2)
    begin0, begin1 = gl.load(offsets + 2 * unit) + skipped, middle + skipped
    w, k = words_in(words, unit, first_row, inner, w_unit, w_row, w_up, ROWS, COLUMNS)
    buffers = buffers_of(2 * ROWS, COLUMNS, TOKENS, EXTRA, PLACES, 2)
    expert0, expert1 = gl.load(experts + 2 * unit), gl.load(experts + 2 * unit + 1)
    steps = hidden // COLUMNS
    w = begin_words(buffers, w, steps, COLUMNS, PLACES, 2)
    most = gl.maximum(middle - begin0, end1 - begin1)
    given = (
        w, x, out, order, begin0, middle, begin1, end1, k, top_k, x_row, steps, first_row, inner, gate_shift, up_shift,
        expert0, expert1, bias, bias_expert, bias_row, bias_up, limit, alpha,
    )  # fmt: skip
    half: gl.constexpr = max(TOKENS // 2, 8)
    if EXTRA and most > TOKENS:
        _in(buffers, given, ROWS, COLUMNS, TOKENS, EXTRA, PLACES, ACTIVATION)
    elif most > half:
        _in(buffers, given, ROWS, COLUMNS, TOKENS, 0, PLACES, ACTIVATION)
    else:
        _in(buffers, given, ROWS, COLUMNS, half, 0, PLACES, ACTIVATION)


@gluon.jit
def _in(
    buffers, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr,
    PLACES: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    (
        w, x, out, order, begin0, end0, begin1, end1, k, top_k, x_row, steps, first_row, inner, gate_shift, up_shift,
        expert0, expert1, bias, bias_expert, bias_row, bias_up, limit, alpha,
    ) = given  # fmt: skip
    rest: gl.constexpr = max(EXTRA, 16)
    a0, live0 = tokens_at(x, order, begin0, end0, k, top_k, x_row, COLUMNS, TOKENS)
    a1, live1 = tokens_at(x, order, begin1, end1, k, top_k, x_row, COLUMNS, TOKENS)
    b0, more0 = tokens_at(x, order, begin0 + TOKENS, end0, k, top_k, x_row, COLUMNS, rest)
    b1, more1 = tokens_at(x, order, begin1 + TOKENS, end1, k, top_k, x_row, COLUMNS, rest)
    live = live0, live1, more0, more1
    at = _begin_tokens(buffers, (a0, a1, b0, b1), live, steps, COLUMNS, TOKENS, EXTRA, PLACES)
    sums0, sums1, extra0, extra1 = _products(buffers, w, at, live, steps, 2 * ROWS, COLUMNS, TOKENS, EXTRA, PLACES)
    write_slot_inner(
        sums0, extra0, out, begin0, end0, first_row, inner, gate_shift, up_shift, expert0, bias, bias_expert, bias_row,
        bias_up, limit, alpha, ROWS, TOKENS, EXTRA, ACTIVATION,
    )  # fmt: skip
    write_slot_inner(
        sums1, extra1, out, begin1, end1, first_row, inner, gate_shift, up_shift, expert1, bias, bias_expert, bias_row,
        bias_up, limit, alpha, ROWS, TOKENS, EXTRA, ACTIVATION,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["capacity", "bias_expert", "bias_row"])
def project_out(
    x, words, out, order, offsets, tiles, experts, weights, bias,
    inner, hidden, capacity, w_unit, w_row, shift, bias_expert, bias_row,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    """project.project_out for PAIR in one split; `inner` is an even number of COLUMNS."""
    program = gl.program_id(0)
    tile, first_row = share(program, gl.cdiv(hidden, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)  # the tables are of two kernels before
    if unit < 0:
        after_the_one_before()  # also here: that this kernel has ended must mean that the one before it has
        return
    skipped = gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    middle, end1 = gl.load(offsets + 2 * unit + 1), gl.load(offsets + 2 * unit + 2)
    begin0, begin1 = gl.load(offsets + 2 * unit) + skipped, middle + skipped
    w, k = words_out(words, unit, first_row, hidden, w_unit, w_row, ROWS, COLUMNS)
    buffers = buffers_of(ROWS, COLUMNS, TOKENS, EXTRA, PLACES, 2)
    expert0, expert1 = gl.load(experts + 2 * unit), gl.load(experts + 2 * unit + 1)
    steps = inner // COLUMNS
    w = begin_words(buffers, w, steps, COLUMNS, PLACES, 2)
    after_the_one_before()
    most = gl.maximum(middle - begin0, end1 - begin1)
    given = (
        w, x, out, order, weights, begin0, middle, begin1, end1, k, steps, first_row, inner, hidden, shift, expert0,
        expert1, bias, bias_expert, bias_row,
    )  # fmt: skip
    half: gl.constexpr = max(TOKENS // 2, 8)
    if EXTRA and most > TOKENS:
        _out(buffers, given, ROWS, COLUMNS, TOKENS, EXTRA, PLACES)
    elif most > half:
        _out(buffers, given, ROWS, COLUMNS, TOKENS, 0, PLACES)
    else:
        _out(buffers, given, ROWS, COLUMNS, half, 0, PLACES)


@gluon.jit
def _out(
    buffers, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    (
        w, x, out, order, weights, begin0, end0, begin1, end1, k, steps, first_row, inner, hidden, shift, expert0,
        expert1, bias, bias_expert, bias_row,
    ) = given  # fmt: skip
    rest: gl.constexpr = max(EXTRA, 16)
    entries0, entries1 = entries_at(order, begin0, end0, TOKENS), entries_at(order, begin1, end1, TOKENS)
    rest0, rest1 = entries_at(order, begin0 + TOKENS, end0, rest), entries_at(order, begin1 + TOKENS, end1, rest)
    a0, live0 = positions_at(x, begin0, end0, k, inner, COLUMNS, TOKENS)
    a1, live1 = positions_at(x, begin1, end1, k, inner, COLUMNS, TOKENS)
    b0, more0 = positions_at(x, begin0 + TOKENS, end0, k, inner, COLUMNS, rest)
    b1, more1 = positions_at(x, begin1 + TOKENS, end1, k, inner, COLUMNS, rest)
    live = live0, live1, more0, more1
    at = _begin_tokens(buffers, (a0, a1, b0, b1), live, steps, COLUMNS, TOKENS, EXTRA, PLACES)
    entries0, entries1 = gates_of(entries0, weights), gates_of(entries1, weights)
    rest0, rest1 = gates_of(rest0, weights), gates_of(rest1, weights)
    sums0, sums1, extra0, extra1 = _products(buffers, w, at, live, steps, ROWS, COLUMNS, TOKENS, EXTRA, PLACES)
    write_outer(
        sums0, out, entries0, begin0, end0, first_row, hidden, shift, expert0, bias, bias_expert, bias_row, ROWS, TOKENS
    )
    write_outer(
        sums1, out, entries1, begin1, end1, first_row, hidden, shift, expert1, bias, bias_expert, bias_row, ROWS, TOKENS
    )
    if EXTRA:
        write_outer(
            extra0, out, rest0, begin0 + TOKENS, end0, first_row, hidden, shift, expert0, bias, bias_expert, bias_row,
            ROWS, EXTRA,
        )  # fmt: skip
        write_outer(
            extra1, out, rest1, begin1 + TOKENS, end1, first_row, hidden, shift, expert1, bias, bias_expert, bias_row,
            ROWS, EXTRA,
        )  # fmt: skip
