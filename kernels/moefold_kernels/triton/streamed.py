"""Both projections as one stream on Hopper: as many programs as processors, whose copies run ahead over ends of tiles.

joined.py starts a program for each block of rows: each looks up its tile, fetches its first words, and writes, and
meanwhile reads nothing. Here a program takes every n-th block, of gate and up and then of down, and warps of its own
copy (apart.py): they go on to the next block's words and tokens while this one's sums are written, as far as places
reach. Nothing but barriers in memory joins both kinds of warps, which go through the same blocks in the same order; a
place is a step of COLUMNS columns, of words and of both slots' tokens.

Blocks of down wait until the first projection has written all blocks of their tile (`ready`, as in joined.py). Programs
wait for each other, so all must run at once: one a processor, never more than there are.
"""

# mypy: disable-error-code=assignment
# (tuples that grow)

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

from moefold_kernels.triton.apart import COPYING
from moefold_kernels.triton.decode import BOTH
from moefold_kernels.triton.overlapped import (
    after_the_one_before,
    barrier,
    copy_layout,
    entries_at,
    gates_of,
    product_layout,
    write_inner,
    write_outer,
)

PART = gl.constexpr(32)
"""Columns of one set of operands (overlapped_apart.py)."""


@gluon.jit
def _operands(words):
    """decode.decode_both."""
    return gl.inline_asm_elementwise(
        BOTH, "=r,=r,r", [words], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
    )  # fmt: skip


@gluon.jit
def _places(ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr):
    """Words, each slot's tokens and extra ones of PLACES steps, and two barriers of each: `come`, `free` (apart.py)."""
    turned: gl.constexpr = gl.NVMMASharedLayout(2 * COLUMNS, 16, 2)
    words = gl.allocate_shared_memory(gl.int16, [PLACES, ROWS, COLUMNS], turned)
    tokens0 = gl.allocate_shared_memory(gl.bfloat16, [PLACES, TOKENS, COLUMNS], turned)
    tokens1 = gl.allocate_shared_memory(gl.bfloat16, [PLACES, TOKENS, COLUMNS], turned)
    more0 = gl.allocate_shared_memory(gl.bfloat16, [PLACES if EXTRA else 1, max(EXTRA, 8), COLUMNS], turned)
    more1 = gl.allocate_shared_memory(gl.bfloat16, [PLACES if EXTRA else 1, max(EXTRA, 8), COLUMNS], turned)
    come = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(come.index(place), count=32 * COPYING)
        mbarrier.init(free.index(place), count=32 * gl.num_warps())
    return words, tokens0, tokens1, more0, more1, come, free


@gluon.jit
def _tile(tables, item, n_blocks, TOKENS: gl.constexpr, EXTRA: gl.constexpr):
    """Of an item, which is one of a tile's `n_blocks` blocks of rows: tile, block, unit and its slots' entries."""
    _, offsets, tiles, capacity = tables
    tile = item // n_blocks
    unit = gl.load(tiles + tile)
    skipped = gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    begin0, middle = gl.load(offsets + 2 * unit) + skipped, gl.load(offsets + 2 * unit + 1)
    return tile, item % n_blocks, unit, begin0, middle, middle + skipped, gl.load(offsets + 2 * unit + 2)


@gluon.jit
def _next(item, programs, first):
    """The smallest item from `first` on that is `item` and a number of `programs` more."""
    return item + gl.cdiv(gl.maximum(first - item, 0), programs) * programs


@gluon.jit
def _rows(order, begin, end, top_k, row, COLUMNS: gl.constexpr, N: gl.constexpr, SECOND: gl.constexpr):
    """Where N entries' tokens are, or (SECOND) their activations: offsets [N, COLUMNS], and which are there [N, 1]."""
    layout: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    n = begin + gl.arange(0, N, gl.SliceLayout(1, layout))
    live = n < end
    at = gl.where(live, n, 0) if SECOND else gl.load(order + n, mask=live, other=0) // top_k
    offset = gl.multiple_of(at * row, 8)[:, None] + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    return offset, live[:, None]


@gluon.jit
def _stream(
    places, w, offsets, x, tokens, steps, place, phase,
    COLUMNS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Bring one item's words from `w` and its tokens from `x`, as places become free; the next place and its phase."""
    words, tokens0, tokens1, more0, more1, come, free = places
    own0, own1, rest0, rest1 = tokens
    for _ in range(steps):
        mbarrier.wait(free.index(place), phase ^ 1)
        async_copy.async_copy_global_to_shared(words.index(place), w + offsets)
        async_copy.async_copy_global_to_shared(tokens0.index(place), x + own0[0], mask=own0[1])
        async_copy.async_copy_global_to_shared(tokens1.index(place), x + own1[0], mask=own1[1])
        if EXTRA:
            async_copy.async_copy_global_to_shared(more0.index(place), x + rest0[0], mask=rest0[1])
            async_copy.async_copy_global_to_shared(more1.index(place), x + rest1[0], mask=rest1[1])
        async_copy.mbarrier_arrive(come.index(place), increment_count=False)
        w += COLUMNS
        x += COLUMNS
        last = place == PLACES - 1
        phase = gl.where(last, phase ^ 1, phase)
        place = gl.where(last, 0, place + 1)
    return place, phase


@gluon.jit
def _until(ready, wanted):
    """Wait until `ready` says so many blocks; what others wrote before they counted can be read then."""
    while gl.load(ready, volatile=True) < wanted:
        pass
    gl.inline_asm_elementwise("fence.acq_rel.gpu; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _copy(
    places, tables, x, words, between, down, ready, hidden, inner, top_k, x_row, w_unit, w_row, w_up, down_unit,
    down_row,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Copying warps' part."""
    after_the_one_before()
    order = tables[0]
    rest: gl.constexpr = max(EXTRA, 16)
    layout: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    k = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    stacked = gl.arange(0, 2 * ROWS, gl.SliceLayout(1, layout))
    programs, n_tiles = gl.num_programs(0), gl.load(ready)
    n_in, n_out = gl.cdiv(inner, ROWS), gl.cdiv(hidden, 2 * ROWS)
    firsts = n_tiles * n_in
    place, phase = 0, 0
    for item in range(gl.program_id(0), firsts, programs):
        _, block, unit, begin0, end0, begin1, end1 = _tile(tables, item, n_in, TOKENS, EXTRA)
        row = (block * ROWS + stacked // 16 * 8 + stacked % 8) % inner
        base = words + unit.to(gl.int64) * w_unit + gl.where(stacked % 16 >= 8, w_up, 0)[:, None]
        offsets = gl.multiple_of(row * w_row, 8)[:, None] + k
        own0 = _rows(order, begin0, end0, top_k, x_row, COLUMNS, TOKENS, False)
        own1 = _rows(order, begin1, end1, top_k, x_row, COLUMNS, TOKENS, False)
        rest0 = _rows(order, begin0 + TOKENS, end0, top_k, x_row, COLUMNS, rest, False)
        rest1 = _rows(order, begin1 + TOKENS, end1, top_k, x_row, COLUMNS, rest, False)
        tokens = own0, own1, rest0, rest1
        steps = hidden // COLUMNS
        place, phase = _stream(places, base, offsets, x, tokens, steps, place, phase, COLUMNS, EXTRA, PLACES)
    for item in range(_next(gl.program_id(0), programs, firsts) - firsts, n_tiles * n_out, programs):
        tile, block, unit, begin0, end0, begin1, end1 = _tile(tables, item, n_out, TOKENS, EXTRA)
        row = (block * (2 * ROWS) + stacked) % hidden
        base = down + unit.to(gl.int64) * down_unit
        offsets = gl.multiple_of(row * down_row, 8)[:, None] + k
        own0 = _rows(order, begin0, end0, top_k, inner, COLUMNS, TOKENS, True)
        own1 = _rows(order, begin1, end1, top_k, inner, COLUMNS, TOKENS, True)
        rest0 = _rows(order, begin0 + TOKENS, end0, top_k, inner, COLUMNS, rest, True)
        rest1 = _rows(order, begin1 + TOKENS, end1, top_k, inner, COLUMNS, rest, True)
        tokens = own0, own1, rest0, rest1
        steps = inner // COLUMNS
        _until(ready + 4 + tile, n_in)
        place, phase = _stream(places, base, offsets, between, tokens, steps, place, phase, COLUMNS, EXTRA, PLACES)
    async_copy.wait_group(0)


@gluon.jit
def _before(place, PLACES: gl.constexpr):
    """The place before, whose number a loop does not carry if nothing else is made of it (Triton 3.6)."""
    return gl.where(place == 0, PLACES - 1, place - 1)


@gluon.jit
def _products(
    places, steps, place, phase,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, USED: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    """overlapped_pair._products from places: both slots' sums [ROWS, TOKENS], their extra ones; next place and phase.

    USED: whether the item has extra entries.
    """
    gl.assume(steps > 0)
    words, tokens0, tokens1, more0, more1, come, free = places
    rest: gl.constexpr = max(EXTRA, 16)
    mma: gl.constexpr = product_layout(TOKENS, gl.num_warps())
    mma_extra: gl.constexpr = product_layout(rest, gl.num_warps())
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    left_extra: gl.constexpr = gl.DotOperandLayout(0, mma_extra, 2)
    sums0 = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    sums1 = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    extra0 = warpgroup_mma_init(gl.zeros((ROWS, rest), gl.float32, mma_extra))
    extra1 = warpgroup_mma_init(gl.zeros((ROWS, rest), gl.float32, mma_extra))
    for step in range(steps):
        mbarrier.wait(come.index(place), phase)
        fence_async_shared()
        for part in gl.static_range(COLUMNS // PART):
            own, other = _operands(words.index(place).slice(PART * part, PART, 1).load(left))
            right = tokens0.index(place).slice(PART * part, PART, 1).permute((1, 0))
            sums0 = warpgroup_mma(own, right, sums0, is_async=True)
            right = tokens1.index(place).slice(PART * part, PART, 1).permute((1, 0))
            sums1 = warpgroup_mma(other, right, sums1, is_async=True)
            if USED:
                own = gl.convert_layout(own, left_extra, assert_trivial=True)
                other = gl.convert_layout(other, left_extra, assert_trivial=True)
                right = more0.index(place).slice(PART * part, PART, 1).permute((1, 0))
                extra0 = warpgroup_mma(own, right, extra0, is_async=True)
                right = more1.index(place).slice(PART * part, PART, 1).permute((1, 0))
                extra1 = warpgroup_mma(other, right, extra1, is_async=True)
                sums0, sums1, extra0, extra1 = warpgroup_mma_wait(4, deps=(sums0, sums1, extra0, extra1))
                extra0, extra1 = warpgroup_mma_init(extra0), warpgroup_mma_init(extra1)
            else:
                sums0, sums1 = warpgroup_mma_wait(2, deps=(sums0, sums1))  # the other set's products have ended
            sums0, sums1 = warpgroup_mma_init(sums0), warpgroup_mma_init(sums1)
            if part == 0 and step > 0:  # so nobody of this thread's reads the step before
                async_copy.mbarrier_arrive(free.index(_before(place, PLACES)), increment_count=False)
        last = place == PLACES - 1
        phase = gl.where(last, phase ^ 1, phase)
        place = gl.where(last, 0, place + 1)
    sums0, sums1, extra0, extra1 = warpgroup_mma_wait(0, deps=(sums0, sums1, extra0, extra1))
    async_copy.mbarrier_arrive(free.index(_before(place, PLACES)), increment_count=False)
    return sums0, sums1, extra0, extra1, place, phase


@gluon.jit
def _multiply(
    places, tables, between, parts, experts, weights, ready, hidden, inner, for_inner, for_outer,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Multiplying warps' part."""
    after_the_one_before()
    programs, n_tiles = gl.num_programs(0), gl.load(ready)
    n_in, n_out = gl.cdiv(inner, ROWS), gl.cdiv(hidden, 2 * ROWS)
    firsts = n_tiles * n_in
    place, phase = 0, 0
    for item in range(gl.program_id(0), firsts, programs):
        tile, block, unit, begin0, end0, begin1, end1 = _tile(tables, item, n_in, TOKENS, EXTRA)
        about = block * ROWS, gl.load(experts + 2 * unit), gl.load(experts + 2 * unit + 1), begin0, end0, begin1, end1
        if EXTRA and gl.maximum(end0 - begin0, end1 - begin1) > TOKENS:
            place, phase = _in(
                places, place, phase, between, hidden, inner, about, for_inner,
                ROWS, COLUMNS, TOKENS, EXTRA, True, PLACES, ACTIVATION,
            )  # fmt: skip
        else:
            place, phase = _in(
                places, place, phase, between, hidden, inner, about, for_inner,
                ROWS, COLUMNS, TOKENS, EXTRA, False, PLACES, ACTIVATION,
            )  # fmt: skip
        barrier()  # all threads have written; what one thread then releases is the whole block's
        gl.atomic_add(ready + 4 + tile, 1, sem="release")
    for item in range(_next(gl.program_id(0), programs, firsts) - firsts, n_tiles * n_out, programs):
        tile, block, unit, begin0, end0, begin1, end1 = _tile(tables, item, n_out, TOKENS, EXTRA)
        first_row = block * (2 * ROWS)
        about = first_row, gl.load(experts + 2 * unit), gl.load(experts + 2 * unit + 1), begin0, end0, begin1, end1
        if EXTRA and gl.maximum(end0 - begin0, end1 - begin1) > TOKENS:
            place, phase = _out(
                places, place, phase, parts, tables[0], weights, hidden, inner, about, for_outer,
                ROWS, COLUMNS, TOKENS, EXTRA, True, PLACES,
            )  # fmt: skip
        else:
            place, phase = _out(
                places, place, phase, parts, tables[0], weights, hidden, inner, about, for_outer,
                ROWS, COLUMNS, TOKENS, EXTRA, False, PLACES,
            )  # fmt: skip


@gluon.jit
def _in(
    places, place, phase, out, hidden, inner, about, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, USED: gl.constexpr,
    PLACES: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Multiply and write one item of gate and up."""
    first_row, expert0, expert1, begin0, end0, begin1, end1 = about
    gate_shift, up_shift, bias, bias_expert, bias_row, bias_up, limit, alpha = given
    sums0, sums1, extra0, extra1, place, phase = _products(
        places, hidden // COLUMNS, place, phase, 2 * ROWS, COLUMNS, TOKENS, EXTRA, USED, PLACES
    )
    write_inner(
        sums0, out, begin0, end0, first_row, inner, gate_shift, up_shift, expert0, bias, bias_expert, bias_row,
        bias_up, limit, alpha, ROWS, TOKENS, ACTIVATION,
    )  # fmt: skip
    write_inner(
        sums1, out, begin1, end1, first_row, inner, gate_shift, up_shift, expert1, bias, bias_expert, bias_row,
        bias_up, limit, alpha, ROWS, TOKENS, ACTIVATION,
    )  # fmt: skip
    if USED:
        write_inner(
            extra0, out, begin0 + TOKENS, end0, first_row, inner, gate_shift, up_shift, expert0, bias, bias_expert,
            bias_row, bias_up, limit, alpha, ROWS, EXTRA, ACTIVATION,
        )  # fmt: skip
        write_inner(
            extra1, out, begin1 + TOKENS, end1, first_row, inner, gate_shift, up_shift, expert1, bias, bias_expert,
            bias_row, bias_up, limit, alpha, ROWS, EXTRA, ACTIVATION,
        )  # fmt: skip
    return place, phase


@gluon.jit
def _out(
    places, place, phase, out, order, weights, hidden, inner, about, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, USED: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    """Multiply and write one item of down."""
    first_row, expert0, expert1, begin0, end0, begin1, end1 = about
    shift, bias, bias_expert, bias_row = given
    rest: gl.constexpr = max(EXTRA, 16)
    entries0 = gates_of(entries_at(order, begin0, end0, TOKENS), weights)
    entries1 = gates_of(entries_at(order, begin1, end1, TOKENS), weights)
    sums0, sums1, extra0, extra1, place, phase = _products(
        places, inner // COLUMNS, place, phase, 2 * ROWS, COLUMNS, TOKENS, EXTRA, USED, PLACES
    )
    write_outer(
        sums0, out, entries0, begin0, end0, first_row, hidden, shift, expert0, bias, bias_expert, bias_row,
        2 * ROWS, TOKENS,
    )  # fmt: skip
    write_outer(
        sums1, out, entries1, begin1, end1, first_row, hidden, shift, expert1, bias, bias_expert, bias_row,
        2 * ROWS, TOKENS,
    )  # fmt: skip
    if USED:
        rest0 = gates_of(entries_at(order, begin0 + TOKENS, end0, rest), weights)
        rest1 = gates_of(entries_at(order, begin1 + TOKENS, end1, rest), weights)
        write_outer(
            extra0, out, rest0, begin0 + TOKENS, end0, first_row, hidden, shift, expert0, bias, bias_expert, bias_row,
            2 * ROWS, EXTRA,
        )  # fmt: skip
        write_outer(
            extra1, out, rest1, begin1 + TOKENS, end1, first_row, hidden, shift, expert1, bias, bias_expert, bias_row,
            2 * ROWS, EXTRA,
        )  # fmt: skip
    return place, phase


@gluon.jit(
    do_not_specialize=[
        "top_k", "capacity", "bias_expert", "bias_row", "bias_up", "down_bias_expert", "down_bias_row", "limit",
        "alpha",
    ]
)  # fmt: skip
def project(
    x, words, between, down, parts, order, offsets, tiles, ready, experts, weights, bias, down_bias,
    hidden, inner, top_k, capacity, x_row, w_unit, w_row, w_up, down_unit, down_row,
    gate_shift, up_shift, down_shift, bias_expert, bias_row, bias_up, down_bias_expert, down_bias_row, limit, alpha,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """joined.project for pairs; copying warps have so many REGISTERS a thread.

    `hidden` and `inner` are whole numbers of COLUMNS; `ready` is Tables.ready.
    """
    places = _places(2 * ROWS, COLUMNS, TOKENS, EXTRA, PLACES)
    tables = order, offsets, tiles, capacity
    for_inner = gate_shift, up_shift, bias, bias_expert, bias_row, bias_up, limit, alpha
    for_outer = down_shift, down_bias, down_bias_expert, down_bias_row
    gl.warp_specialize(
        [
            (_multiply, (
                places, tables, between, parts, experts, weights, ready, hidden, inner, for_inner, for_outer,
                ROWS, COLUMNS, TOKENS, EXTRA, PLACES, ACTIVATION,
            )),
            (_copy, (
                places, tables, x, words, between, down, ready, hidden, inner, top_k, x_row, w_unit, w_row, w_up,
                down_unit, down_row, ROWS, COLUMNS, TOKENS, EXTRA, PLACES,
            )),
        ],
        [COPYING], [REGISTERS],
    )  # fmt: skip
