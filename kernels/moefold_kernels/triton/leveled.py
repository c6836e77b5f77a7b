"""The few-bit pair formats on Hopper: the projections over planes of bits, with products running while others decode.

As in overlapped.py and overlapped_pair.py two sets of operand registers take turns; a program serves both slots of a
pair from one reading (PAIRED), or one. A step is 128 columns, two groups: one barrier, words of 64 bytes a row, and the
two scales of a row in one copy of 4 bytes. Integer instructions make operands of them (leveled_decode.py). Any levels
will do; those that are e4m3 numbers have e4m3.py, which is faster up to some 64 entries of an expert.
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
    HALF,
    STEP,
    TOKENS_OF,
    begin_words,
    buffers_of,
    low_words,
    start_tokens,
    start_words,
)
from moefold_kernels.triton.overlapped import (
    after_the_one_before,
    barrier,
    copy_layout,
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
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Sums [ROWS, TOKENS] of both slots (of one, the second's are nothing) over `steps` times STEP columns.

    The first STAGES - 2 steps' words have been asked for; `planes` point behind them. Rows 8 to 15 of every 16 have
    the levels at `levels + up`.
    """
    gl.assume(steps > 0)
    mma: gl.constexpr = product_layout(TOKENS, gl.num_warps())
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    units: gl.constexpr = units_layout(ROWS, gl.num_warps())
    w, low, scale = planes
    x0, x1 = x
    for first in gl.static_range(STAGES - 2):
        start_tokens(buffers, (x0, x1), live, first, first < steps, PAIRED)
        x0 += STEP
        x1 += STEP
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
    for step in range(0, steps):
        async_copy.wait_group(STAGES - 3)
        barrier()  # this step has come, and nobody reads step - 2 any more, whose place is next
        ahead = step + STAGES - 2
        stage, to = step % STAGES, ahead % STAGES
        start_words(buffers, (w, low, scale), to, ahead < steps, FORMAT)
        start_tokens(buffers, (x0, x1), live, to, ahead < steps, PAIRED)
        w += STEP // 8
        if FORMAT != "pair4":
            low += low_words(FORMAT, STEP)
        scale += 1
        x0 += STEP
        x1 += STEP
        for half in gl.static_range(2):
            ours, theirs = decoded(buffers, stage, gather, signs, tables, half, ROWS, FORMAT, PAIRED, left)
            right = buffers[TOKENS_OF + half].index(stage).permute((1, 0))
            sums0 = warpgroup_mma(ours, right, sums0, is_async=True)
            if PAIRED:
                right = buffers[TOKENS_OF + 2 + half].index(stage).permute((1, 0))
                sums1 = warpgroup_mma(theirs, right, sums1, is_async=True)
                sums0, sums1 = warpgroup_mma_wait(2, deps=(sums0, sums1))
                sums1 = warpgroup_mma_init(sums1)
            else:
                sums0 = warpgroup_mma_wait(1, deps=(sums0,))
            sums0 = warpgroup_mma_init(sums0)
    return warpgroup_mma_wait(0, deps=(sums0, sums1))


@gluon.jit(do_not_specialize=["top_k", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"])
def project_in(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, capacity, x_row, w_up, shift, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, ACTIVATION: gl.constexpr,
    FORMAT: gl.constexpr, PAIRED: gl.constexpr,
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
    skipped = gl.load(tiles + capacity + tile) * TOKENS
    place, begin0, end0, begin1, end1 = entries_of(offsets, unit, slot, skipped, PAIRED)
    if not PAIRED and begin0 >= end0:
        return
    buffers = buffers_of(2 * ROWS, TOKENS, STAGES, FORMAT, PAIRED)
    planes = planes_at(words, low, scale, unit, first_row, inner, hidden, 0, w_up, ROWS, FORMAT, 1, True)
    steps = hidden // STEP
    planes = begin_words(buffers, planes, steps, STAGES, FORMAT)
    k = gl.arange(0, HALF, gl.SliceLayout(0, copy_layout(HALF, gl.num_warps())))
    a0, live0 = tokens_at(x, order, begin0, end0, k, top_k, x_row, HALF, TOKENS)
    a1, live1 = a0, live0
    if PAIRED:
        a1, live1 = tokens_at(x, order, begin1, end1, k, top_k, x_row, HALF, TOKENS)
    sums0, sums1 = _products(
        buffers, planes, (a0, a1), (live0, live1), steps, slot, levels, TABLE, 2 * ROWS, TOKENS, STAGES,
        FORMAT, PAIRED,
    )  # fmt: skip
    write_inner(
        sums0, out, begin0, end0, first_row, inner, shift, shift, gl.load(experts + place), bias, bias_expert,
        bias_row, bias_up, limit, alpha, ROWS, TOKENS, ACTIVATION,
    )  # fmt: skip
    if PAIRED:
        write_inner(
            sums1, out, begin1, end1, first_row, inner, shift, shift, gl.load(experts + place + 1), bias, bias_expert,
            bias_row, bias_up, limit, alpha, ROWS, TOKENS, ACTIVATION,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["capacity", "bias_expert", "bias_row"])
def project_out(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, weights, bias,
    inner, hidden, capacity, part, out_split, shift, bias_expert, bias_row,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, FORMAT: gl.constexpr,
    PAIRED: gl.constexpr,
):  # fmt: skip
    """overlapped.project_out, in splits of `part` columns (a number of STEPs, as `inner` is)."""
    slot = 0 if PAIRED else gl.program_id(0) % 2
    program = gl.program_id(0) if PAIRED else gl.program_id(0) // 2
    tile, first_row = share(program, gl.cdiv(hidden, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)  # the tables are of two kernels before
    if unit < 0:
        return
    skipped = gl.load(tiles + capacity + tile) * TOKENS
    place, begin0, end0, begin1, end1 = entries_of(offsets, unit, slot, skipped, PAIRED)
    if not PAIRED and begin0 >= end0:
        return
    begin = gl.program_id(1) * part
    out += gl.program_id(1).to(gl.int64) * out_split
    buffers = buffers_of(ROWS, TOKENS, STAGES, FORMAT, PAIRED)
    planes = planes_at(words, low, scale, unit, first_row, hidden, inner, begin, 0, ROWS, FORMAT, 1, False)
    steps = gl.minimum(inner - begin, part) // STEP
    planes = begin_words(buffers, planes, steps, STAGES, FORMAT)
    after_the_one_before()
    k = begin + gl.arange(0, HALF, gl.SliceLayout(0, copy_layout(HALF, gl.num_warps())))
    a0, live0 = positions_at(x, begin0, end0, k, inner, HALF, TOKENS)
    a1, live1 = a0, live0
    if PAIRED:
        a1, live1 = positions_at(x, begin1, end1, k, inner, HALF, TOKENS)
    sums0, sums1 = _products(
        buffers, planes, (a0, a1), (live0, live1), steps, slot, levels + 2 * TABLE, 0, ROWS, TOKENS, STAGES,
        FORMAT, PAIRED,
    )  # fmt: skip
    write_outer(
        sums0, out, order, weights, begin0, end0, first_row, hidden, shift, gl.load(experts + place), bias,
        bias_expert, bias_row, ROWS, TOKENS,
    )  # fmt: skip
    if PAIRED:
        write_outer(
            sums1, out, order, weights, begin1, end1, first_row, hidden, shift, gl.load(experts + place + 1), bias,
            bias_expert, bias_row, ROWS, TOKENS,
        )  # fmt: skip
