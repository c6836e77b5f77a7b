"""Both projections as one stream on Hopper: programs that take block after block, and whose copies run ahead of it.

joined.py starts a program for each block of rows: each looks up its tile, fetches its first words, and writes, and
reads nothing meanwhile. Here there is one program a multiprocessor, with warps of four kinds. One warp looks ahead
(streamed_ahead.py): it takes the next item (a block of rows of a tile, of gate and up first, then of down), finds out
what belongs to it, and tells the others, in a ring of two. Four warps copy, to places: a step of COLUMNS columns of
words and of both slots' tokens each. They go on to the next item while sums of the one before are multiplied and
written. Eight warps multiply, and one counts the blocks that they have written. Nothing but barriers in memory joins
them (apart.py).
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

from moefold_kernels.triton.apart import COPYING
from moefold_kernels.triton.overlapped import (
    after_the_one_before,
    barrier,
    copy_layout,
    gated,
    product_layout,
    store_inner,
    store_layout,
    store_outer,
    weighted,
)
from moefold_kernels.triton.overlapped_pair import operands_of
from moefold_kernels.triton.streamed_ahead import (
    LOOKING,
    RING,
    after,
    barriers,
    field_of,
    look_ahead,
    release,
    ring_of,
)

ASKING = gl.constexpr(640)
"""Columns of an item that are yet to be copied when the next one is taken: later, and copies would wait for it."""
MOST_IN_TWO = gl.constexpr(80)
"""Entries of a slot, at most, beside whose sums there are registers for operands of half a step (of 64 columns, where
there are extra ones)."""


@gluon.jit
def _places(ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr):
    """Words, each slot's tokens and extra ones of PLACES steps, and two barriers of each: `come`, `free` (apart.py)."""
    turned: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    words = gl.allocate_shared_memory(gl.int16, [PLACES, ROWS, COLUMNS], turned)
    tokens0 = gl.allocate_shared_memory(gl.bfloat16, [PLACES, TOKENS, COLUMNS], turned)
    tokens1 = gl.allocate_shared_memory(gl.bfloat16, [PLACES, TOKENS, COLUMNS], turned)
    more0 = gl.allocate_shared_memory(gl.bfloat16, [PLACES if EXTRA else 1, max(EXTRA, 8), COLUMNS], turned)
    more1 = gl.allocate_shared_memory(gl.bfloat16, [PLACES if EXTRA else 1, max(EXTRA, 8), COLUMNS], turned)
    come, free = barriers(PLACES, 32 * COPYING), barriers(PLACES, 32 * gl.num_warps())
    return words, tokens0, tokens1, more0, more1, come, free


@gluon.jit
def _rows(numbers, slot, begin, end, second, row, COLUMNS: gl.constexpr, N: gl.constexpr):
    """Where N entries' tokens are, or (second) their activations: offsets [N, COLUMNS], and which are there [N, 1]."""
    layout: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    n = begin + gl.arange(0, N, gl.SliceLayout(1, layout))
    live = n < end
    at = gl.where(second, gl.where(live, n, 0), numbers.index(slot).load(gl.SliceLayout(1, layout)))
    offset = gl.multiple_of(at * row, 8)[:, None] + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    return offset, live[:, None]


@gluon.jit
def _bring(
    places, w, offsets, x, tokens, steps, place, phase,
    COLUMNS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Copy words from `w` and tokens from `x` for some steps, as places become free; what is behind them."""
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
        place, phase = after(place, phase, PLACES)
    return w, x, place, phase


@gluon.jit
def _prefetch(lines):
    """Ask L2 for cache lines."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [lines], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _copy(
    places, ring, x, words, between, down, hidden, inner, x_row, w_unit, w_row, w_up, down_unit, down_row, units,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    GUESS: gl.constexpr,
):  # fmt: skip
    """Copying warps' part: each item's words and tokens, as places become free."""
    if GUESS:  # nearly every unit has entries, and one tile: then these are words of items that are taken first
        n_in = gl.cdiv(inner, ROWS)
        tile = gl.program_id(0) // n_in
        if tile < units:
            flat = gl.arange(0, 2 * ROWS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
            first = gl.program_id(0) % n_in * ROWS
            lines = words + tile.to(gl.int64) * w_unit + gl.where(flat % 16 >= 8, w_up, 0)
            lines += (first + flat // 16 * 8 + flat % 8) % inner * w_row
            for line in gl.static_range(PLACES * COLUMNS // 64):
                if 64 * line < hidden:
                    _prefetch(lines + 64 * line)
    after_the_one_before()
    records, numbers, _gates, told, heard, _weighed, asked, _written = ring
    rest: gl.constexpr = EXTRA or 16
    layout: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    k = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    stacked = gl.arange(0, 2 * ROWS, gl.SliceLayout(1, layout))
    place, phase = 0, 0
    slot, turn = 0, 0
    mbarrier.wait(told.index(slot), turn)
    kind = field_of(records, slot, 0)
    while kind >= 0:
        second = kind > 0
        block, unit = field_of(records, slot, 1), field_of(records, slot, 2).to(gl.int64)
        begin0, end0 = field_of(records, slot, 3), field_of(records, slot, 4)
        begin1, end1 = field_of(records, slot, 5), field_of(records, slot, 6)
        if second:
            w = down + unit * down_unit + 0 * stacked[:, None]
            offset = gl.multiple_of((block * (2 * ROWS) + stacked) % hidden * down_row, 8)
            source, row, steps = between, inner, inner // COLUMNS
        else:
            w = words + unit * w_unit + gl.where(stacked % 16 >= 8, w_up, 0)[:, None]
            offset = gl.multiple_of((block * ROWS + stacked // 16 * 8 + stacked % 8) % inner * w_row, 8)
            source, row, steps = x, x_row, hidden // COLUMNS
        offsets = offset[:, None] + k
        own0, live0 = _rows(numbers[0], slot, begin0, end0, second, row, COLUMNS, TOKENS)
        own1, live1 = _rows(numbers[1], slot, begin1, end1, second, row, COLUMNS, TOKENS)
        rest0, more_live0 = _rows(numbers[2], slot, begin0 + TOKENS, end0, second, row, COLUMNS, rest)
        rest1, more_live1 = _rows(numbers[3], slot, begin1 + TOKENS, end1, second, row, COLUMNS, rest)
        barrier()
        mbarrier.arrive(heard.index(slot), count=1)
        tokens = (own0, live0), (own1, live1), (rest0, more_live0), (rest1, more_live1)
        last = gl.minimum(ASKING // COLUMNS, steps)
        w, source, place, phase = _bring(
            places, w, offsets, source, tokens, steps - last, place, phase, COLUMNS, EXTRA, PLACES
        )
        barrier()
        mbarrier.arrive(asked, count=1)
        w, source, place, phase = _bring(places, w, offsets, source, tokens, last, place, phase, COLUMNS, EXTRA, PLACES)
        slot, turn = after(slot, turn, RING)
        mbarrier.wait(told.index(slot), turn)
        kind = field_of(records, slot, 0)
    async_copy.wait_group(0)  # nothing is left: all has been waited for, to be multiplied


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

    The last step's place is not free yet. USED: whether the item has extra entries. With more than 16 entries and no
    extra ones, operands of 64 columns are made in halves, whose products come in turns.
    """
    # Else sums are defined twice (loop skipped), and ptxas waits for every product; of 3.7 `assume` is not enough.
    steps = gl.maximum(steps, 1)
    words, tokens0, tokens1, more0, more1, come, free = places
    parts: gl.constexpr = 4 if TOKENS + EXTRA > MOST_IN_TWO or (EXTRA and COLUMNS > 64) else 2
    pieces: gl.constexpr = 2 if COLUMNS // parts >= 64 and TOKENS > 16 and not EXTRA else 1
    columns: gl.constexpr = COLUMNS // parts // pieces  # of one set of operands (overlapped_apart.py), or half of it
    pending: gl.constexpr = 2 * pieces * (2 if USED else 1)
    rest: gl.constexpr = EXTRA or 16
    mma: gl.constexpr = product_layout(TOKENS, gl.num_warps())
    mma_extra: gl.constexpr = product_layout(rest, gl.num_warps())
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    sums0 = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    sums1 = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    extra0 = warpgroup_mma_init(gl.zeros((ROWS, rest), gl.float32, mma_extra))
    extra1 = warpgroup_mma_init(gl.zeros((ROWS, rest), gl.float32, mma_extra))
    for step in range(steps):
        mbarrier.wait(come.index(place), phase)
        fence_async_shared()
        for part in gl.static_range(parts):
            own, other = operands_of(words.index(place).slice(columns * pieces * part, columns, 1).load(left))
            own1, other1 = own, other
            if pieces == 2:
                own1, other1 = operands_of(
                    words.index(place).slice(columns * (pieces * part + 1), columns, 1).load(left)
                )
            right = tokens0.index(place), tokens1.index(place)
            sums0, sums1 = _add(sums0, sums1, own, other, right, columns * pieces * part, TOKENS)
            if pieces == 2:
                sums0, sums1 = _add(sums0, sums1, own1, other1, right, columns * (pieces * part + 1), TOKENS)
            if USED:
                right = more0.index(place), more1.index(place)
                extra0, extra1 = _add(extra0, extra1, own, other, right, columns * pieces * part, rest)
                if pieces == 2:
                    extra0, extra1 = _add(extra0, extra1, own1, other1, right, columns * (pieces * part + 1), rest)
                sums0, sums1, extra0, extra1 = warpgroup_mma_wait(pending, deps=(sums0, sums1, extra0, extra1))
                extra0, extra1 = warpgroup_mma_init(extra0), warpgroup_mma_init(extra1)
            else:
                sums0, sums1 = warpgroup_mma_wait(pending, deps=(sums0, sums1))  # the other set's products have ended
            sums0, sums1 = warpgroup_mma_init(sums0), warpgroup_mma_init(sums1)
            if part == 0 and step > 0:  # so nobody of this thread's reads the step before
                async_copy.mbarrier_arrive(free.index(_before(place, PLACES)), increment_count=False)
        place, phase = after(place, phase, PLACES)
    sums0, sums1, extra0, extra1 = warpgroup_mma_wait(0, deps=(sums0, sums1, extra0, extra1))
    return sums0, sums1, extra0, extra1, place, phase


@gluon.jit
def _add(sums0, sums1, own, other, tokens, FIRST: gl.constexpr, N: gl.constexpr):
    """Begin products of both slots' operands with columns from FIRST on of their N tokens."""
    tokens0, tokens1 = tokens
    layout: gl.constexpr = gl.DotOperandLayout(0, product_layout(N, gl.num_warps()), 2)
    own = gl.convert_layout(own, layout, assert_trivial=True)
    other = gl.convert_layout(other, layout, assert_trivial=True)
    columns: gl.constexpr = own.shape[1]
    sums0 = warpgroup_mma(own, tokens0.slice(FIRST, columns, 1).permute((1, 0)), sums0, is_async=True)
    sums1 = warpgroup_mma(other, tokens1.slice(FIRST, columns, 1).permute((1, 0)), sums1, is_async=True)
    return sums0, sums1


@gluon.jit
def _multiply(
    places, ring, between, parts, experts, hidden, inner, for_inner, for_outer,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Multiplying warps' part."""
    after_the_one_before()
    records, _numbers, _gates, told, _heard, _weighed, _asked, written = ring
    place, phase = 0, 0
    slot, turn = 0, 0
    mbarrier.wait(told.index(slot), turn)
    kind = field_of(records, slot, 0)
    while kind >= 0:
        unit = field_of(records, slot, 2)
        begin0, end0 = field_of(records, slot, 3), field_of(records, slot, 4)
        begin1, end1 = field_of(records, slot, 5), field_of(records, slot, 6)
        expert0, expert1 = gl.load(experts + 2 * unit), gl.load(experts + 2 * unit + 1)
        about = field_of(records, slot, 1), expert0, expert1, begin0, end0, begin1, end1
        if kind > 0:
            if EXTRA and gl.maximum(end0 - begin0, end1 - begin1) > TOKENS:
                place, phase = _out(
                    places, ring, slot, turn, place, phase, parts, hidden, inner, about, for_outer,
                    ROWS, COLUMNS, TOKENS, EXTRA, True, PLACES, KEEP,
                )  # fmt: skip
            else:
                place, phase = _out(
                    places, ring, slot, turn, place, phase, parts, hidden, inner, about, for_outer,
                    ROWS, COLUMNS, TOKENS, EXTRA, False, PLACES, KEEP,
                )  # fmt: skip
        else:
            if EXTRA and gl.maximum(end0 - begin0, end1 - begin1) > TOKENS:
                place, phase = _in(
                    places, place, phase, between, hidden, inner, about, for_inner,
                    ROWS, COLUMNS, TOKENS, EXTRA, True, PLACES, ACTIVATION, KEEP,
                )  # fmt: skip
            else:
                place, phase = _in(
                    places, place, phase, between, hidden, inner, about, for_inner,
                    ROWS, COLUMNS, TOKENS, EXTRA, False, PLACES, ACTIVATION, KEEP,
                )  # fmt: skip
        barrier()  # all threads have written, and heard
        mbarrier.arrive(written.index(slot), count=1)
        slot, turn = after(slot, turn, RING)
        mbarrier.wait(told.index(slot), turn)
        kind = field_of(records, slot, 0)


@gluon.jit
def _in(
    places, place, phase, out, hidden, inner, about, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, USED: gl.constexpr,
    PLACES: gl.constexpr, ACTIVATION: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Multiply and write one item of gate and up."""
    sums0, sums1, extra0, extra1, place, phase = _products(
        places, hidden // COLUMNS, place, phase, 2 * ROWS, COLUMNS, TOKENS, EXTRA, USED, PLACES
    )
    last = _before(place, PLACES)
    _write_in(places, last, sums0, sums1, out, inner, about, given, 0, ROWS, TOKENS, ACTIVATION, KEEP)
    if USED:
        _write_in(places, last, extra0, extra1, out, inner, about, given, TOKENS, ROWS, EXTRA, ACTIVATION, KEEP)
    _free(places, last)
    return place, phase


@gluon.jit
def _write_in(
    places, place, sums0, sums1, out, inner, about, given,
    FIRST: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, ACTIVATION: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """overlapped.write_inner of both slots' N entries from their FIRST on, by way of a place."""
    block, expert0, expert1, begin0, end0, begin1, end1 = about
    gate_shift, up_shift, bias, bias_expert, bias_row, bias_up, limit, alpha = given
    row = block * ROWS
    value0 = gated(
        sums0, row, inner, gate_shift, up_shift, expert0, bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, N,
        ACTIVATION,
    )  # fmt: skip
    value1 = gated(
        sums1, row, inner, gate_shift, up_shift, expert1, bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, N,
        ACTIVATION,
    )  # fmt: skip
    value0, value1 = _turned(places, place, value0, value1, ROWS, N)
    store_inner(value0, out, begin0 + FIRST, end0, row, inner, ROWS, N, KEEP)
    store_inner(value1, out, begin1 + FIRST, end1, row, inner, ROWS, N, KEEP)


@gluon.jit
def _turned(places, place, own, other, ROWS: gl.constexpr, N: gl.constexpr):
    """Both slots' results [ROWS, N], from the layout of products to that of stores, as bfloat16.

    They go by way of a place's words, which are not needed any more once all of these warps have read them.
    """
    words = places[0]
    fit: gl.constexpr = words.shape[1] * words.shape[2] // (ROWS * N)
    turned: gl.constexpr = gl.NVMMASharedLayout(min(2 * ROWS, 128), 16, 2)
    layout: gl.constexpr = store_layout(ROWS, gl.num_warps())
    room = words.index(place)._reinterpret(gl.bfloat16, [fit, N, ROWS], turned)
    first, second = room.index(0).permute((1, 0)), room.index(min(fit - 1, 1)).permute((1, 0))
    barrier()
    first.store(own.to(gl.bfloat16))
    if fit > 1:
        second.store(other.to(gl.bfloat16))
    barrier()
    own_turned = first.load(layout)
    if fit == 1:
        barrier()
        second.store(other.to(gl.bfloat16))
        barrier()
    return own_turned, second.load(layout)


@gluon.jit
def _free(places, place):
    """A thread of those that multiply has no more use for a place."""
    _words, _tokens0, _tokens1, _more0, _more1, _come, free = places
    async_copy.mbarrier_arrive(free.index(place), increment_count=False)


@gluon.jit
def _out(
    places, ring, slot, turn, place, phase, out, hidden, inner, about, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, USED: gl.constexpr,
    PLACES: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Multiply and write one item of down."""
    sums0, sums1, extra0, extra1, place, phase = _products(
        places, inner // COLUMNS, place, phase, 2 * ROWS, COLUMNS, TOKENS, EXTRA, USED, PLACES
    )
    last = _before(place, PLACES)
    _records, _numbers, _gates, _told, _heard, weighed, _asked, _written = ring
    mbarrier.wait(weighed.index(slot), turn)
    _write_out(places, last, sums0, sums1, ring, slot, out, hidden, about, given, 0, 2 * ROWS, TOKENS, KEEP)
    if USED:
        _write_out(places, last, extra0, extra1, ring, slot, out, hidden, about, given, TOKENS, 2 * ROWS, EXTRA, KEEP)
    _free(places, last)
    return place, phase


@gluon.jit
def _write_out(
    places, place, sums0, sums1, ring, slot, out, hidden, about, given,
    FIRST: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """overlapped.write_outer of both slots' N entries from their FIRST on, by way of a place."""
    block, expert0, expert1, begin0, end0, begin1, end1 = about
    shift, bias, bias_expert, bias_row = given
    _records, numbers, gates, _told, _heard, _weighed, _asked, _written = ring
    mine: gl.constexpr = gl.SliceLayout(0, product_layout(N, gl.num_warps()))
    theirs: gl.constexpr = gl.SliceLayout(0, store_layout(ROWS, gl.num_warps()))
    of: gl.constexpr = 2 if FIRST else 0  # extra entries are groups of their own in the ring
    row = block * ROWS
    weights0, weights1 = gates[of].index(slot).load(mine), gates[of + 1].index(slot).load(mine)
    value0 = weighted(sums0, weights0, row, hidden, shift, expert0, bias, bias_expert, bias_row, ROWS)
    value1 = weighted(sums1, weights1, row, hidden, shift, expert1, bias, bias_expert, bias_row, ROWS)
    value0, value1 = _turned(places, place, value0, value1, ROWS, N)
    entry0, entry1 = numbers[of].index(slot).load(theirs), numbers[of + 1].index(slot).load(theirs)
    store_outer(value0, out, entry0, begin0 + FIRST, end0, row, hidden, ROWS, N, KEEP)
    store_outer(value1, out, entry1, begin1 + FIRST, end1, row, hidden, ROWS, N, KEEP)


@gluon.jit(
    do_not_specialize=[
        "top_k", "units", "few", "most", "bias_expert", "bias_row", "bias_up", "down_bias_expert",
        "down_bias_row", "limit", "alpha",
    ]
)  # fmt: skip
def project(
    x, words, between, down, parts, order, items, ready, experts, weights, bias, down_bias,
    hidden, inner, top_k, units, few, most, x_row, w_unit, w_row, w_up, down_unit, down_row,
    gate_shift, up_shift, down_shift, bias_expert, bias_row, bias_up, down_bias_expert, down_bias_row, limit, alpha,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    ACTIVATION: gl.constexpr, REGISTERS: gl.constexpr, GUESS: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """joined.project for pairs; copying warps have so many REGISTERS a thread.

    `hidden` and `inner` are whole numbers of COLUMNS; `items` and `ready` are Tables'; KEEP: what is written
    is to stay in L2.
    """
    places, ring = _places(2 * ROWS, COLUMNS, TOKENS, EXTRA, PLACES), ring_of(TOKENS, EXTRA)
    for_inner = gate_shift, up_shift, bias, bias_expert, bias_row, bias_up, limit, alpha
    for_outer = down_shift, down_bias, down_bias_expert, down_bias_row
    gl.warp_specialize(
        [
            (_multiply, (
                places, ring, between, parts, experts, hidden, inner, for_inner, for_outer,
                ROWS, COLUMNS, TOKENS, EXTRA, PLACES, ACTIVATION, KEEP,
            )),
            (_copy, (
                places, ring, x, words, between, down, hidden, inner, x_row, w_unit, w_row, w_up, down_unit, down_row,
                units, ROWS, COLUMNS, TOKENS, EXTRA, PLACES, GUESS,
            )),
            (look_ahead, (
                ring, order, items, ready, weights, hidden, inner, top_k, few, most, ROWS, TOKENS, EXTRA,
            )),
            (release, (ring, ready)),
        ],
        [COPYING, 1, 1], [REGISTERS, LOOKING, LOOKING],
    )  # fmt: skip
