"""The few-bit pair formats' many tokens of one slot by warps apart (apart.py): four copy, and eight multiply.

A stage is half a step: 64 columns of tokens, and with a step's first half the words of both.
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

from moefold_kernels.triton.apart import (
    COPYING,
    barriers,
    entries_and_gates,
    halves,
    keep,
    rows_in,
    rows_out,
    write_kept,
)
from moefold_kernels.triton.leveled import TABLE, activate, shift_of, write
from moefold_kernels.triton.leveled_operands import decoded, read, right, scale_of, tables_of
from moefold_kernels.triton.leveled_planes import entries_of, in_unit, rows_of
from moefold_kernels.triton.leveled_stage import (
    BAND,
    EXTRA_OF,
    HALF,
    STEP,
    TOKENS_OF,
    at,
    buffers_of,
    low_words,
    plane_layout,
    scale_layout,
    start_words,
)
from moefold_kernels.triton.overlapped import (
    after_the_one_before,
    product_layout,
    share,
)


@gluon.jit
def _plane(plane, unit, row, rows, words, step, WORDS: gl.constexpr, layout: gl.constexpr):
    """leveled_planes._plane_at as a base and offsets, within a unit."""
    base = plane + unit.to(gl.int64) * rows * words + step * (BAND * WORDS)
    offset = in_unit(row, words, WORDS)
    if WORDS > 1:  # whole steps: 16 bytes
        base, offset = gl.multiple_of(base, 16), gl.multiple_of(offset, min(WORDS, 4))
    return base, offset[:, None] + gl.arange(0, WORDS, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _planes(
    words, low, scale, unit, first_row, size, columns, begin, w_up,
    ROWS: gl.constexpr, FORMAT: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """leveled_planes.planes_at: bases of words, other bits and scales, and offsets of each."""
    wide: gl.constexpr = plane_layout(STEP // 8, gl.num_warps())
    lows: gl.constexpr = plane_layout(low_words(FORMAT, STEP), gl.num_warps())
    few: gl.constexpr = scale_layout(1, gl.num_warps())
    each: gl.constexpr = low_words(FORMAT, STEP)
    rows = 2 * size if GATED else size
    row = rows_of(first_row, size, w_up, ROWS, GATED, wide)
    w, of_words = _plane(words, unit, row, rows, columns // 8, begin // STEP, STEP // 8, wide)
    row = rows_of(first_row, size, w_up, ROWS, GATED, lows)
    less, of_low = _plane(low, unit, row, rows, columns * each // STEP, begin // STEP, each, lows)
    row = rows_of(first_row, size, w_up, ROWS, GATED, few)
    s, of_scales = _plane(scale, unit, row, rows, columns // STEP, begin // STEP, 1, few)
    return (w, less, s), (of_words, of_low, of_scales)


@gluon.jit
def _copy(
    buffers, come, free, bases, behind, offsets, x, tokens, more, steps,
    TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Bring tokens from `x` on and words from `bases` on, for `steps` times STEP columns; beyond, zeros.

    Offsets are elements: `tokens` [TOKENS, HALF], `more` [EXTRA, HALF], each plane's [rows, words]. All of that BLOCKS
    times, from one block's last step `behind` steps further on in planes to the next one's first, for the same tokens;
    where that is more than once, `steps` is a number of PLACES.
    """
    w, low, scale = bases
    phase = 1  # nothing has been read: as if all were free
    for block in range(0, BLOCKS):
        for first in range(0, steps, PLACES):
            for place in gl.static_range(PLACES):
                wanted = True if BLOCKS > 1 else first + place < steps
                for half in gl.static_range(2):
                    mbarrier.wait(free[2 * place + half], phase)
                    if half == 0:
                        of_step = w + offsets[0], low + offsets[1], scale + offsets[2]
                        start_words(buffers, of_step, place, wanted, FORMAT)
                        w += BAND * (STEP // 8)
                        low += BAND * low_words(FORMAT, STEP)
                        scale += BAND
                    to = buffers[at(TOKENS_OF + half, place)].index(0).slice(0, TOKENS, 0)
                    async_copy.async_copy_global_to_shared(to, x + tokens, mask=wanted)
                    if EXTRA:
                        to = buffers[at(EXTRA_OF + half, place)].index(0)
                        async_copy.async_copy_global_to_shared(to, x + more, mask=wanted)
                    async_copy.mbarrier_arrive(come[2 * place + half], increment_count=False)
                    x += HALF
            phase ^= 1
        further = behind + ((block + steps) >> 30)  # so that the compiler does not keep what comes of it
        w += further * (BAND * (STEP // 8))
        low += further * (BAND * low_words(FORMAT, STEP))
        scale += further * BAND
        x -= steps * STEP
    async_copy.wait_group(0)


@gluon.jit
def _copy_in(
    given, ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
    BLOCKS: gl.constexpr,
):  # fmt: skip
    """Copying warps' part of the first projection."""
    (
        buffers, come, free, x, words, low, scale, order, unit, first_row, begin, end, hidden, inner, w_up, top_k,
        x_row, steps,
    ) = given  # fmt: skip
    behind = ROWS // BAND * (hidden // STEP) - steps  # as far for gate rows as for up rows
    bases, offsets = _planes(words, low, scale, unit, first_row, inner, hidden, 0, w_up, ROWS, FORMAT, True)
    rest: gl.constexpr = max(EXTRA, 16)
    tokens = rows_in(order, begin, end, top_k, x_row, HALF, TOKENS)
    more = rows_in(order, begin + TOKENS, end, top_k, x_row, HALF, rest)
    _copy(
        buffers, come, free, bases, behind, offsets, x, tokens, more, steps, TOKENS, EXTRA, PLACES, FORMAT, BLOCKS
    )  # fmt: skip


@gluon.jit
def _copy_out(
    given, ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
    BLOCKS: gl.constexpr,
):  # fmt: skip
    """The same of down's, of columns from `skipped` on."""
    (
        buffers, come, free, x, words, low, scale, unit, first_row, begin, end, hidden, inner, skipped, steps,
    ) = given  # fmt: skip
    behind = ROWS // BAND * (inner // STEP) - steps
    bases, offsets = _planes(words, low, scale, unit, first_row, hidden, inner, skipped, 0, ROWS, FORMAT, False)
    rest: gl.constexpr = max(EXTRA, 16)
    tokens = rows_out(begin, end, inner, HALF, TOKENS)
    more = rows_out(begin + TOKENS, end, inner, HALF, rest)
    after_the_one_before()
    _copy(
        buffers, come, free, bases, behind, offsets, x + skipped, tokens, more, steps, TOKENS, EXTRA, PLACES, FORMAT,
        BLOCKS,
    )  # fmt: skip


@gluon.jit
def _products(
    buffers, come, free, steps, phase, tables, states,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
):  # fmt: skip
    """Sums [ROWS, TOKENS] and [ROWS, EXTRA] of one slot, as leveled._products, and the next turn's `phase`."""
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
            for half in gl.static_range(2):
                mbarrier.wait(come[2 * place + half], phase)
                fence_async_shared()  # what was copied is what products read
                if half == 0:
                    words = read(buffers, place, ROWS, FORMAT)
                scale = scale_of(words, half, FORMAT, False)
                for part in gl.static_range(2):
                    ours, _ = decoded(words, scale, half, part, tables, states, ROWS, FORMAT, False, left)
                    sums = warpgroup_mma(
                        ours, right(buffers, at(TOKENS_OF + half, place), nothing, part, TOKENS), sums, is_async=True
                    )
                    if EXTRA:
                        ours = gl.convert_layout(ours, left_extra, assert_trivial=True)
                        extra = warpgroup_mma(
                            ours, right(buffers, at(EXTRA_OF + half, place), nothing, part, EXTRA), extra, is_async=True
                        )
                        sums, extra = warpgroup_mma_wait(2, deps=(sums, extra))  # the other set's products have ended
                        extra = warpgroup_mma_init(extra)
                    else:
                        sums = warpgroup_mma_wait(1, deps=(sums,))
                    sums = warpgroup_mma_init(sums)
                    if part == 0:  # so nobody of this thread's reads the half before
                        if 2 * place + half > 0:
                            async_copy.mbarrier_arrive(free[2 * place + half - 1], increment_count=False)
                        elif first > 0:
                            async_copy.mbarrier_arrive(free[2 * PLACES - 1], increment_count=False)
        phase ^= 1
    sums, extra = warpgroup_mma_wait(0, deps=(sums, extra))
    return sums, extra, phase


@gluon.jit
def _multiply(
    buffers, come, free, steps, slot, levels, up,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
):  # fmt: skip
    """Multiplying warps' part."""
    tables, states = tables_of(levels, up, slot, ROWS, False, FORMAT)
    phase = 0
    sums, extra, phase = _products(
        buffers, come, free, steps, phase, tables, states, ROWS, TOKENS, EXTRA, PLACES, FORMAT
    )  # fmt: skip
    return sums, extra


@gluon.jit
def _multiply_out(
    buffers, come, free, order, weights, begin, end, steps, slot, levels,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
):  # fmt: skip
    """The same of down's, with entries and gate weights, which are read while the first copies come."""
    after_the_one_before()
    entries, more = entries_and_gates(order, weights, begin, end, TOKENS, EXTRA)
    sums, extra = _multiply(buffers, come, free, steps, slot, levels, 0, ROWS, TOKENS, EXTRA, PLACES, FORMAT)
    return sums, extra, entries, more


@gluon.jit
def _multiply_in_turn(
    buffers, come, free, order, weights, begin, end, steps, slot, levels, given,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
    BLOCKS: gl.constexpr,
):  # fmt: skip
    """The same for BLOCKS blocks of rows, each of which is written while the next one's copies come."""
    out, first_row, hidden, shift, experts, place, bias, bias_expert, bias_row = given
    after_the_one_before()
    kept, more = keep(order, weights, begin, end, TOKENS, EXTRA)
    tables, states = tables_of(levels, 0, slot, ROWS, False, FORMAT)
    phase = 0
    for block in range(0, BLOCKS + (end >> 30)):  # a number that the compiler does not know
        sums, extra, phase = _products(
            buffers, come, free, steps, phase, tables, states, ROWS, TOKENS, EXTRA, PLACES, FORMAT
        )  # fmt: skip
        async_copy.mbarrier_arrive(free[2 * PLACES - 1], increment_count=False)
        to = (
            out, first_row + block * ROWS, hidden, shift_of(levels, shift, FORMAT), gl.load(experts + place), bias,
            bias_expert, bias_row,
        )  # fmt: skip
        first = begin + ((block + end) >> 30)  # so that the compiler does not keep what comes of it
        write_kept(sums, extra, kept, more, first, end, to, ROWS, TOKENS, EXTRA)


@gluon.jit
def _activate_in_turn(
    buffers, come, free, begin, end, steps, slot, levels, given,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, ACTIVATION: gl.constexpr,
    FORMAT: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """The same for blocks of ROWS gate rows and their up rows; the extra sums leave registers first."""
    out, first_row, inner, shift, experts, place, bias, bias_expert, bias_row, bias_up, limit, alpha = given
    tables, states = tables_of(levels, TABLE, slot, 2 * ROWS, False, FORMAT)
    phase = 0
    for block in range(0, BLOCKS + (end >> 30)):  # as above
        sums, extra, phase = _products(
            buffers, come, free, steps, phase, tables, states, 2 * ROWS, TOKENS, EXTRA, PLACES, FORMAT
        )  # fmt: skip
        async_copy.mbarrier_arrive(free[2 * PLACES - 1], increment_count=False)
        shifts = shift_of(levels, shift, FORMAT), shift_of(levels + TABLE, shift, FORMAT)
        to = out, first_row + block * ROWS, inner, shifts, bias, bias_expert, bias_row, bias_up, limit, alpha
        first = begin + ((block + end) >> 30)  # as above
        expert = gl.load(experts + place)
        if EXTRA:
            activate(extra, first + TOKENS, end, expert, to, ROWS, EXTRA, ACTIVATION)
        parts = halves(sums, 2 * ROWS, TOKENS)
        n: gl.constexpr = TOKENS // len(parts)
        for part in gl.static_range(TOKENS // n):
            activate(parts[part], first + n * part, end, expert, to, ROWS, n, ACTIVATION)


@gluon.jit(do_not_specialize=["top_k", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"])
def project_in(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, capacity, x_row, w_up, shift, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, FORMAT: gl.constexpr, REGISTERS: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """leveled.project_in for one slot; copying warps have so many REGISTERS a thread.

    A program does BLOCKS times ROWS gate rows and their up rows, one after another; where that is more than one,
    `inner` is a number of them, and `hidden` of PLACES steps.
    """
    slot = gl.program_id(0) % 2
    after_the_one_before()
    tile, first_row = share(gl.program_id(0) // 2, gl.cdiv(inner, BLOCKS * ROWS), BLOCKS * ROWS, GROUP)
    unit = gl.load(tiles + tile)
    if unit < 0:
        return
    skipped = gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    place, begin, end, _, _ = entries_of(offsets, unit, slot, skipped, False)
    if begin >= end:
        return
    buffers = buffers_of(2 * ROWS, TOKENS, EXTRA, PLACES, FORMAT, False)
    come, free = barriers(2 * PLACES)
    given = (
        come, free, x, words, low, scale, order, unit, first_row, begin, end, hidden, inner, w_up, top_k, x_row, slot,
        place, levels, out, shift, experts, bias, bias_expert, bias_row, bias_up, limit, alpha,
    )  # fmt: skip
    half: gl.constexpr = max(TOKENS // 2, 8)
    quarter: gl.constexpr = max(TOKENS // 4, 8)
    if EXTRA and end - begin > TOKENS:
        _in(buffers, given, ROWS, TOKENS, EXTRA, PLACES, ACTIVATION, FORMAT, REGISTERS, BLOCKS)
    elif end - begin > half:
        _in(buffers, given, ROWS, TOKENS, 0, PLACES, ACTIVATION, FORMAT, REGISTERS, BLOCKS)
    elif end - begin > quarter:
        _in(buffers, given, ROWS, half, 0, PLACES, ACTIVATION, FORMAT, REGISTERS, BLOCKS)
    else:
        _in(buffers, given, ROWS, quarter, 0, PLACES, ACTIVATION, FORMAT, REGISTERS, BLOCKS)


@gluon.jit
def _in(
    buffers, given, ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, FORMAT: gl.constexpr, REGISTERS: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    (
        come, free, x, words, low, scale, order, unit, first_row, begin, end, hidden, inner, w_up, top_k, x_row, slot,
        place, levels, out, shift, experts, bias, bias_expert, bias_row, bias_up, limit, alpha,
    ) = given  # fmt: skip
    steps = hidden // STEP
    copied = (
        buffers, come, free, x, words, low, scale, order, unit, first_row, begin, end, hidden, inner, w_up, top_k,
        x_row, steps,
    )  # fmt: skip
    if BLOCKS > 1:
        to = out, first_row, inner, shift, experts, place, bias, bias_expert, bias_row, bias_up, limit, alpha
        gl.warp_specialize(
            [
                (_activate_in_turn, (
                    buffers, come, free, begin, end, steps, slot, levels, to, ROWS, TOKENS, EXTRA, PLACES, ACTIVATION,
                    FORMAT, BLOCKS,
                )),
                (_copy_in, (copied, ROWS, TOKENS, EXTRA, PLACES, FORMAT, BLOCKS)),
            ],
            [COPYING], [REGISTERS],
        )  # fmt: skip
    else:
        sums, extra = gl.warp_specialize(
            [
                (_multiply, (
                    buffers, come, free, steps, slot, levels, TABLE, 2 * ROWS, TOKENS, EXTRA, PLACES, FORMAT,
                )),
                (_copy_in, (copied, ROWS, TOKENS, EXTRA, PLACES, FORMAT, BLOCKS)),
            ],
            [COPYING], [REGISTERS],
        )  # fmt: skip
        shifts = shift_of(levels, shift, FORMAT), shift_of(levels + TABLE, shift, FORMAT)
        given = out, first_row, inner, shifts, bias, bias_expert, bias_row, bias_up, limit, alpha
        activate(sums, begin, end, gl.load(experts + place), given, ROWS, TOKENS, ACTIVATION)
        if EXTRA:
            activate(extra, begin + TOKENS, end, gl.load(experts + place), given, ROWS, EXTRA, ACTIVATION)


@gluon.jit(do_not_specialize=["capacity", "bias_expert", "bias_row"])
def project_out(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, weights, bias,
    inner, hidden, capacity, part, out_split, shift, bias_expert, bias_row,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr, PLACES: gl.constexpr,
    FORMAT: gl.constexpr, REGISTERS: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """leveled.project_out for one slot."""
    slot = gl.program_id(0) % 2
    tile, first_row = share(gl.program_id(0) // 2, gl.cdiv(hidden, BLOCKS * ROWS), BLOCKS * ROWS, GROUP)
    unit = gl.load(tiles + tile)  # the tables are of two kernels before
    if unit < 0:
        after_the_one_before()  # also here: that this kernel has ended must mean that the one before it has
        return
    skipped = gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    place, begin, end, _, _ = entries_of(offsets, unit, slot, skipped, False)
    if begin >= end:
        after_the_one_before()
        return
    out += gl.program_id(1).to(gl.int64) * out_split
    buffers = buffers_of(ROWS, TOKENS, EXTRA, PLACES, FORMAT, False)
    come, free = barriers(2 * PLACES)
    given = (
        come, free, x, words, low, scale, order, weights, unit, first_row, begin, end, hidden, inner, part, slot,
        place, levels, out, shift, experts, bias, bias_expert, bias_row,
    )  # fmt: skip
    half: gl.constexpr = max(TOKENS // 2, 8)
    quarter: gl.constexpr = max(TOKENS // 4, 8)
    if EXTRA and end - begin > TOKENS:
        _out(buffers, given, ROWS, TOKENS, EXTRA, PLACES, FORMAT, REGISTERS, BLOCKS)
    elif end - begin > half:
        _out(buffers, given, ROWS, TOKENS, 0, PLACES, FORMAT, REGISTERS, BLOCKS)
    elif end - begin > quarter:
        _out(buffers, given, ROWS, half, 0, PLACES, FORMAT, REGISTERS, BLOCKS)
    else:
        _out(buffers, given, ROWS, quarter, 0, PLACES, FORMAT, REGISTERS, BLOCKS)


@gluon.jit
def _out(
    buffers, given, ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    FORMAT: gl.constexpr, REGISTERS: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    (
        come, free, x, words, low, scale, order, weights, unit, first_row, begin, end, hidden, inner, part, slot, place,
        levels, out, shift, experts, bias, bias_expert, bias_row,
    ) = given  # fmt: skip
    skipped = gl.program_id(1) * part
    steps = gl.minimum(inner - skipped, part) // STEP
    copied = (
        buffers, come, free, x, words, low, scale, unit, first_row, begin, end, hidden, inner, skipped, steps,
    )  # fmt: skip
    if BLOCKS > 1:
        to = out, first_row, hidden, shift, experts, place, bias, bias_expert, bias_row
        gl.warp_specialize(
            [
                (_multiply_in_turn, (
                    buffers, come, free, order, weights, begin, end, steps, slot, levels + 2 * TABLE, to, ROWS, TOKENS,
                    EXTRA, PLACES, FORMAT, BLOCKS,
                )),
                (_copy_out, (copied, ROWS, TOKENS, EXTRA, PLACES, FORMAT, BLOCKS)),
            ],
            [COPYING], [REGISTERS],
        )  # fmt: skip
    else:
        sums, extra, entries, more = gl.warp_specialize(
            [
                (_multiply_out, (
                    buffers, come, free, order, weights, begin, end, steps, slot, levels + 2 * TABLE, ROWS, TOKENS,
                    EXTRA, PLACES, FORMAT,
                )),
                (_copy_out, (copied, ROWS, TOKENS, EXTRA, PLACES, FORMAT, BLOCKS)),
            ],
            [COPYING], [REGISTERS],
        )  # fmt: skip
        given = out, first_row, hidden, shift_of(levels + 2 * TABLE, shift, FORMAT), bias, bias_expert, bias_row
        write(sums, entries, begin, end, gl.load(experts + place), given, ROWS, TOKENS)
        if EXTRA:
            write(extra, more, begin + TOKENS, end, gl.load(experts + place), given, ROWS, EXTRA)
