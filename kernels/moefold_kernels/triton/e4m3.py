"""The few-bit pair formats on Hopper: the projections with e4m3 operands, and scales applied to sums of 64 columns.

Levels that are a factor times an e4m3 number (moefold_kernels/eighths.py) need not become bf16: an operand register
holds four of them instead of two, and making it takes a third of the instructions (e4m3_decode.py). What is lost
otherwise is made up for: tokens are sums of two e4m3 numbers (e4m3_tokens.py), whose two products take as long as one
of bf16; the scale of a row and group multiplies the group's sum, in float32. So a level times its scale is not
rounded to bf16 first, as the definition has it: for random ones that is 1.7e-3 of their norm.

A step is 256 columns, or 128 (e4m3_stage.py). Products of a group run, their sums are waited for and added to the
totals, and the next products start. The next group's decoding stands before that wait, but ptxas moves it behind, where
it is faster, too (docs/kernel-log.md): what runs beside products is other warps' decoding.

Activations are written as bfloat16, which another kernel makes terms of, with a factor for each split of down; for few
tokens (plans.ROUNDED) as terms, with a factor for each group, by which sums are multiplied, too.

A product is as wide as a slot's entries need: TOKENS, or half of that. A program of one slot may take EXTRA entries
more, whose product is another beside the first: 64 and 16 hold an expert of about 64 entries, whose words a second
program of 64 would decode again.
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
from moefold_kernels.triton.e4m3_operands import decoded, scale_of, scales_of
from moefold_kernels.triton.e4m3_stage import (
    FACTOR_OF,
    FEW,
    LOW,
    TOKENS_OF,
    WORDS,
    at,
    begin_words,
    buffers_of,
    factor_layout,
    fewer,
    product_layout,
    start_tokens,
    start_words,
    thinly,
    token_layout,
    width,
)
from moefold_kernels.triton.e4m3_tokens import write_terms
from moefold_kernels.triton.leveled_planes import entries_of, planes_at
from moefold_kernels.triton.leveled_stage import HALF, STEP, behind
from moefold_kernels.triton.leveled_words import units_layout, words_of
from moefold_kernels.triton.overlapped import (
    activated,
    after_the_one_before,
    barrier,
    end_copies,
    entries_at,
    gates_of,
    share,
    store_inner,
    write_outer,
)

EARLY = gl.constexpr(32)
"""Tokens from which on what the last lines need of entries is asked for before the products: it takes 2 to 18
registers, which otherwise are worth more (docs/kernel-log.md)."""
TABLE, CODES, FACTOR = (gl.constexpr(number) for number in (INTEGERS, E4M3, 24))
"""Integers of a matrix in `levels`; where those for this file begin; and the factor among them (levels.e4m3_table)."""


@gluon.jit
def _factor(levels):
    return gl.load(levels + CODES + FACTOR).to(gl.float32, bitcast=True)


@gluon.jit
def _right(buffers, number: gl.constexpr, nothing, term: gl.constexpr, TOKENS: gl.constexpr, THIN: gl.constexpr):
    """A group's tokens as a product's right operand: both terms side by side, or one; or (THIN) below each other."""
    found = buffers[number].index(nothing)
    if THIN:
        return found.slice(0, TOKENS, 0).permute((1, 0))
    columns: gl.constexpr = width(TOKENS)
    return found.slice(term * TOKENS, columns, 0).permute((1, 0))


@gluon.jit
def _start_product(buffers, number: gl.constexpr, nothing, operand, sums, TOKENS: gl.constexpr, THIN: gl.constexpr):
    if THIN:  # one of twice the columns: half as many addresses to make
        operand = _twice_as_long(operand)
    right = _right(buffers, number, nothing, 0, TOKENS, THIN)
    sums = warpgroup_mma(operand, right, sums, use_acc=False, is_async=True)
    if TOKENS > FEW and not THIN:
        right = _right(buffers, number, nothing, 1, TOKENS, THIN)
        sums = warpgroup_mma(operand, right, sums, is_async=True)
    return sums


@gluon.jit
def _twice_as_long(operand):
    """[ROWS, 2 * HALF] of an operand's registers, each twice."""
    rows: gl.constexpr = operand.shape[0]
    both = gl.reshape(gl.permute(gl.join(operand, operand), (0, 2, 1)), (rows, 2 * HALF))
    return gl.convert_layout(both, operand.type.layout, assert_trivial=True)


@gluon.jit
def _factors(buffers, number: gl.constexpr, TOKENS: gl.constexpr):
    return buffers[number].index(0).slice(0, width(TOKENS), 0)


@gluon.jit
def _added(total, sums, scale, buffers, number: gl.constexpr, FACTORS: gl.constexpr, TOKENS: gl.constexpr):
    """`total` and the sums of a group, scaled by row, and by token where those have a factor for each group."""
    if FACTORS:
        own = _factors(buffers, number, TOKENS).load(gl.SliceLayout(0, total.type.layout))
        total += sums * (scale[:, None] * own[None, :])
    else:
        total += sums * scale[:, None]
    return total


@gluon.jit
def _terms_added(total, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    """[ROWS, TOKENS]: the sums over both terms, where they were columns of one product."""
    if TOKENS <= FEW:
        total = gl.sum(gl.reshape(total, (ROWS, 2, TOKENS)), axis=1)
    return total


@gluon.constexpr_function
def _gone(place, places):
    """The place of the step before."""
    return (place + places - 1) % places


@gluon.jit
def _products(
    buffers, planes, x, live, factors, factor_live, steps, slot, levels, up,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, OTHERS: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
    PAIRED: gl.constexpr, FACTORS: gl.constexpr, HALVES: gl.constexpr, THIN: gl.constexpr,
):  # fmt: skip
    """Sums [ROWS, TOKENS] and [ROWS, OTHERS] over `steps` times HALVES * STEP columns.

    The second ones are of a pair's second slot, or of more entries of the same slot; OTHERS is 0 where there are none.
    Words have been asked for (begin_words), and `planes` point behind them. Rows 8 to 15 of every 16 have the levels
    at `levels + up`.
    """
    gl.static_assert(not (THIN and FACTORS), "plans.ROUNDED")
    gl.assume(steps > 0)
    mma: gl.constexpr = product_layout(TOKENS, gl.num_warps())
    others: gl.constexpr = OTHERS if OTHERS > 0 else TOKENS  # a shape for nothing
    mma_other: gl.constexpr = product_layout(others, gl.num_warps())
    # the same registers for both: where a thread's part of an operand lies does not depend on the product's width
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    left_other: gl.constexpr = gl.DotOperandLayout(0, mma_other, 4)
    units: gl.constexpr = units_layout(ROWS, gl.num_warps())
    of_rows: gl.constexpr = gl.SliceLayout(1, mma)
    groups: gl.constexpr = 2 * HALVES
    # Words of 128 columns are read in one go: new ones come where these were, a step earlier than to the place before.
    # Those of 256 would need twice the registers, and asked for by halves, half a row at a time, they came more slowly.
    READ: gl.constexpr = HALVES == 1
    x0, x1 = x
    f0, f1 = factors
    if THIN:
        start_tokens(buffers, (x0, x1), live, (f0, f1), factor_live, 0, steps > 0, FACTORS, 0, 2, TOKENS, OTHERS, 1)
        async_copy.commit_group()
    else:
        for first in gl.static_range(PLACES - 1):
            start_tokens(
                buffers, (x0, x1), live, (f0, f1), factor_live, first, first < steps, FACTORS, 0, groups, TOKENS,
                OTHERS, 2,
            )  # fmt: skip
            async_copy.commit_group()
            if READ:  # nothing: in the loop words are a group of their own
                async_copy.commit_group()
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
    total1 = gl.zeros((ROWS, width(others)), gl.float32, mma_other)
    sums0 = warpgroup_mma_init(total0)
    sums1 = warpgroup_mma_init(total1)
    before = gl.zeros((ROWS,), gl.float32, of_rows)
    if FACTORS:  # read once before they have come, and multiplied by nothing
        _clear(_factors(buffers, at(FACTOR_OF + groups - 1, PLACES - 1), TOKENS), width(TOKENS))
        if OTHERS > 0:
            _clear(_factors(buffers, at(FACTOR_OF + 4 + groups - 1, PLACES - 1), OTHERS), width(OTHERS))
    if not THIN:
        async_copy.wait_group(2 * PLACES - 3 if READ else PLACES - 2)
    barrier()
    for first in range(0, steps, PLACES):
        for place in gl.static_range(PLACES):
            ahead = first + place + PLACES
            # which the compiler does not know; of its own, or it keeps addresses of a place that steps share
            nothing = (first + PLACES * place if THIN else first) >> 30
            if PLACES == 2 and not READ and not THIN:  # before words are read: behind that it took 16 registers more
                start_words(buffers, planes, 1 - place, ahead - 1 < steps, FORMAT, HALVES)
            for half in gl.static_range(HALVES):
                if THIN:
                    done0, done1 = _finished(sums0, sums1, OTHERS)
                    total0, total1 = _both_added(
                        total0, total1, done0, done1, before, buffers, (2 * half + groups - 1) % groups, 0, FACTORS,
                        TOKENS, OTHERS,
                    )  # fmt: skip
                    # asked for are, in a first half, this step's other tokens, and words of PLACES - 1 steps on; in a
                    # second half the next step's first tokens. All is awaited at a step's start: so two places do
                    async_copy.wait_group(half)  # this half's tokens have come, and at a step's start its words
                    barrier()  # for all, and nobody reads the half before
                    if half == 0:
                        scales = scales_of(buffers, place, ROWS, HALVES, of_rows)
                    words = words_of(buffers[at(WORDS + half, place)], buffers[at(LOW + half, place)], ROWS, FORMAT)
                    if half:
                        x0 += 2 * HALF * groups
                        x1 += 2 * HALF * groups
                    start_tokens(
                        buffers, (x0, x1), live, (f0, f1), factor_live, 0, first + place + half < steps, FACTORS,
                        2 - 2 * half, groups - 2 * half, TOKENS, OTHERS, 1,
                    )  # fmt: skip
                    async_copy.commit_group()
                    if half == 0:
                        start_words(buffers, planes, _gone(place, PLACES), ahead - 1 < steps, FORMAT, HALVES)
                        async_copy.commit_group()
                        planes = behind(planes, FORMAT, HALVES)
                if not THIN:
                    if half == 0:
                        scales = scales_of(buffers, place, ROWS, HALVES, of_rows)
                    words = words_of(buffers[at(WORDS + half, place)], buffers[at(LOW + half, place)], ROWS, FORMAT)
                for part in gl.static_range(2):
                    ours, theirs = decoded(words[part], words[2 + part], tables, states, ROWS, FORMAT, PAIRED, left)
                    if not (THIN and part == 0):
                        done0, done1 = _finished(sums0, sums1, OTHERS)
                        total0, total1 = _both_added(
                            total0, total1, done0, done1, before, buffers, (2 * half + part + groups - 1) % groups,
                            _gone(place, PLACES) if half + part == 0 else place, FACTORS, TOKENS, OTHERS,
                        )  # fmt: skip
                    if half + part == 0 and not THIN:
                        if PLACES > 2:  # the next step has come
                            async_copy.wait_group(2 * PLACES - 5 if READ else PLACES - 3)
                        barrier()  # for all, and nobody reads the step before, whose place is free, or this one's words
                        if PLACES > 2 and not READ:
                            start_words(buffers, planes, _gone(place, PLACES), ahead - 1 < steps, FORMAT, HALVES)
                        start_tokens(
                            buffers, (x0, x1), live, (f0, f1), factor_live, _gone(place, PLACES), ahead - 1 < steps,
                            FACTORS, 0, groups, TOKENS, OTHERS, 2,
                        )  # fmt: skip
                        async_copy.commit_group()
                        if READ:
                            start_words(buffers, planes, place, ahead < steps, FORMAT, HALVES)
                            async_copy.commit_group()
                        planes = behind(planes, FORMAT, HALVES)
                        x0 += 2 * HALF * groups
                        x1 += 2 * HALF * groups
                        if FACTORS:
                            f0 += groups
                            f1 += groups
                    # nothing to wait for, but otherwise LLVM adds only after the products below, which then wait for it
                    total0, total1 = warpgroup_mma_wait(0, deps=(total0, total1))
                    sums0 = _start_product(
                        buffers, at(TOKENS_OF + 2 * half + part, place), nothing, ours, done0, TOKENS, THIN
                    )
                    if OTHERS > 0:
                        theirs = gl.convert_layout(theirs, left_other, assert_trivial=True)
                        sums1 = _start_product(
                            buffers, at(TOKENS_OF + 4 + 2 * half + part, place), nothing, theirs, done1, OTHERS, THIN
                        )
                    before = scale_of(scales[half], part)
            if PLACES == 2 and not THIN:
                async_copy.wait_group(1 if READ else 0)  # the next step has come
                barrier()
    done0, done1 = _finished(sums0, sums1, OTHERS)
    total0, total1 = _both_added(
        total0, total1, done0, done1, before, buffers, groups - 1, PLACES - 1, FACTORS, TOKENS, OTHERS
    )
    end_copies()
    return _terms_added(total0, ROWS, TOKENS), _terms_added(total1, ROWS, others)


@gluon.jit
def _clear(buffer, COUNT: gl.constexpr):
    layout: gl.constexpr = factor_layout(gl.num_warps())
    buffer.store(gl.zeros((COUNT,), gl.float32, layout))


@gluon.jit
def _finished(sums0, sums1, OTHERS: gl.constexpr):
    if OTHERS > 0:
        sums0, sums1 = warpgroup_mma_wait(0, deps=(sums0, sums1))
    else:
        sums0 = warpgroup_mma_wait(0, deps=(sums0,))
        sums1 = sums0
    return sums0, sums1


@gluon.jit
def _both_added(
    total0, total1, sums0, sums1, scale, buffers, group: gl.constexpr, PLACE: gl.constexpr,
    FACTORS: gl.constexpr, TOKENS: gl.constexpr, OTHERS: gl.constexpr,
):  # fmt: skip
    if OTHERS > 0:
        of_rows: gl.constexpr = gl.SliceLayout(1, total1.type.layout)
        own = gl.convert_layout(scale, of_rows, assert_trivial=True)
        total1 = _added(total1, sums1, own, buffers, at(FACTOR_OF + 4 + group, PLACE), FACTORS, OTHERS)
    total0 = _added(total0, sums0, scale, buffers, at(FACTOR_OF + group, PLACE), FACTORS, TOKENS)
    return total0, total1


@gluon.jit
def _terms_at(x, rows, live, columns, skipped, TOKENS: gl.constexpr, THIN: gl.constexpr):
    """Pointers to both terms of a group of rows of `x`, as e4m3_stage.py wants them.

    [2 * TOKENS, 64] of rows that are given twice, or (THIN) [TOKENS, 128].
    """
    wide: gl.constexpr = 2 * HALF if THIN else HALF
    layout: gl.constexpr = token_layout(gl.num_warps(), wide)
    at = rows.to(gl.int64) * (2 * columns)
    if not THIN:
        at += gl.arange(0, 2 * TOKENS, gl.SliceLayout(1, layout)) // TOKENS * HALF
    at = gl.multiple_of(at + 2 * skipped, 16)
    return x + at[:, None] + gl.arange(0, wide, gl.SliceLayout(0, layout))[None, :], live[:, None]


@gluon.jit
def _positions(begin, end, TOKENS: gl.constexpr, THIN: gl.constexpr):
    """The positions of a tile's entries for _terms_at, and whether they are."""
    layout: gl.constexpr = gl.SliceLayout(1, token_layout(gl.num_warps(), 2 * HALF if THIN else HALF))
    n = begin + gl.arange(0, TOKENS if THIN else 2 * TOKENS, layout) % TOKENS
    return n, n < end


@gluon.jit
def _scales_at(factors, begin, end, groups, skipped, TOKENS: gl.constexpr):
    n = begin + gl.arange(0, width(TOKENS), factor_layout(gl.num_warps())) % TOKENS
    return factors + gl.where(n < end, n, 0).to(gl.int64) * groups + skipped // HALF, n < end


@gluon.jit
def _factors_at(token_factors, order, begin, end, top_k, TOKENS: gl.constexpr):
    """What to multiply the sums of a tile's entries with; a thread reads one, as in `entries_at`."""
    n = begin + gl.arange(0, TOKENS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    token = gl.load(order + n, mask=n < end, other=0) // top_k
    return gl.load(token_factors + token, mask=n < end, other=0.0)


@gluon.jit
def _of_entries(sums, factors, begin, end, TOKENS: gl.constexpr):
    """Sums of entries that have one factor each for a program's columns."""
    n = begin + gl.arange(0, TOKENS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    own = gl.load(factors + n * gl.num_programs(1) + gl.program_id(1), mask=n < end, other=0.0)
    return sums * gl.convert_layout(own, gl.SliceLayout(0, sums.type.layout))[None, :]


@gluon.jit
def _write_inner(
    sums, token_factors, out, factors, begin, end, first_row, inner, levels, expert, bias, bias_expert, bias_row,
    bias_up, limit, alpha, ROWS: gl.constexpr, TOKENS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """overlapped.write_inner, with factors of tokens and matrices, to e4m3 terms or, as `out` has it, to bfloat16."""
    sums *= gl.convert_layout(token_factors, gl.SliceLayout(0, sums.type.layout))[None, :]
    gate, up = gl.split(gl.permute(gl.reshape(sums, (ROWS // 8, 2, 8, TOKENS)), (0, 2, 3, 1)))
    gate, up = gl.reshape(gate, (ROWS, TOKENS)) * _factor(levels), gl.reshape(up, (ROWS, TOKENS))
    up *= _factor(levels + TABLE)
    value = activated(
        gate, up, first_row, inner, expert, bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, ACTIVATION
    )
    if out.dtype.element_ty == gl.bfloat16:
        store_inner(value, out, begin, end, first_row, inner, ROWS, TOKENS)
    else:
        write_terms(value, out, factors, begin, end, first_row, inner, ROWS, TOKENS)


@gluon.jit(do_not_specialize=["top_k", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"])
def project_in(
    x, token_factors, words, low, scale, levels, out, factors, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, capacity, w_up, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """overlapped.project_in of `x` [token, group, 2, 64] and its factors, to `out` [entry in order, inner] bfloat16.

    Or to terms [entry in order, group, 2, 64], as `out` has it, and `factors` [entry in order, group] float32.

    `hidden` is a number of STEPs, ROWS one of groups; planes are contiguous and in bands, gate rows first, `w_up`
    rows before the up rows.
    """
    after_the_one_before()
    slot = 0 if PAIRED else gl.program_id(0) % 2
    program = gl.program_id(0) if PAIRED else gl.program_id(0) // 2
    tile, first_row = share(program, gl.cdiv(inner, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)
    if unit < 0:
        return
    skipped = gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    place, begin0, end0, begin1, end1 = entries_of(offsets, unit, slot, skipped, PAIRED)
    if not PAIRED:
        if begin0 >= end0:
            return
        begin1 = begin0 + TOKENS
    buffers = buffers_of(2 * ROWS, TOKENS, TOKENS if PAIRED else EXTRA, PLACES, FORMAT, False, HALVES)
    planes = planes_at(words, low, scale, unit, first_row, inner, hidden, 0, w_up, ROWS, FORMAT, HALVES, True)
    steps = hidden // (STEP * HALVES)
    planes = begin_words(buffers, planes, steps, PLACES, FORMAT, HALVES)
    given = (
        planes, x, token_factors, out, factors, order, begin0, end0, begin1, end1, steps, slot, place, first_row,
        hidden, inner, top_k, levels, experts, bias, bias_expert, bias_row, bias_up, limit, alpha,
    )  # fmt: skip
    half: gl.constexpr = fewer(TOKENS)
    thin: gl.constexpr = thinly(TOKENS, HALVES)
    few0, few1 = end0 - begin0 <= half, end1 - begin1 <= half
    if half == TOKENS and EXTRA == 0:  # so few that all widths are one
        _in(buffers, given, ROWS, TOKENS, TOKENS if PAIRED else 0, PLACES, ACTIVATION, FORMAT, PAIRED, HALVES, thin)
    elif PAIRED:
        if few0 and few1:
            _in(buffers, given, ROWS, half, half, PLACES, ACTIVATION, FORMAT, PAIRED, HALVES, thin)
        elif few0:
            _in(buffers, given, ROWS, half, TOKENS, PLACES, ACTIVATION, FORMAT, PAIRED, HALVES, thin)
        elif few1:
            _in(buffers, given, ROWS, TOKENS, half, PLACES, ACTIVATION, FORMAT, PAIRED, HALVES, thin)
        else:
            _in(buffers, given, ROWS, TOKENS, TOKENS, PLACES, ACTIVATION, FORMAT, PAIRED, HALVES, thin)
    elif EXTRA and begin1 < end1:
        _in(buffers, given, ROWS, TOKENS, EXTRA, PLACES, ACTIVATION, FORMAT, PAIRED, HALVES, thin)
    elif few0:
        _in(buffers, given, ROWS, half, 0, PLACES, ACTIVATION, FORMAT, PAIRED, HALVES, thin)
    else:
        _in(buffers, given, ROWS, TOKENS, 0, PLACES, ACTIVATION, FORMAT, PAIRED, HALVES, thin)


@gluon.jit
def _in(
    buffers, given, ROWS: gl.constexpr, TOKENS: gl.constexpr, OTHERS: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr, HALVES: gl.constexpr, THIN: gl.constexpr,
):  # fmt: skip
    (
        planes, x, token_factors, out, factors, order, begin0, end0, begin1, end1, steps, slot, place, first_row,
        hidden, inner, top_k, levels, experts, bias, bias_expert, bias_row, bias_up, limit, alpha,
    ) = given  # fmt: skip
    n, live = _positions(begin0, end0, TOKENS, THIN)
    a0, live0 = _terms_at(x, gl.load(order + n, mask=live, other=0) // top_k, live, hidden, 0, TOKENS, THIN)
    a1, live1 = a0, live0
    if OTHERS > 0:
        n, live = _positions(begin1, end1, OTHERS, THIN)
        a1, live1 = _terms_at(x, gl.load(order + n, mask=live, other=0) // top_k, live, hidden, 0, OTHERS, THIN)
    early: gl.constexpr = TOKENS >= EARLY
    t0, t1 = begin0, begin0  # of nothing
    if early:
        t0 = _factors_at(token_factors, order, begin0, end0, top_k, TOKENS)
        t1 = t0
        if OTHERS > 0:
            t1 = _factors_at(token_factors, order, begin1, end1, top_k, OTHERS)
    sums0, sums1 = _products(
        buffers, planes, (a0, a1), (live0, live1), (factors, factors), (live0, live1), steps, slot, levels, TABLE,
        2 * ROWS, TOKENS, OTHERS, PLACES, FORMAT, PAIRED, False, HALVES, THIN,
    )  # fmt: skip
    if not early:
        t0 = _factors_at(token_factors, order, begin0, end0, top_k, TOKENS)
    _write_inner(
        sums0, t0, out, factors, begin0, end0, first_row, inner, levels, gl.load(experts + place), bias, bias_expert,
        bias_row, bias_up, limit, alpha, ROWS, TOKENS, ACTIVATION,
    )  # fmt: skip
    if OTHERS > 0:
        if not early:
            t1 = _factors_at(token_factors, order, begin1, end1, top_k, OTHERS)
        _write_inner(
            sums1, t1, out, factors, begin1, end1, first_row, inner, levels,
            gl.load(experts + place + (1 if PAIRED else 0)), bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS,
            OTHERS, ACTIVATION,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["capacity", "bias_expert", "bias_row"])
def project_out(
    x, factors, words, low, scale, levels, out, order, offsets, tiles, experts, weights, bias,
    inner, hidden, capacity, part, out_split, bias_expert, bias_row,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr, PLACES: gl.constexpr,
    FORMAT: gl.constexpr, PAIRED: gl.constexpr, HALVES: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """overlapped.project_out of rows in terms, in splits of `part` columns (whole steps, as `inner` is).

    `factors` are [entry, group], as `project_in` writes them, or (WHOLE) [entry, split].
    """
    slot = 0 if PAIRED else gl.program_id(0) % 2
    program = gl.program_id(0) if PAIRED else gl.program_id(0) // 2
    tile, first_row = share(program, gl.cdiv(hidden, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)  # the tables are of before the first projection, which has waited for them
    if unit < 0:
        after_the_one_before()  # also here: that this kernel has ended must mean that the one before it has
        return
    skipped = gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    place, begin0, end0, begin1, end1 = entries_of(offsets, unit, slot, skipped, PAIRED)
    if not PAIRED:
        if begin0 >= end0:
            after_the_one_before()
            return
        begin1 = begin0 + TOKENS
    begin = gl.program_id(1) * part
    out += gl.program_id(1).to(gl.int64) * out_split
    buffers = buffers_of(ROWS, TOKENS, TOKENS if PAIRED else EXTRA, PLACES, FORMAT, not WHOLE, HALVES)
    planes = planes_at(words, low, scale, unit, first_row, hidden, inner, begin, 0, ROWS, FORMAT, HALVES, False)
    steps = gl.minimum(inner - begin, part) // (STEP * HALVES)
    planes = begin_words(buffers, planes, steps, PLACES, FORMAT, HALVES)
    after_the_one_before()
    given = (
        planes, x, factors, out, order, weights, begin0, end0, begin1, end1, steps, slot, place, begin, first_row,
        hidden, inner, levels, experts, bias, bias_expert, bias_row,
    )  # fmt: skip
    half: gl.constexpr = fewer(TOKENS)
    thin: gl.constexpr = thinly(TOKENS, HALVES)
    few0, few1 = end0 - begin0 <= half, end1 - begin1 <= half
    if half == TOKENS and EXTRA == 0:
        _out(buffers, given, ROWS, TOKENS, TOKENS if PAIRED else 0, PLACES, FORMAT, PAIRED, HALVES, thin, WHOLE)
    elif PAIRED:
        if few0 and few1:
            _out(buffers, given, ROWS, half, half, PLACES, FORMAT, PAIRED, HALVES, thin, WHOLE)
        elif few0:
            _out(buffers, given, ROWS, half, TOKENS, PLACES, FORMAT, PAIRED, HALVES, thin, WHOLE)
        elif few1:
            _out(buffers, given, ROWS, TOKENS, half, PLACES, FORMAT, PAIRED, HALVES, thin, WHOLE)
        else:
            _out(buffers, given, ROWS, TOKENS, TOKENS, PLACES, FORMAT, PAIRED, HALVES, thin, WHOLE)
    elif EXTRA and begin1 < end1:
        _out(buffers, given, ROWS, TOKENS, EXTRA, PLACES, FORMAT, PAIRED, HALVES, thin, WHOLE)
    elif few0:
        _out(buffers, given, ROWS, half, 0, PLACES, FORMAT, PAIRED, HALVES, thin, WHOLE)
    else:
        _out(buffers, given, ROWS, TOKENS, 0, PLACES, FORMAT, PAIRED, HALVES, thin, WHOLE)


@gluon.jit
def _out(
    buffers, given, ROWS: gl.constexpr, TOKENS: gl.constexpr, OTHERS: gl.constexpr, PLACES: gl.constexpr,
    FORMAT: gl.constexpr, PAIRED: gl.constexpr, HALVES: gl.constexpr, THIN: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    (
        planes, x, factors, out, order, weights, begin0, end0, begin1, end1, steps, slot, place, begin, first_row,
        hidden, inner, levels, experts, bias, bias_expert, bias_row,
    ) = given  # fmt: skip
    n, live = _positions(begin0, end0, TOKENS, THIN)
    a0, live0 = _terms_at(x, gl.where(live, n, 0), live, inner, begin, TOKENS, THIN)
    f0, there0, f1, there1 = factors, live0, factors, live0  # of nothing
    if not WHOLE:
        f0, there0 = _scales_at(factors, begin0, end0, inner // HALF, begin, TOKENS)
        f1, there1 = f0, there0
    a1, live1 = a0, live0
    if OTHERS > 0:
        n, live = _positions(begin1, end1, OTHERS, THIN)
        a1, live1 = _terms_at(x, gl.where(live, n, 0), live, inner, begin, OTHERS, THIN)
        if not WHOLE:
            f1, there1 = _scales_at(factors, begin1, end1, inner // HALF, begin, OTHERS)
    early: gl.constexpr = TOKENS >= EARLY
    entries0, entries1 = begin0, begin0  # of nothing
    if early:
        entries0 = gates_of(entries_at(order, begin0, end0, TOKENS), weights)
        entries1 = entries0
        if OTHERS > 0:
            entries1 = gates_of(entries_at(order, begin1, end1, OTHERS), weights)
    sums0, sums1 = _products(
        buffers, planes, (a0, a1), (live0, live1), (f0, f1), (there0, there1), steps, slot, levels + 2 * TABLE, 0,
        ROWS, TOKENS, OTHERS, PLACES, FORMAT, PAIRED, not WHOLE, HALVES, THIN,
    )  # fmt: skip
    shift = _factor(levels + 2 * TABLE) / RESTORE
    if not early:
        entries0 = gates_of(entries_at(order, begin0, end0, TOKENS), weights)
    if WHOLE:
        sums0 = _of_entries(sums0, factors, begin0, end0, TOKENS)
    write_outer(
        sums0, out, entries0, begin0, end0, first_row, hidden, shift, gl.load(experts + place), bias, bias_expert,
        bias_row, ROWS, TOKENS,
    )  # fmt: skip
    if OTHERS > 0:
        if not early:
            entries1 = gates_of(entries_at(order, begin1, end1, OTHERS), weights)
        if WHOLE:
            sums1 = _of_entries(sums1, factors, begin1, end1, OTHERS)
        write_outer(
            sums1, out, entries1, begin1, end1, first_row, hidden, shift,
            gl.load(experts + place + (1 if PAIRED else 0)), bias, bias_expert, bias_row, ROWS, OTHERS,
        )  # fmt: skip
