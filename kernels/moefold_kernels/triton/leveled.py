"""The few-bit pair formats on Hopper: the projections over planes of bits, with products running while others decode.

As in overlapped.py and overlapped_pair.py two sets of operand registers take turns; a program serves both slots of a
pair from one reading (PAIRED), or one. A step is 128 columns, two groups: words of 64 bytes a row, and the two scales
of a row in one copy of 4 bytes; tokens come by groups, each where those of the group before were. A step's words are
read in one go, before copies are asked for, behind which reading would queue; new ones come where they were. Integer
instructions make operands of words (leveled_decode.py). Products are as wide as the fuller slot needs: TOKENS and
EXTRA (of a pair also half of it, from 32 on), TOKENS, or a half or a quarter of it. Levels that are e4m3 numbers have
e4m3.py, which is faster for fewer entries; pair8's have to be such numbers here, too.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from moefold_kernels.levels import FACTOR, INTEGERS
from moefold_kernels.triton import leveled_decode
from moefold_kernels.triton.leveled_operands import decoded, read, right, scale_of, tables_of
from moefold_kernels.triton.leveled_planes import entries_of, planes_at
from moefold_kernels.triton.leveled_stage import (
    BAND,
    EXTRA_OF,
    HALF,
    STEP,
    TOKENS_OF,
    at,
    begin_words,
    behind,
    buffers_of,
    low_words,
    start_tokens,
    start_words,
)
from moefold_kernels.triton.overlapped import (
    after_the_one_before,
    barrier,
    copy_layout,
    end_copies,
    entries_at,
    gated,
    gates_of,
    positions_at,
    product_layout,
    share,
    store_inner,
    tokens_at,
    write_outer,
)

TABLE, FACTOR_AT = gl.constexpr(INTEGERS), gl.constexpr(FACTOR)
"""Integers of a matrix in `levels`; where among them the factor of e4m3 numbers is."""
NUMBERS = gl.constexpr(leveled_decode.NUMBERS)
"""What pair8's products of numbers and scales have to be multiplied with, beside the factor."""


@gluon.jit
def shift_of(levels, shift, FORMAT: gl.constexpr):
    """`shift`, and what leveled_decode.py leaves out of pair8's operands."""
    if FORMAT == "pair8":
        shift = gl.load(levels + FACTOR_AT).to(gl.float32, bitcast=True) * shift * NUMBERS
    return shift


@gluon.jit
def _begin_tokens(
    buffers, x, live, steps, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, PAIRED: gl.constexpr
):  # fmt: skip
    """Ask for the tokens of the first groups, one less than places have, and point behind them."""
    x0, x1, x2, x3 = x
    for first in gl.static_range(2 * PLACES - 1):
        wanted = first < 2 * steps
        start_tokens(buffers, (x0, x1, x2, x3), live, first % 2, first // 2, wanted, TOKENS, EXTRA, PAIRED)
        async_copy.commit_group()
        x0 += HALF
        x1 += HALF
        x2 += HALF
        x3 += HALF
    return x0, x1, x2, x3


@gluon.jit
def _first(
    buffers, levels, up, slot, ROWS: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr
):  # fmt: skip
    """Registers of levels and of states, and the first step's words when they have come."""
    tables, states = tables_of(levels, up, slot, ROWS, PAIRED, FORMAT)
    async_copy.wait_group(2 * PLACES - 2)
    barrier()
    return tables, states, read(buffers, 0, ROWS, FORMAT)


@gluon.jit
def _products(
    buffers, planes, x, words, live, steps, more, next_words, next_low, next_scale, tables, states,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
    PAIRED: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """Sums [ROWS, TOKENS] of both slots, then [ROWS, EXTRA], over `steps` times STEP columns; nothing for what is not.

    The first PLACES steps' words have been asked for, and tokens of one group less; pointers are behind them, and the
    first step's words have been read (`_first`). Rows 8 to 15 of every 16 have their levels in `tables`, too.

    CHAINED: where there are `more` rows, what is asked for last is theirs: words `next_words`, `next_low` and
    `next_scale` integers behind these rows', for the same tokens; `steps` is a number of PLACES. Returned are also
    pointers and words to go on with.
    """
    gl.assume(steps > 0)
    mma: gl.constexpr = product_layout(TOKENS, gl.num_warps())
    mma_extra: gl.constexpr = product_layout(max(EXTRA, 16), gl.num_warps())
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    left_extra: gl.constexpr = gl.DotOperandLayout(0, mma_extra, 2)
    sets: gl.constexpr = (2 if PAIRED else 1) * (2 if EXTRA else 1)
    x0, x1, x2, x3 = x
    sums0 = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    sums1 = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    extra0 = warpgroup_mma_init(gl.zeros((ROWS, max(EXTRA, 16)), gl.float32, mma_extra))
    extra1 = warpgroup_mma_init(gl.zeros((ROWS, max(EXTRA, 16)), gl.float32, mma_extra))
    for first in range(0, steps, PLACES):
        last = first + PLACES == steps
        if CHAINED:
            w, low, scales = planes
            w += gl.where(last, next_words, 0)
            if FORMAT != "pair4":
                low += gl.where(last, next_low, 0)
            scales += gl.where(last, next_scale, 0)
            planes = w, low, scales
        for place in gl.static_range(PLACES):
            nothing = first >> 30  # which the compiler does not know
            ahead = first + place + PLACES
            for half in gl.static_range(2):
                scale = scale_of(words, half, FORMAT, PAIRED)
                for part in gl.static_range(2):
                    ours, theirs = decoded(words, scale, half, part, tables, states, ROWS, FORMAT, PAIRED, left)
                    tokens = right(buffers, at(TOKENS_OF + half, place), nothing, part, TOKENS)
                    sums0 = warpgroup_mma(ours, tokens, sums0, is_async=True)
                    if PAIRED:
                        tokens = right(buffers, at(TOKENS_OF + 2 + half, place), nothing, part, TOKENS)
                        sums1 = warpgroup_mma(theirs, tokens, sums1, is_async=True)
                    if EXTRA:
                        ours = gl.convert_layout(ours, left_extra, assert_trivial=True)
                        tokens = right(buffers, at(EXTRA_OF + half, place), nothing, part, EXTRA)
                        extra0 = warpgroup_mma(ours, tokens, extra0, is_async=True)
                        if PAIRED:
                            theirs = gl.convert_layout(theirs, left_extra, assert_trivial=True)
                            tokens = right(buffers, at(EXTRA_OF + 2 + half, place), nothing, part, EXTRA)
                            extra1 = warpgroup_mma(theirs, tokens, extra1, is_async=True)
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
                    if part == 0:
                        async_copy.wait_group(2 * PLACES - 3)  # the next half has come
                        barrier()  # for all, and nobody reads the tokens of the one before, nor this step's words
                        start_tokens(
                            buffers, (x0, x1, x2, x3), live, 1 - half, (place + PLACES - 1 + half) % PLACES,
                            _wanted(ahead - 1 + half, steps, more, CHAINED), TOKENS, EXTRA, PAIRED,
                        )  # fmt: skip
                        x0 += HALF
                        x1 += HALF
                        x2 += HALF
                        x3 += HALF
                        if CHAINED and half == 0 and place == 0:  # all others of these PLACES are the next rows'
                            back = gl.where(last, steps * STEP, 0)
                            x0 -= back
                            x1 -= back
                            x2 -= back
                            x3 -= back
                        if half == 0:
                            start_words(buffers, planes, place, _wanted(ahead, steps, more, CHAINED), FORMAT)
                            planes = behind(planes, FORMAT, 1)
                        async_copy.commit_group()
                    elif half == 1:
                        words = read(buffers, (place + 1) % PLACES, ROWS, FORMAT)
    sums0, sums1, extra0, extra1 = warpgroup_mma_wait(0, deps=(sums0, sums1, extra0, extra1))
    return sums0, sums1, extra0, extra1, planes, (x0, x1, x2, x3), words


@gluon.jit
def _wanted(step, steps, more, CHAINED: gl.constexpr):
    wanted = step < steps
    if CHAINED:
        wanted |= more
    return wanted


@gluon.jit(do_not_specialize=["top_k", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"])
def project_in(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, capacity, x_row, w_up, shift, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """overlapped.project_in; `hidden` is a number of STEPs, planes are contiguous and in bands, gate rows first.

    A program does BLOCKS times ROWS gate rows and their up rows, one after another, as `project_out` does; where that
    is more than one, `inner` is a number of them, and `hidden` of PLACES steps.

    `w_up`: rows from a gate row to its up row, within a unit of 2 * inner.
    """
    slot = 0 if PAIRED else gl.program_id(0) % 2
    after_the_one_before()
    program = gl.program_id(0) if PAIRED else gl.program_id(0) // 2
    tile, first_row = share(program, gl.cdiv(inner, BLOCKS * ROWS), BLOCKS * ROWS, GROUP)
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
    fewer: gl.constexpr = EXTRA // 2 if PAIRED and EXTRA > 16 else 0
    most = gl.maximum(end0 - begin0, end1 - begin1) if PAIRED else end0 - begin0
    if EXTRA and most > TOKENS + fewer:
        _in(buffers, given, ROWS, TOKENS, EXTRA, PLACES, ACTIVATION, FORMAT, PAIRED, BLOCKS)
    elif fewer and most > TOKENS:
        _in(buffers, given, ROWS, TOKENS, fewer, PLACES, ACTIVATION, FORMAT, PAIRED, BLOCKS)
    elif most > half:
        _in(buffers, given, ROWS, TOKENS, 0, PLACES, ACTIVATION, FORMAT, PAIRED, BLOCKS)
    elif most > quarter:
        _in(buffers, given, ROWS, half, 0, PLACES, ACTIVATION, FORMAT, PAIRED, BLOCKS)
    else:
        _in(buffers, given, ROWS, quarter, 0, PLACES, ACTIVATION, FORMAT, PAIRED, BLOCKS)


@gluon.jit
def _in(
    buffers, given, ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr, BLOCKS: gl.constexpr,
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
    live = live0, live1, more0, more1
    at = _begin_tokens(buffers, (a0, a1, b0, b1), live, steps, TOKENS, EXTRA, PLACES, PAIRED)
    tables, states, words = _first(buffers, levels, TABLE, slot, 2 * ROWS, PLACES, FORMAT, PAIRED)
    given = (
        out, inner, bias, bias_expert, bias_row, bias_up, limit, alpha, levels, shift, experts, place, begin0, end0,
        begin1, end1,
    )  # fmt: skip
    if BLOCKS == 1:
        sums0, sums1, extra0, extra1, planes, at, words = _products(
            buffers, planes, at, words, live, steps, False, 0, 0, 0, tables, states, 2 * ROWS, TOKENS, EXTRA, PLACES,
            FORMAT, PAIRED, False,
        )  # fmt: skip
        end_copies()
        _activate(sums0, sums1, extra0, extra1, first_row, given, ROWS, TOKENS, EXTRA, ACTIVATION, FORMAT, PAIRED)
    else:
        next_words, next_low, next_scale = _to_next(ROWS, steps * STEP, steps * STEP, FORMAT)
        blocks = BLOCKS + (steps >> 30)  # which the compiler does not know
        for block in range(0, blocks):
            sums0, sums1, extra0, extra1, planes, at, words = _products(
                buffers, planes, at, words, live, steps, block + 1 < blocks, next_words, next_low, next_scale, tables,
                states, 2 * ROWS, TOKENS, EXTRA, PLACES, FORMAT, PAIRED, True,
            )  # fmt: skip
            row = first_row + block * ROWS
            _activate(sums0, sums1, extra0, extra1, row, given, ROWS, TOKENS, EXTRA, ACTIVATION, FORMAT, PAIRED)
        end_copies()


@gluon.jit
def _activate(
    sums0, sums1, extra0, extra1, first_row, given,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, ACTIVATION: gl.constexpr, FORMAT: gl.constexpr,
    PAIRED: gl.constexpr,
):  # fmt: skip
    """Activations of a block's sums, written."""
    (
        out, inner, bias, bias_expert, bias_row, bias_up, limit, alpha, levels, shift, experts, place, begin0, end0,
        begin1, end1,
    ) = given  # fmt: skip
    shifts = shift_of(levels, shift, FORMAT), shift_of(levels + TABLE, shift, FORMAT)
    to = out, first_row, inner, shifts, bias, bias_expert, bias_row, bias_up, limit, alpha
    activate(sums0, begin0, end0, gl.load(experts + place), to, ROWS, TOKENS, ACTIVATION)
    if EXTRA:
        activate(extra0, begin0 + TOKENS, end0, gl.load(experts + place), to, ROWS, EXTRA, ACTIVATION)
    if PAIRED:
        activate(sums1, begin1, end1, gl.load(experts + place + 1), to, ROWS, TOKENS, ACTIVATION)
        if EXTRA:
            activate(extra1, begin1 + TOKENS, end1, gl.load(experts + place + 1), to, ROWS, EXTRA, ACTIVATION)


@gluon.jit
def _to_next(ROWS: gl.constexpr, inner, columns, FORMAT: gl.constexpr):
    """Integers from behind a block's last words, other bits and scales to the next ROWS rows' first ones.

    Rows have `inner` columns, and a program reads `columns` of them.
    """
    integers = ROWS * inner - BAND * columns
    return integers // 8, integers * low_words(FORMAT, STEP) // STEP, integers // STEP


@gluon.jit
def activate(
    sums, begin, end, expert, given, ROWS: gl.constexpr, TOKENS: gl.constexpr, ACTIVATION: gl.constexpr
):  # fmt: skip
    """Activations of the sums of a slot's entries, written."""
    out, first_row, inner, shifts, bias, bias_expert, bias_row, bias_up, limit, alpha = given
    value = gated(
        sums, first_row, inner, shifts[0], shifts[1], expert, bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS,
        TOKENS, ACTIVATION,
    )  # fmt: skip
    store_inner(value, out, begin, end, first_row, inner, ROWS, TOKENS)


@gluon.jit(do_not_specialize=["capacity", "bias_expert", "bias_row"])
def project_out(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, weights, bias,
    inner, hidden, capacity, part, out_split, shift, bias_expert, bias_row,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr, PLACES: gl.constexpr,
    FORMAT: gl.constexpr, PAIRED: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """overlapped.project_out of what `project_in` wrote, in splits of `part` columns (whole STEPs, as `inner` is).

    A program does BLOCKS times ROWS rows, one after another, and asks for the next ones' words before it writes; where
    that is more than one, `hidden` is a number of them, `inner` of `part`, and that of PLACES steps.
    """
    slot = 0 if PAIRED else gl.program_id(0) % 2
    program = gl.program_id(0) if PAIRED else gl.program_id(0) // 2
    tile, first_row = share(program, gl.cdiv(hidden, BLOCKS * ROWS), BLOCKS * ROWS, GROUP)
    unit = gl.load(tiles + tile)  # the tables are of two kernels before
    if unit < 0:
        after_the_one_before()  # also here: that this kernel has ended must mean that the one before it has
        return
    skipped = gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    place, begin0, end0, begin1, end1 = entries_of(offsets, unit, slot, skipped, PAIRED)
    if not PAIRED and begin0 >= end0:
        after_the_one_before()
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
    fewer: gl.constexpr = EXTRA // 2 if PAIRED and EXTRA > 16 else 0
    most = gl.maximum(end0 - begin0, end1 - begin1) if PAIRED else end0 - begin0
    if EXTRA and most > TOKENS + fewer:
        _out(buffers, given, ROWS, TOKENS, EXTRA, PLACES, FORMAT, PAIRED, BLOCKS)
    elif fewer and most > TOKENS:
        _out(buffers, given, ROWS, TOKENS, fewer, PLACES, FORMAT, PAIRED, BLOCKS)
    elif most > half:
        _out(buffers, given, ROWS, TOKENS, 0, PLACES, FORMAT, PAIRED, BLOCKS)
    elif most > quarter:
        _out(buffers, given, ROWS, half, 0, PLACES, FORMAT, PAIRED, BLOCKS)
    else:
        _out(buffers, given, ROWS, quarter, 0, PLACES, FORMAT, PAIRED, BLOCKS)


@gluon.jit
def _out(
    buffers, given, ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    FORMAT: gl.constexpr, PAIRED: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    (
        planes, x, out, order, weights, begin0, end0, begin1, end1, steps, slot, place, begin, first_row, hidden, inner,
        shift, levels, experts, bias, bias_expert, bias_row,
    ) = given  # fmt: skip
    k = begin + gl.arange(0, HALF, gl.SliceLayout(0, copy_layout(HALF, gl.num_warps())))
    rest: gl.constexpr = max(EXTRA, 16)
    entries0, rest0 = entries_at(order, begin0, end0, TOKENS), entries_at(order, begin0 + TOKENS, end0, rest)
    entries1, rest1 = entries0, rest0
    if PAIRED:
        entries1, rest1 = entries_at(order, begin1, end1, TOKENS), entries_at(order, begin1 + TOKENS, end1, rest)
    a0, live0 = positions_at(x, begin0, end0, k, inner, HALF, TOKENS)
    b0, more0 = positions_at(x, begin0 + TOKENS, end0, k, inner, HALF, rest)
    a1, live1, b1, more1 = a0, live0, b0, more0
    if PAIRED:
        a1, live1 = positions_at(x, begin1, end1, k, inner, HALF, TOKENS)
        b1, more1 = positions_at(x, begin1 + TOKENS, end1, k, inner, HALF, rest)
    live = live0, live1, more0, more1
    at = _begin_tokens(buffers, (a0, a1, b0, b1), live, steps, TOKENS, EXTRA, PLACES, PAIRED)
    entries0, rest0 = gates_of(entries0, weights), gates_of(rest0, weights)
    entries1, rest1 = gates_of(entries1, weights), gates_of(rest1, weights)
    tables, states, words = _first(buffers, levels + 2 * TABLE, 0, slot, ROWS, PLACES, FORMAT, PAIRED)
    shift = shift_of(levels + 2 * TABLE, shift, FORMAT)
    next_words, next_low, next_scale = _to_next(ROWS, inner, steps * STEP, FORMAT)
    blocks = BLOCKS + (steps >> 30)  # which the compiler does not know
    for block in range(0, blocks):
        more = block + 1 < blocks
        sums0, sums1, extra0, extra1, planes, at, words = _products(
            buffers, planes, at, words, live, steps, more, next_words, next_low, next_scale, tables, states, ROWS,
            TOKENS, EXTRA, PLACES, FORMAT, PAIRED, BLOCKS > 1,
        )  # fmt: skip
        to = out, first_row + block * ROWS, hidden, shift, bias, bias_expert, bias_row
        write(sums0, entries0, begin0, end0, gl.load(experts + place), to, ROWS, TOKENS)
        if EXTRA:
            write(extra0, rest0, begin0 + TOKENS, end0, gl.load(experts + place), to, ROWS, EXTRA)
        if PAIRED:
            write(sums1, entries1, begin1, end1, gl.load(experts + place + 1), to, ROWS, TOKENS)
            if EXTRA:
                write(extra1, rest1, begin1 + TOKENS, end1, gl.load(experts + place + 1), to, ROWS, EXTRA)
    end_copies()


@gluon.jit
def write(sums, entries, begin, end, expert, given, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    """Outputs of the sums of a slot's entries, written."""
    out, first_row, hidden, shift, bias, bias_expert, bias_row = given
    write_outer(
        sums, out, entries, begin, end, first_row, hidden, shift, expert, bias, bias_expert, bias_row, ROWS, TOKENS
    )
