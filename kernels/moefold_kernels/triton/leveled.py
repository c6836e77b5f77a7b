"""The few-bit pair formats on Hopper: the projections over planes of bits, with products running while others decode.

As in overlapped.py and overlapped_pair.py two sets of operand registers take turns; a program serves both slots of a
pair from one reading (PAIRED), or one. A step is 128 columns, two groups: words of 64 bytes a row, and the two scales
of a row in one copy of 4 bytes; tokens come by groups, each where those of the group before were. Integer instructions
make operands of words (leveled_decode.py). Products are as wide as the fuller slot needs: TOKENS and EXTRA, TOKENS, or
a half or a quarter of it. Any levels will do; those that are e4m3 numbers have e4m3.py, which is faster for fewer
entries.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from moefold_kernels.levels import INTEGERS
from moefold_kernels.triton.leveled_operands import decoded, signs_of, units_layout
from moefold_kernels.triton.leveled_planes import entries_of, planes_at
from moefold_kernels.triton.leveled_stage import (
    EXTRA_OF,
    HALF,
    STEP,
    TOKENS_OF,
    at,
    begin_words,
    behind,
    buffers_of,
    start_tokens,
    start_words,
)
from moefold_kernels.triton.overlapped import (
    after_the_one_before,
    barrier,
    copy_layout,
    end_copies,
    positions_at,
    product_layout,
    share,
    tokens_at,
    write_inner,
    write_outer,
)

TABLE = gl.constexpr(INTEGERS)
"""Of a matrix in `levels`."""


@gluon.jit
def _products(
    buffers, planes, x, live, steps, slot, levels, up,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
    PAIRED: gl.constexpr,
):  # fmt: skip
    """Sums [ROWS, TOKENS] of both slots, then [ROWS, EXTRA], over `steps` times STEP columns; nothing for what is not.

    The first PLACES steps' words have been asked for; `planes` point behind them. Rows 8 to 15 of every 16 have
    the levels at `levels + up`.
    """
    gl.assume(steps > 0)
    mma: gl.constexpr = product_layout(TOKENS, gl.num_warps())
    mma_extra: gl.constexpr = product_layout(max(EXTRA, 16), gl.num_warps())
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    left_extra: gl.constexpr = gl.DotOperandLayout(0, mma_extra, 2)
    units: gl.constexpr = units_layout(ROWS, gl.num_warps())
    sets: gl.constexpr = (2 if PAIRED else 1) * (2 if EXTRA else 1)
    x0, x1, x2, x3 = x
    for first in gl.static_range(2 * PLACES - 1):
        wanted = first < 2 * steps
        start_tokens(buffers, (x0, x1, x2, x3), live, first % 2, first // 2, wanted, TOKENS, EXTRA, PAIRED)
        async_copy.commit_group()
        x0 += HALF
        x1 += HALF
        x2 += HALF
        x3 += HALF
    thread = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, units))), 0), 0)
    gather = thread | (thread + 4) << 4
    shared = gl.where(slot == 0, signs_of(0, 0), signs_of(1, 0)).to(gl.int32)
    alone = gl.where(slot == 0, signs_of(0, 1), signs_of(1, 1)).to(gl.int32)
    signs = (gl.full((ROWS, 4, 4), shared, gl.int32, units), gl.full((ROWS, 4, 4), alone, gl.int32, units))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, units)))
    own = levels + gl.where(row % 16 >= 8, up, 0)
    tables = (
        gl.load(own), gl.load(own + 1), gl.load(own + 2), gl.load(own + 3),
        gl.load(own + 4), gl.load(own + 5), gl.load(own + 6), gl.load(own + 7),
    )  # fmt: skip
    sums0 = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    sums1 = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    extra0 = warpgroup_mma_init(gl.zeros((ROWS, max(EXTRA, 16)), gl.float32, mma_extra))
    extra1 = warpgroup_mma_init(gl.zeros((ROWS, max(EXTRA, 16)), gl.float32, mma_extra))
    async_copy.wait_group(2 * PLACES - 2)
    barrier()
    for first in range(0, steps, PLACES):
        for place in gl.static_range(PLACES):
            nothing = first >> 30  # which the compiler does not know
            for half in gl.static_range(2):
                ours, theirs = decoded(buffers, place, gather, signs, tables, half, ROWS, FORMAT, PAIRED, left)
                right = buffers[at(TOKENS_OF + half, place)].index(nothing).slice(0, TOKENS, 0).permute((1, 0))
                sums0 = warpgroup_mma(ours, right, sums0, is_async=True)
                if PAIRED:
                    right = buffers[at(TOKENS_OF + 2 + half, place)].index(nothing).slice(0, TOKENS, 0).permute((1, 0))
                    sums1 = warpgroup_mma(theirs, right, sums1, is_async=True)
                if EXTRA:
                    ours = gl.convert_layout(ours, left_extra, assert_trivial=True)
                    right = buffers[at(EXTRA_OF + half, place)].index(nothing).permute((1, 0))
                    extra0 = warpgroup_mma(ours, right, extra0, is_async=True)
                    if PAIRED:
                        theirs = gl.convert_layout(theirs, left_extra, assert_trivial=True)
                        right = buffers[at(EXTRA_OF + 2 + half, place)].index(nothing).permute((1, 0))
                        extra1 = warpgroup_mma(theirs, right, extra1, is_async=True)
                if PAIRED and EXTRA:
                    sums0, sums1, extra0, extra1 = warpgroup_mma_wait(sets, deps=(sums0, sums1, extra0, extra1))
                    extra0, extra1 = warpgroup_mma_init(extra0), warpgroup_mma_init(extra1)
                elif EXTRA:
                    sums0, extra0 = warpgroup_mma_wait(sets, deps=(sums0, extra0))
                    extra0 = warpgroup_mma_init(extra0)
                elif PAIRED:
                    sums0, sums1 = warpgroup_mma_wait(sets, deps=(sums0, sums1))
                else:
                    sums0 = warpgroup_mma_wait(sets, deps=(sums0,))
                sums0 = warpgroup_mma_init(sums0)
                if PAIRED:
                    sums1 = warpgroup_mma_init(sums1)
                async_copy.wait_group(2 * PLACES - 3)  # the next half has come
                barrier()  # for all, and nobody reads the tokens of the one before, or after a second half, the words
                ahead = first + place + PLACES
                wanted = ahead - 1 + half < steps
                start_tokens(
                    buffers, (x0, x1, x2, x3), live, 1 - half, (place + PLACES - 1 + half) % PLACES, wanted,
                    TOKENS, EXTRA, PAIRED,
                )  # fmt: skip
                x0 += HALF
                x1 += HALF
                x2 += HALF
                x3 += HALF
                if half == 1:
                    start_words(buffers, planes, place, ahead < steps, FORMAT)
                    planes = behind(planes, FORMAT, 1)
                async_copy.commit_group()
    sums0, sums1, extra0, extra1 = warpgroup_mma_wait(0, deps=(sums0, sums1, extra0, extra1))
    end_copies()
    return sums0, sums1, extra0, extra1


@gluon.jit(do_not_specialize=["top_k", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"])
def project_in(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, capacity, x_row, w_up, shift, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """overlapped.project_in; `hidden` is a number of STEPs, planes are contiguous [unit, row, word], gate rows first.

    `w_up`: rows from a gate row to its up row, within a unit of 2 * inner.
    """
    slot = 0 if PAIRED else gl.program_id(0) % 2
    after_the_one_before()
    program = gl.program_id(0) if PAIRED else gl.program_id(0) // 2
    tile, first_row = share(program, gl.cdiv(inner, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)
    if unit < 0:
        return
    skipped = gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    place, begin0, end0, begin1, end1 = entries_of(offsets, unit, slot, skipped, PAIRED)
    if not PAIRED and begin0 >= end0:
        return
    buffers = buffers_of(2 * ROWS, TOKENS, EXTRA, PLACES, FORMAT, PAIRED)
    planes = planes_at(words, low, scale, unit, first_row, inner, hidden, 0, w_up, ROWS, FORMAT, 1, True)
    steps = hidden // STEP
    planes = begin_words(buffers, planes, steps, PLACES, FORMAT)
    given = (
        planes, x, out, order, begin0, end0, begin1, end1, steps, slot, place, top_k, x_row, first_row, inner, shift,
        levels, experts, bias, bias_expert, bias_row, bias_up, limit, alpha,
    )  # fmt: skip
    half: gl.constexpr = max(TOKENS // 2, 8)
    quarter: gl.constexpr = max(TOKENS // 4, 8)
    most = gl.maximum(end0 - begin0, end1 - begin1) if PAIRED else end0 - begin0
    if EXTRA and most > TOKENS:
        _in(buffers, given, ROWS, TOKENS, EXTRA, PLACES, ACTIVATION, FORMAT, PAIRED)
    elif most > half:
        _in(buffers, given, ROWS, TOKENS, 0, PLACES, ACTIVATION, FORMAT, PAIRED)
    elif most > quarter:
        _in(buffers, given, ROWS, half, 0, PLACES, ACTIVATION, FORMAT, PAIRED)
    else:
        _in(buffers, given, ROWS, quarter, 0, PLACES, ACTIVATION, FORMAT, PAIRED)


@gluon.jit
def _in(
    buffers, given, ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    (
        planes, x, out, order, begin0, end0, begin1, end1, steps, slot, place, top_k, x_row, first_row, inner, shift,
        levels, experts, bias, bias_expert, bias_row, bias_up, limit, alpha,
    ) = given  # fmt: skip
    k = gl.arange(0, HALF, gl.SliceLayout(0, copy_layout(HALF, gl.num_warps())))
    rest: gl.constexpr = max(EXTRA, 16)
    a0, live0 = tokens_at(x, order, begin0, end0, k, top_k, x_row, HALF, TOKENS)
    b0, more0 = tokens_at(x, order, begin0 + TOKENS, end0, k, top_k, x_row, HALF, rest)
    a1, live1, b1, more1 = a0, live0, b0, more0
    if PAIRED:
        a1, live1 = tokens_at(x, order, begin1, end1, k, top_k, x_row, HALF, TOKENS)
        b1, more1 = tokens_at(x, order, begin1 + TOKENS, end1, k, top_k, x_row, HALF, rest)
    sums0, sums1, extra0, extra1 = _products(
        buffers, planes, (a0, a1, b0, b1), (live0, live1, more0, more1), steps, slot, levels, TABLE,
        2 * ROWS, TOKENS, EXTRA, PLACES, FORMAT, PAIRED,
    )  # fmt: skip
    expert = gl.load(experts + place)
    write_inner(
        sums0, out, begin0, end0, first_row, inner, shift, shift, expert, bias, bias_expert, bias_row, bias_up, limit,
        alpha, ROWS, TOKENS, ACTIVATION,
    )  # fmt: skip
    if EXTRA:
        write_inner(
            extra0, out, begin0 + TOKENS, end0, first_row, inner, shift, shift, expert, bias, bias_expert, bias_row,
            bias_up, limit, alpha, ROWS, EXTRA, ACTIVATION,
        )  # fmt: skip
    if PAIRED:
        expert = gl.load(experts + place + 1)
        write_inner(
            sums1, out, begin1, end1, first_row, inner, shift, shift, expert, bias, bias_expert, bias_row, bias_up,
            limit, alpha, ROWS, TOKENS, ACTIVATION,
        )  # fmt: skip
        if EXTRA:
            write_inner(
                extra1, out, begin1 + TOKENS, end1, first_row, inner, shift, shift, expert, bias, bias_expert,
                bias_row, bias_up, limit, alpha, ROWS, EXTRA, ACTIVATION,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["capacity", "bias_expert", "bias_row"])
def project_out(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, weights, bias,
    inner, hidden, capacity, part, out_split, shift, bias_expert, bias_row,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr, PLACES: gl.constexpr,
    FORMAT: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """overlapped.project_out, in splits of `part` columns (a number of STEPs, as `inner` is)."""
    slot = 0 if PAIRED else gl.program_id(0) % 2
    program = gl.program_id(0) if PAIRED else gl.program_id(0) // 2
    tile, first_row = share(program, gl.cdiv(hidden, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)  # the tables are of two kernels before
    if unit < 0:
        return
    skipped = gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    place, begin0, end0, begin1, end1 = entries_of(offsets, unit, slot, skipped, PAIRED)
    if not PAIRED and begin0 >= end0:
        return
    begin = gl.program_id(1) * part
    out += gl.program_id(1).to(gl.int64) * out_split
    buffers = buffers_of(ROWS, TOKENS, EXTRA, PLACES, FORMAT, PAIRED)
    planes = planes_at(words, low, scale, unit, first_row, hidden, inner, begin, 0, ROWS, FORMAT, 1, False)
    steps = gl.minimum(inner - begin, part) // STEP
    planes = begin_words(buffers, planes, steps, PLACES, FORMAT)
    after_the_one_before()
    given = (
        planes, x, out, order, weights, begin0, end0, begin1, end1, steps, slot, place, begin, first_row, hidden, inner,
        shift, levels, experts, bias, bias_expert, bias_row,
    )  # fmt: skip
    half: gl.constexpr = max(TOKENS // 2, 8)
    quarter: gl.constexpr = max(TOKENS // 4, 8)
    most = gl.maximum(end0 - begin0, end1 - begin1) if PAIRED else end0 - begin0
    if EXTRA and most > TOKENS:
        _out(buffers, given, ROWS, TOKENS, EXTRA, PLACES, FORMAT, PAIRED)
    elif most > half:
        _out(buffers, given, ROWS, TOKENS, 0, PLACES, FORMAT, PAIRED)
    elif most > quarter:
        _out(buffers, given, ROWS, half, 0, PLACES, FORMAT, PAIRED)
    else:
        _out(buffers, given, ROWS, quarter, 0, PLACES, FORMAT, PAIRED)


@gluon.jit
def _out(
    buffers, given, ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    FORMAT: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    (
        planes, x, out, order, weights, begin0, end0, begin1, end1, steps, slot, place, begin, first_row, hidden, inner,
        shift, levels, experts, bias, bias_expert, bias_row,
    ) = given  # fmt: skip
    k = begin + gl.arange(0, HALF, gl.SliceLayout(0, copy_layout(HALF, gl.num_warps())))
    rest: gl.constexpr = max(EXTRA, 16)
    a0, live0 = positions_at(x, begin0, end0, k, inner, HALF, TOKENS)
    b0, more0 = positions_at(x, begin0 + TOKENS, end0, k, inner, HALF, rest)
    a1, live1, b1, more1 = a0, live0, b0, more0
    if PAIRED:
        a1, live1 = positions_at(x, begin1, end1, k, inner, HALF, TOKENS)
        b1, more1 = positions_at(x, begin1 + TOKENS, end1, k, inner, HALF, rest)
    sums0, sums1, extra0, extra1 = _products(
        buffers, planes, (a0, a1, b0, b1), (live0, live1, more0, more1), steps, slot, levels + 2 * TABLE, 0,
        ROWS, TOKENS, EXTRA, PLACES, FORMAT, PAIRED,
    )  # fmt: skip
    expert = gl.load(experts + place)
    write_outer(
        sums0, out, order, weights, begin0, end0, first_row, hidden, shift, expert, bias, bias_expert, bias_row, ROWS,
        TOKENS,
    )  # fmt: skip
    if EXTRA:
        write_outer(
            extra0, out, order, weights, begin0 + TOKENS, end0, first_row, hidden, shift, expert, bias, bias_expert,
            bias_row, ROWS, EXTRA,
        )  # fmt: skip
    if PAIRED:
        expert = gl.load(experts + place + 1)
        write_outer(
            sums1, out, order, weights, begin1, end1, first_row, hidden, shift, expert, bias, bias_expert, bias_row,
            ROWS, TOKENS,
        )  # fmt: skip
        if EXTRA:
            write_outer(
                extra1, out, order, weights, begin1 + TOKENS, end1, first_row, hidden, shift, expert, bias,
                bias_expert, bias_row, ROWS, EXTRA,
            )  # fmt: skip
