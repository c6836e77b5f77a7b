"""The few-bit pair formats on Hopper: the projections with e4m3 operands, and scales applied to sums of 64 columns.

Levels that are a factor times an e4m3 number (moefold_kernels/eighths.py) need not become bf16: an operand register
holds four of them instead of two, and making it takes a third of the instructions (e4m3_decode.py). What is lost
otherwise is made up for: tokens are sums of two e4m3 numbers (e4m3_tokens.py), whose two products take as long as one
of bf16; the scale of a row and group multiplies the group's sum, in float32. So a level times its scale is not
rounded to bf16 first, as the definition has it: for random ones that is 1.7e-3 of their norm.

A step is 256 columns, or 128 (e4m3_stage.py). Products of a group run, their sums are waited for and added to the
totals, and the next products start. The next group's decoding stands before that wait, but ptxas moves it behind, where
it is faster, too (docs/kernels.md): what runs beside products is other warps' decoding.
"""

# ruff: noqa: RUF005 - the compiler knows tuples' `+`, and no `*given`
# mypy: disable-error-code=assignment
# (tuples that grow)

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from moefold_kernels.levels import E4M3, INTEGERS
from moefold_kernels.triton.decode import RESTORE
from moefold_kernels.triton.e4m3_operands import decoded, scale_of, scales_of, units_layout, words_of
from moefold_kernels.triton.e4m3_stage import (
    FACTOR_OF,
    FEW,
    TOKENS_OF,
    begin_words,
    buffers_of,
    factor_layout,
    product_layout,
    start_tokens,
    start_words,
    token_layout,
    width,
)
from moefold_kernels.triton.e4m3_tokens import write_terms
from moefold_kernels.triton.leveled_planes import entries_of, planes_at
from moefold_kernels.triton.leveled_stage import HALF, STEP, low_words
from moefold_kernels.triton.overlapped import activated, after_the_one_before, barrier, share, write_outer

TABLE, CODES, FACTOR = (gl.constexpr(number) for number in (INTEGERS, E4M3, 24))
"""Integers of a matrix in `levels`; where those for this file begin; and the factor among them (levels.e4m3_table)."""


@gluon.jit
def _factor(levels):
    return gl.load(levels + CODES + FACTOR).to(gl.float32, bitcast=True)


@gluon.jit
def _right(buffers, number: gl.constexpr, stage, term: gl.constexpr, TOKENS: gl.constexpr):
    """A group's tokens as a product's right operand: both terms side by side, or one."""
    found = buffers[number].index(stage)
    if TOKENS > FEW:
        found = found.slice(term * TOKENS, TOKENS, 0)
    return found.permute((1, 0))


@gluon.jit
def _start_product(buffers, number: gl.constexpr, stage, operand, sums, TOKENS: gl.constexpr):
    sums = warpgroup_mma(operand, _right(buffers, number, stage, 0, TOKENS), sums, use_acc=False, is_async=True)
    if TOKENS > FEW:
        sums = warpgroup_mma(operand, _right(buffers, number, stage, 1, TOKENS), sums, is_async=True)
    return sums


@gluon.jit
def _added(total, sums, scale, buffers, number: gl.constexpr, stage, FACTORS: gl.constexpr):
    """`total` and the sums of a group, scaled by row, and by token where those have a factor for each group."""
    if FACTORS:
        own = buffers[number].index(stage).load(gl.SliceLayout(0, total.type.layout))
        total += sums * (scale[:, None] * own[None, :])
    else:
        total += sums * scale[:, None]
    return total


@gluon.jit
def _before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _after(stage, STAGES: gl.constexpr):
    return gl.where(stage == STAGES - 1, 0, stage + 1)


@gluon.jit
def _terms_added(total, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    """[ROWS, TOKENS]: the sums over both terms, where they were columns of one product."""
    if TOKENS <= FEW:
        total = gl.sum(gl.reshape(total, (ROWS, 2, TOKENS)), axis=1)
    return total


@gluon.jit
def _products(
    buffers, planes, x, live, factors, factor_live, steps, slot, levels, up,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr,
    FACTORS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Sums [ROWS, TOKENS] of both slots (of one, the second's are nothing) over `steps` times HALVES * STEP columns.

    The first STAGES - 2 steps' words have been asked for; `planes` point behind them. Rows 8 to 15 of every 16 have
    the levels at `levels + up`.
    """
    gl.assume(steps > 0)
    mma: gl.constexpr = product_layout(TOKENS, gl.num_warps())
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    units: gl.constexpr = units_layout(ROWS, gl.num_warps())
    of_rows: gl.constexpr = gl.SliceLayout(1, mma)
    groups: gl.constexpr = 2 * HALVES
    w, low, scale = planes
    x0, x1 = x
    f0, f1 = factors
    for first in gl.static_range(STAGES - 2):
        start_tokens(buffers, (x0, x1), live, (f0, f1), factor_live, first, first < steps, PAIRED, FACTORS, HALVES)
        x0 += 2 * HALF * groups
        x1 += 2 * HALF * groups
        if FACTORS:
            f0 += groups
            f1 += groups
    row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, units)))
    thread = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, units)))
    thread = levels + CODES + gl.expand_dims(gl.expand_dims(thread, 0), 0)  # [1, 1, 4]: each has its own
    own = thread + gl.where(gl.expand_dims(gl.expand_dims(row, 1), 2) % 16 >= 8, up, 0)
    tables = gl.load(own), gl.load(own + 4)
    first = 8 if PAIRED else 8 + 8 * slot
    states = gl.load(thread + first), gl.load(thread + first + 4)
    if PAIRED:
        states = states + (gl.load(thread + 16), gl.load(thread + 20))
    total0 = gl.zeros((ROWS, width(TOKENS)), gl.float32, mma)
    total1 = total0
    sums0 = warpgroup_mma_init(total0)
    sums1 = warpgroup_mma_init(total0)
    before = gl.zeros((ROWS,), gl.float32, of_rows)
    stage = steps * 0
    to = stage + STAGES - 2
    held = stage  # planes have a stage less (e4m3_stage.py)
    held_to = to % (STAGES - 1)
    for step in range(0, steps):
        async_copy.wait_group(STAGES - 3)
        barrier()  # this step has come, and nobody reads tokens of step - 2 or words of step - 1, whose places are next
        ahead = step + STAGES - 2 < steps
        start_words(buffers, (w, low, scale), held_to, ahead, FORMAT, HALVES)
        start_tokens(buffers, (x0, x1), live, (f0, f1), factor_live, to, ahead, PAIRED, FACTORS, HALVES)
        w += STEP // 8 * HALVES
        if FORMAT != "pair4":
            low += low_words(FORMAT, STEP) * HALVES
        scale += HALVES
        x0 += 2 * HALF * groups
        x1 += 2 * HALF * groups
        if FACTORS:
            f0 += groups
            f1 += groups
        scales = scales_of(buffers, held, ROWS, HALVES, of_rows)
        for half in gl.static_range(HALVES):
            words = words_of(buffers, half, held, ROWS, FORMAT)
            for part in gl.static_range(2):
                ours, theirs = decoded(words[part], words[2 + part], tables, states, ROWS, FORMAT, PAIRED, left)
                # the group before, which is of the step before if this is the first; before that nothing times anything
                last = stage
                if half + part == 0:
                    last = gl.where(step > 0, _before(stage, STAGES), stage)
                done0, done1 = _finished(sums0, sums1, PAIRED)
                total0, total1 = _both_added(
                    total0, total1, done0, done1, before, buffers, (2 * half + part + groups - 1) % groups, last,
                    PAIRED, FACTORS,
                )  # fmt: skip
                # nothing to wait for, but otherwise LLVM adds only after the products below, which then wait for it
                total0, total1 = warpgroup_mma_wait(0, deps=(total0, total1))
                sums0 = _start_product(buffers, TOKENS_OF + 2 * half + part, stage, ours, done0, TOKENS)
                if PAIRED:
                    sums1 = _start_product(buffers, TOKENS_OF + 4 + 2 * half + part, stage, theirs, done1, TOKENS)
                before = scale_of(scales[half], part)
        stage = _after(stage, STAGES)
        to = _after(to, STAGES)
        held = _after(held, STAGES - 1)
        held_to = _after(held_to, STAGES - 1)
    done0, done1 = _finished(sums0, sums1, PAIRED)
    total0, total1 = _both_added(
        total0, total1, done0, done1, before, buffers, groups - 1, _before(stage, STAGES), PAIRED, FACTORS
    )
    return _terms_added(total0, ROWS, TOKENS), _terms_added(total1, ROWS, TOKENS)


@gluon.jit
def _finished(sums0, sums1, PAIRED: gl.constexpr):
    if PAIRED:
        sums0, sums1 = warpgroup_mma_wait(0, deps=(sums0, sums1))
    else:
        sums0 = warpgroup_mma_wait(0, deps=(sums0,))
        sums1 = sums0
    return sums0, sums1


@gluon.jit
def _both_added(
    total0, total1, sums0, sums1, scale, buffers, group: gl.constexpr, stage, PAIRED: gl.constexpr,
    FACTORS: gl.constexpr,
):  # fmt: skip
    if PAIRED:
        total1 = _added(total1, sums1, scale, buffers, FACTOR_OF + 4 + group, stage, FACTORS)
    total0 = _added(total0, sums0, scale, buffers, FACTOR_OF + group, stage, FACTORS)
    return total0, total1


@gluon.jit
def _terms_at(x, rows, live, columns, skipped, TOKENS: gl.constexpr):
    """Pointers to both terms of a group [2 * TOKENS, 64] of rows of `x`, given twice as e4m3_stage.py wants them."""
    layout: gl.constexpr = token_layout(gl.num_warps())
    n = gl.arange(0, 2 * TOKENS, gl.SliceLayout(1, layout))
    at = rows.to(gl.int64) * (2 * columns) + n // TOKENS * HALF + 2 * skipped
    at = gl.multiple_of(at, 16)
    return x + at[:, None] + gl.arange(0, HALF, gl.SliceLayout(0, layout))[None, :], live[:, None]


@gluon.jit
def _twice(begin, end, TOKENS: gl.constexpr):
    """The positions of a tile's entries for _terms_at, and whether they are."""
    layout: gl.constexpr = gl.SliceLayout(1, token_layout(gl.num_warps()))
    n = begin + gl.arange(0, 2 * TOKENS, layout) % TOKENS
    return n, n < end


@gluon.jit
def _scales_at(factors, begin, end, groups, skipped, TOKENS: gl.constexpr):
    n = begin + gl.arange(0, width(TOKENS), factor_layout(gl.num_warps())) % TOKENS
    return factors + gl.where(n < end, n, 0).to(gl.int64) * groups + skipped // HALF, n < end


@gluon.jit
def _write_inner(
    sums, token_factors, out, factors, order, begin, end, first_row, inner, top_k, levels, expert, bias, bias_expert,
    bias_row, bias_up, limit, alpha, ROWS: gl.constexpr, TOKENS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """overlapped.write_inner, with factors of tokens and matrices, and e4m3 terms as the result."""
    n = begin + gl.arange(0, TOKENS, gl.SliceLayout(0, sums.type.layout))
    token = gl.load(order + n, mask=n < end, other=0) // top_k
    sums *= gl.load(token_factors + token, mask=n < end, other=0.0)[None, :]
    gate, up = gl.split(gl.permute(gl.reshape(sums, (ROWS // 8, 2, 8, TOKENS)), (0, 2, 3, 1)))
    gate, up = gl.reshape(gate, (ROWS, TOKENS)) * _factor(levels), gl.reshape(up, (ROWS, TOKENS))
    up *= _factor(levels + TABLE)
    value = activated(
        gate, up, first_row, inner, expert, bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, ACTIVATION
    )
    write_terms(value, out, factors, begin, end, first_row, inner, ROWS, TOKENS)


@gluon.jit(do_not_specialize=["top_k", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"])
def project_in(
    x, token_factors, words, low, scale, levels, out, factors, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, capacity, w_up, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, ACTIVATION: gl.constexpr,
    FORMAT: gl.constexpr, PAIRED: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """overlapped.project_in of `x` [token, group, 2, 64] and its factors, to terms [entry in order, group, 2, 64].

    `hidden` is a number of STEPs, ROWS one of groups; planes are contiguous [unit, row, word], gate rows first, `w_up`
    rows before the up rows. `factors` [entry in order, group] float32 is written, too.
    """
    after_the_one_before()
    slot = 0 if PAIRED else gl.program_id(0) % 2
    program = gl.program_id(0) if PAIRED else gl.program_id(0) // 2
    tile, first_row = share(program, gl.cdiv(inner, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)
    if unit < 0:
        return
    skipped = gl.load(tiles + capacity + tile) * TOKENS
    place, begin0, end0, begin1, end1 = entries_of(offsets, unit, slot, skipped, PAIRED)
    if not PAIRED and begin0 >= end0:
        return
    buffers = buffers_of(2 * ROWS, TOKENS, STAGES, FORMAT, PAIRED, False, HALVES)
    planes = planes_at(words, low, scale, unit, first_row, inner, hidden, 0, w_up, ROWS, FORMAT, HALVES, True)
    steps = hidden // (STEP * HALVES)
    planes = begin_words(buffers, planes, steps, STAGES, FORMAT, HALVES)
    n, live = _twice(begin0, end0, TOKENS)
    a0, live0 = _terms_at(x, gl.load(order + n, mask=live, other=0) // top_k, live, hidden, 0, TOKENS)
    a1, live1 = a0, live0
    if PAIRED:
        n, live = _twice(begin1, end1, TOKENS)
        a1, live1 = _terms_at(x, gl.load(order + n, mask=live, other=0) // top_k, live, hidden, 0, TOKENS)
    sums0, sums1 = _products(
        buffers, planes, (a0, a1), (live0, live1), (factors, factors), (live0, live1), steps, slot, levels, TABLE,
        2 * ROWS, TOKENS, STAGES, FORMAT, PAIRED, False, HALVES,
    )  # fmt: skip
    _write_inner(
        sums0, token_factors, out, factors, order, begin0, end0, first_row, inner, top_k, levels,
        gl.load(experts + place), bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, TOKENS, ACTIVATION,
    )  # fmt: skip
    if PAIRED:
        _write_inner(
            sums1, token_factors, out, factors, order, begin1, end1, first_row, inner, top_k, levels,
            gl.load(experts + place + 1), bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, TOKENS,
            ACTIVATION,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["capacity", "bias_expert", "bias_row"])
def project_out(
    x, factors, words, low, scale, levels, out, order, offsets, tiles, experts, weights, bias,
    inner, hidden, capacity, part, out_split, bias_expert, bias_row,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, FORMAT: gl.constexpr,
    PAIRED: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """overlapped.project_out of what `project_in` wrote, in splits of `part` columns (whole steps, as `inner` is)."""
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
    buffers = buffers_of(ROWS, TOKENS, STAGES, FORMAT, PAIRED, True, HALVES)
    planes = planes_at(words, low, scale, unit, first_row, hidden, inner, begin, 0, ROWS, FORMAT, HALVES, False)
    steps = gl.minimum(inner - begin, part) // (STEP * HALVES)
    planes = begin_words(buffers, planes, steps, STAGES, FORMAT, HALVES)
    after_the_one_before()
    n, live = _twice(begin0, end0, TOKENS)
    a0, live0 = _terms_at(x, gl.where(live, n, 0), live, inner, begin, TOKENS)
    f0, there0 = _scales_at(factors, begin0, end0, inner // HALF, begin, TOKENS)
    a1, live1, f1, there1 = a0, live0, f0, there0
    if PAIRED:
        n, live = _twice(begin1, end1, TOKENS)
        a1, live1 = _terms_at(x, gl.where(live, n, 0), live, inner, begin, TOKENS)
        f1, there1 = _scales_at(factors, begin1, end1, inner // HALF, begin, TOKENS)
    sums0, sums1 = _products(
        buffers, planes, (a0, a1), (live0, live1), (f0, f1), (there0, there1), steps, slot, levels + 2 * TABLE, 0,
        ROWS, TOKENS, STAGES, FORMAT, PAIRED, True, HALVES,
    )  # fmt: skip
    shift = _factor(levels + 2 * TABLE) / RESTORE
    write_outer(
        sums0, out, order, weights, begin0, end0, first_row, hidden, shift, gl.load(experts + place), bias,
        bias_expert, bias_row, ROWS, TOKENS,
    )  # fmt: skip
    if PAIRED:
        write_outer(
            sums1, out, order, weights, begin1, end1, first_row, hidden, shift, gl.load(experts + place + 1), bias,
            bias_expert, bias_row, ROWS, TOKENS,
        )  # fmt: skip
