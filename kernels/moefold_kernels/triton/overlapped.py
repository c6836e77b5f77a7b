"""Many tokens on Hopper: the projections again, with products running while the next words are decoded.

What bounds the layer here is arithmetic, and `project.py` has to let every product end before it decodes again (see
`_finished` there), which costs a fifth to a quarter of the rate. In Gluon, with the waits in our hands, two sets of
operand registers take turns: a set is overwritten only after the product that reads it has been waited for, while
the product on the other set runs. Tiles are of one slot (SLOT). The product is as wide as the entries need: TOKENS and
EXTRA, TOKENS, or a half or a quarter of TOKENS, so that a last tile of few costs little.

Each of the places for words and tokens under way is a buffer of its own, and the loop over steps is unrolled by
places: between a copy and any reading of the same buffer Triton puts a barrier, so stages of one buffer took two
barriers a step instead of one (docs/kernels.md). Words are in registers once decoded, so new ones come where they
were; tokens are read until their product ends, so new ones come where those of the step before were. Steps beyond the
last are of zeros, at most places - 1 of them, or twice that and one more with an odd number of places, which is
unrolled twice.

Gluon is experimental in Triton (3.6 and 3.7 tried); the plain kernels do the same wherever this file cannot.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from moefold_kernels.triton.decode import RESTORE
from moefold_kernels.triton.decode import SLOT as DECODE_SLOT
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

MOST_WRITING = gl.constexpr(8192)
"""Bytes of float32 sums that are written by way of shared memory; more would keep a second program out."""
SILU, CLAMPED = gl.constexpr(1), gl.constexpr(2)  # as in project.py

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6 and from 3.7 on


@gluon.constexpr_function
def product_layout(tokens, warps):
    """The layout of sums [rows, tokens]: a warp has 16 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, tokens, 16])


@gluon.jit
def after_the_one_before():
    """portability.after_the_one_before; these instructions do nothing where the launch is not chained."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def copy_layout(columns, warps):
    """The layout of a copy to shared memory: 16 bytes a thread, along the columns."""
    return gl.BlockedLayout([1, 8], [32 * 8 // columns, columns // 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def store_layout(rows, warps):
    """The layout of stores: out is [entry, row], so 16 bytes a thread along the rows of the sums."""
    across = min(rows // 8, 32)
    return gl.BlockedLayout([8, 1], [across, 32 // across], [1, warps], [0, 1])


@gluon.jit
def share(program, n_blocks, ROWS: gl.constexpr, GROUP: gl.constexpr):
    """project.share, for programs that know their slot: (entry in the table of tiles, first row)."""
    within = program % (GROUP * n_blocks)
    return program // (GROUP * n_blocks) * GROUP + within % GROUP, within // GROUP * ROWS


@gluon.jit
def words_in(words, unit, first_row, inner, w_unit, w_row, w_up, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Pointers to a unit's first COLUMNS columns of ROWS gate rows and up rows, by eights; and the columns' numbers."""
    layout: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    stacked = gl.arange(0, 2 * ROWS, gl.SliceLayout(1, layout))
    row = (first_row + stacked // 16 * 8 + stacked % 8) % inner
    k = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    w = words + unit.to(gl.int64) * w_unit + row.to(gl.int64)[:, None] * w_row + k[None, :]
    return w + gl.where(stacked % 16 >= 8, w_up, 0)[:, None], k


@gluon.jit
def words_out(words, unit, first_row, hidden, w_unit, w_row, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The same of ROWS rows of the down projection."""
    layout: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    row = (first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))) % hidden
    k = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    return words + unit.to(gl.int64) * w_unit + row.to(gl.int64)[:, None] * w_row + k[None, :], k


@gluon.jit
def operand_of(words):
    """decode.decode_slot, the slot being the lowest bit of the program number."""
    return gl.inline_asm_elementwise(
        DECODE_SLOT,
        "=r,r",
        [words],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def end_copies():
    """Behind the loop: Triton gives memory of places to what follows, and copies of nothing may be under way to it."""
    async_copy.wait_group(0)
    barrier()


@gluon.jit
def _begin_tokens(
    buffers, x, live, more, more_live, steps,
    COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Ask for the tokens of the first PLACES - 1 steps, and point behind them."""
    for step in gl.static_range(PLACES - 1):
        start_tokens(buffers, (x, more), (live, more_live), step, 1, step < steps, TOKENS, EXTRA)
        async_copy.commit_group()  # of nothing: in the loop words come as a group of their own
        x += COLUMNS
        if EXTRA:
            more += COLUMNS
    return x, more


@gluon.jit
def _products(
    buffers, w, x, live, more, more_live, steps,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Sums [ROWS, TOKENS] and [ROWS, EXTRA] over `steps` tiles of COLUMNS columns.

    The first PLACES steps' words have been asked for, and tokens of one less; pointers are behind them.
    """
    gl.assume(steps > 0)  # as in project.one_slot
    mma: gl.constexpr = product_layout(TOKENS, gl.num_warps())
    mma_extra: gl.constexpr = product_layout(max(EXTRA, 16), gl.num_warps())
    # the same registers for both: where a thread's part of an operand lies does not depend on the product's width
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    left_extra: gl.constexpr = gl.DotOperandLayout(0, mma_extra, 2)
    sums = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma))
    extra = warpgroup_mma_init(gl.zeros((ROWS, max(EXTRA, 16)), gl.float32, mma_extra))
    async_copy.wait_group(2 * PLACES - 3)
    barrier()
    read = buffers[words_of(0, 1)].load(left)
    for first in range(0, steps, unrolled(PLACES)):
        for number in gl.static_range(unrolled(PLACES)):
            nothing = first >> 30  # which the compiler does not know
            operand = operand_of(read)
            right = buffers[tokens_of(number % PLACES, 1, 0)].index(nothing).slice(0, TOKENS, 0).permute((1, 0))
            sums = warpgroup_mma(operand, right, sums, is_async=True)
            if EXTRA:
                again = gl.convert_layout(operand, left_extra, assert_trivial=True)
                right = buffers[extra_of(number % PLACES, 1, 0)].index(nothing).permute((1, 0))
                extra = warpgroup_mma(again, right, extra, is_async=True)
                sums, extra = warpgroup_mma_wait(2, deps=(sums, extra))  # the other set's products have ended
                extra = warpgroup_mma_init(extra)
            else:
                sums = warpgroup_mma_wait(1, deps=(sums,))
            sums = warpgroup_mma_init(sums)
            if PLACES > 2:
                async_copy.wait_group(2 * PLACES - 5)  # the next tile has come
            barrier()  # for all; nobody reads the tokens of the one before any more, nor this one's words
            if PLACES > 2:  # before copies, behind which reading would queue
                read = buffers[words_of((number + 1) % PLACES, 1)].load(left)
            ahead = first + number + PLACES
            start_tokens(
                buffers, (x, more), (live, more_live), (number + PLACES - 1) % PLACES, 1, ahead - 1 < steps, TOKENS,
                EXTRA,
            )  # fmt: skip
            start_words(buffers, w, number % PLACES, 1, ahead < steps)
            w += COLUMNS
            x += COLUMNS
            if EXTRA:
                more += COLUMNS
            if PLACES == 2:
                async_copy.wait_group(1)  # the next tile has come
                barrier()
                read = buffers[words_of((number + 1) % PLACES, 1)].load(left)
    sums, extra = warpgroup_mma_wait(0, deps=(sums, extra))
    end_copies()
    return sums, extra


@gluon.jit
def _reciprocal(value):
    """Of a number from 1 on, to a unit of float32's last place: a division is nine instructions."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def activated(
    gate, up, first_row, inner, expert, bias, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Biases and the activation of gate and up [ROWS, tokens], float32."""
    if bias is not None:
        own: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 1], [32, 1], [gl.num_warps(), 1], [1, 0]))
        at = first_row + gl.arange(0, ROWS, own)
        start = bias + expert * bias_expert
        gate_bias = gl.load(start + at * bias_row, mask=at < inner, other=0.0).to(gl.float32)
        up_bias = gl.load(start + bias_up + at * bias_row, mask=at < inner, other=0.0).to(gl.float32)
        gate += gl.convert_layout(gate_bias, gl.SliceLayout(1, gate.type.layout))[:, None]
        up += gl.convert_layout(up_bias, gl.SliceLayout(1, up.type.layout))[:, None]
    if ACTIVATION == CLAMPED:
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
        value = gate * _reciprocal(1.0 + gl.exp(-gate * alpha)) * (up + 1.0)
    else:
        value = gate * _reciprocal(1.0 + gl.exp(-gate)) * up
    return value


@gluon.jit
def gated(
    sums, first_row, inner, gate_shift, up_shift, expert, bias, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Activations [ROWS, TOKENS], float32, of sums of gate rows and up rows by eights."""
    gate, up = gl.split(gl.permute(gl.reshape(sums, (ROWS // 8, 2, 8, TOKENS)), (0, 2, 3, 1)))
    gate, up = gl.reshape(gate, (ROWS, TOKENS)), gl.reshape(up, (ROWS, TOKENS))
    gate *= RESTORE * gate_shift
    up *= RESTORE * up_shift
    return activated(
        gate, up, first_row, inner, expert, bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, ACTIVATION
    )


@gluon.jit
def write_inner(
    sums, out, begin, end, first_row, inner, gate_shift, up_shift, expert, bias, bias_expert, bias_row, bias_up,
    limit, alpha, ROWS: gl.constexpr, TOKENS: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """project.write_inner for a gated layer with a fused activation: out [entry in order, inner]."""
    value = gated(
        sums, first_row, inner, gate_shift, up_shift, expert, bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS,
        TOKENS, ACTIVATION,
    )  # fmt: skip
    store_inner(value, out, begin, end, first_row, inner, ROWS, TOKENS)


@gluon.jit
def store_inner(
    value, out, begin, end, first_row, inner, ROWS: gl.constexpr, TOKENS: gl.constexpr, KEEP: gl.constexpr = False
):  # fmt: skip
    """Activations [ROWS, TOKENS] to `out` [entry in order, inner], as bfloat16; KEEP: they are to stay in L2."""
    layout: gl.constexpr = store_layout(ROWS, gl.num_warps())
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    entry = begin + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
    at = out + entry[None, :].to(gl.int64) * inner + row[:, None]
    value = gl.convert_layout(value.to(gl.bfloat16), layout)
    gl.store(
        at, value, mask=(row < inner)[:, None] & (entry < end)[None, :], eviction_policy="evict_last" if KEEP else ""
    )


@gluon.jit
def write_slot_inner(
    sums, extra, out, begin, end, first_row, inner, gate_shift, up_shift, expert, bias, bias_expert, bias_row, bias_up,
    limit, alpha, ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """write_inner of a slot's sums [ROWS, TOKENS] and of its extra ones."""
    write_inner(
        sums, out, begin, end, first_row, inner, gate_shift, up_shift, expert, bias, bias_expert, bias_row, bias_up,
        limit, alpha, ROWS, TOKENS, ACTIVATION,
    )  # fmt: skip
    if EXTRA:
        write_inner(
            extra, out, begin + TOKENS, end, first_row, inner, gate_shift, up_shift, expert, bias, bias_expert,
            bias_row, bias_up, limit, alpha, ROWS, EXTRA, ACTIVATION,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["top_k", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"])
def project_in(
    x, words, out, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, capacity, x_row, w_unit, w_row, w_up,
    gate_shift, up_shift, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr,
    PLACES: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """project.project_in for SLOT; `hidden` is an even number of COLUMNS."""
    after_the_one_before()
    program = gl.program_id(0) // 2
    slot = gl.program_id(0) % 2
    tile, first_row = share(program, gl.cdiv(inner, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)
    if unit < 0:
        return
    place = 2 * unit + slot
    begin = gl.load(offsets + place) + gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    end = gl.load(offsets + place + 1)
    if begin >= end:
        return
    w, k = words_in(words, unit, first_row, inner, w_unit, w_row, w_up, ROWS, COLUMNS)
    buffers = buffers_of(2 * ROWS, COLUMNS, TOKENS, EXTRA, PLACES, 1)
    expert = gl.load(experts + place)
    steps = hidden // COLUMNS
    w = begin_words(buffers, w, steps, COLUMNS, PLACES, 1)
    given = (
        w, x, out, order, begin, end, k, top_k, x_row, steps, first_row, inner, gate_shift, up_shift, expert, bias,
        bias_expert, bias_row, bias_up, limit, alpha,
    )  # fmt: skip
    half: gl.constexpr = max(TOKENS // 2, 8)
    quarter: gl.constexpr = max(TOKENS // 4, 8)
    if EXTRA and end - begin > TOKENS:
        _in(buffers, given, ROWS, COLUMNS, TOKENS, EXTRA, PLACES, ACTIVATION)
    elif end - begin > half:
        _in(buffers, given, ROWS, COLUMNS, TOKENS, 0, PLACES, ACTIVATION)
    elif end - begin > quarter:
        _in(buffers, given, ROWS, COLUMNS, half, 0, PLACES, ACTIVATION)
    else:
        _in(buffers, given, ROWS, COLUMNS, quarter, 0, PLACES, ACTIVATION)


@gluon.jit
def _in(
    buffers, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr,
    PLACES: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    (
        w, x, out, order, begin, end, k, top_k, x_row, steps, first_row, inner, gate_shift, up_shift, expert, bias,
        bias_expert, bias_row, bias_up, limit, alpha,
    ) = given  # fmt: skip
    a, live = tokens_at(x, order, begin, end, k, top_k, x_row, COLUMNS, TOKENS)
    b, b_live = tokens_at(x, order, begin + TOKENS, end, k, top_k, x_row, COLUMNS, max(EXTRA, 16))
    a, b = _begin_tokens(buffers, a, live, b, b_live, steps, COLUMNS, TOKENS, EXTRA, PLACES)
    sums, extra = _products(buffers, w, a, live, b, b_live, steps, 2 * ROWS, COLUMNS, TOKENS, EXTRA, PLACES)
    write_slot_inner(
        sums, extra, out, begin, end, first_row, inner, gate_shift, up_shift, expert, bias, bias_expert, bias_row,
        bias_up, limit, alpha, ROWS, TOKENS, EXTRA, ACTIVATION,
    )  # fmt: skip


@gluon.jit
def tokens_at(
    x, order, begin, end, k, top_k, x_row, COLUMNS: gl.constexpr, N: gl.constexpr
):  # fmt: skip
    """project._tokens, but [token, column]: shared memory is turned, not the copy. Rows are aligned to 16 bytes."""
    n = begin + gl.arange(0, N, gl.SliceLayout(1, copy_layout(COLUMNS, gl.num_warps())))
    live = n < end
    token = gl.load(order + n, mask=live, other=0) // top_k
    # Triton knows whole numbers as multiples of 16, or as nothing, and a row's length may be an odd multiple of 8
    return x + gl.multiple_of(token.to(gl.int64) * x_row, 8)[:, None] + k[None, :], live[:, None]


@gluon.jit
def positions_at(x, begin, end, k, inner, COLUMNS: gl.constexpr, N: gl.constexpr):
    """project._positions, likewise."""
    n = begin + gl.arange(0, N, gl.SliceLayout(1, copy_layout(COLUMNS, gl.num_warps())))
    live = n < end
    return x + gl.where(live, n, 0).to(gl.int64)[:, None] * inner + k[None, :], live[:, None]


@gluon.jit
def entries_at(order, begin, end, TOKENS: gl.constexpr):
    """The entries of a tile, for `write_outer`; zero behind the end.

    A thread reads one. Read as the sums lie, every thread would ask for a quarter of all, one after the other, and as
    often for their gate weights, which took a fifth of the down projection of small experts (docs/kernels.md).
    """
    position = begin + gl.arange(0, TOKENS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return gl.load(order + position, mask=position < end, other=0)


@gluon.jit
def gates_of(entries, weights):
    """The entries and their gate weights, float32. To be asked for when entries have come, or a program waits here."""
    return entries, gl.load(weights + entries).to(gl.float32)


@gluon.jit
def write_outer(
    sums, out, entries, begin, end, first_row, hidden, shift, expert, bias, bias_expert, bias_row,
    ROWS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """project.write_outer: bias, gate weight, out [entry, hidden]; `entries` of `gates_of`."""
    entry, gates = entries
    value = weighted(sums, gates, first_row, hidden, shift, expert, bias, bias_expert, bias_row, ROWS)
    store_outer(value, out, entry, begin, end, first_row, hidden, ROWS, TOKENS)


@gluon.jit
def weighted(sums, gates, first_row, hidden, shift, expert, bias, bias_expert, bias_row, ROWS: gl.constexpr):
    """Sums of down [ROWS, tokens] with their bias, times gate weights."""
    scale = RESTORE * shift
    if bias is not None:
        own: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 1], [32, 1], [gl.num_warps(), 1], [1, 0]))
        at = first_row + gl.arange(0, ROWS, own)
        start = bias + expert * bias_expert
        present = (at < hidden) & (gl.program_id(1) == 0)  # of several splits the first adds it
        addend = gl.load(start + at * bias_row, mask=present, other=0.0).to(gl.float32)
        sums = sums * scale + gl.convert_layout(addend, gl.SliceLayout(1, sums.type.layout))[:, None]
    else:
        gates *= scale
    return sums * gl.convert_layout(gates, gl.SliceLayout(0, sums.type.layout))[None, :]


@gluon.jit
def store_outer(
    value, out, entry, begin, end, first_row, hidden,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, KEEP: gl.constexpr = False,
):  # fmt: skip
    """What down made [ROWS, TOKENS] to `out` [entry, hidden], in its type; KEEP: it is to stay in L2."""
    # eight rows of a product are 32 bytes of float32 (splits), which can do without shared memory to come together
    plain: gl.constexpr = out.dtype.element_ty == gl.float32 and 4 * ROWS * TOKENS > MOST_WRITING
    layout: gl.constexpr = value.type.layout if plain else store_layout(ROWS, gl.num_warps())
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    position = begin + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
    entry = gl.convert_layout(entry, gl.SliceLayout(0, layout))
    at = out + entry[None, :].to(gl.int64) * hidden + row[:, None]
    value = gl.convert_layout(value.to(out.dtype.element_ty), layout)
    gl.store(
        at,
        value,
        mask=(row < hidden)[:, None] & (position < end)[None, :],
        eviction_policy="evict_last" if KEEP else "",
    )


@gluon.jit
def write_slot_outer(
    sums, extra, out, entries, more, begin, end, first_row, hidden, shift, expert, bias, bias_expert, bias_row,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr,
):  # fmt: skip
    """write_outer of a slot's sums [ROWS, TOKENS] and of its extra ones, with their entries."""
    write_outer(
        sums, out, entries, begin, end, first_row, hidden, shift, expert, bias, bias_expert, bias_row,
        ROWS, TOKENS,
    )  # fmt: skip
    if EXTRA:
        write_outer(
            extra, out, more, begin + TOKENS, end, first_row, hidden, shift, expert, bias, bias_expert, bias_row, ROWS,
            EXTRA,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["capacity", "bias_expert", "bias_row"])
def project_out(
    x, words, out, order, offsets, tiles, experts, weights, bias,
    inner, hidden, capacity, w_unit, w_row, shift, bias_expert, bias_row,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, GROUP: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    """project.project_out for SLOT in one split; `inner` is an even number of COLUMNS."""
    program = gl.program_id(0) // 2
    slot = gl.program_id(0) % 2
    tile, first_row = share(program, gl.cdiv(hidden, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)  # the tables are of two kernels before
    if unit < 0:
        after_the_one_before()  # also here: that this kernel has ended must mean that the one before it has
        return
    place = 2 * unit + slot
    begin = gl.load(offsets + place) + gl.load(tiles + capacity + tile) * (TOKENS + EXTRA)
    end = gl.load(offsets + place + 1)
    if begin >= end:
        after_the_one_before()
        return
    w, k = words_out(words, unit, first_row, hidden, w_unit, w_row, ROWS, COLUMNS)
    buffers = buffers_of(ROWS, COLUMNS, TOKENS, EXTRA, PLACES, 1)
    expert = gl.load(experts + place)
    steps = inner // COLUMNS
    w = begin_words(buffers, w, steps, COLUMNS, PLACES, 1)
    after_the_one_before()
    given = (
        w, x, out, order, weights, begin, end, k, steps, first_row, inner, hidden, shift, expert, bias, bias_expert,
        bias_row,
    )  # fmt: skip
    half: gl.constexpr = max(TOKENS // 2, 8)
    quarter: gl.constexpr = max(TOKENS // 4, 8)
    if EXTRA and end - begin > TOKENS:
        _out(buffers, given, ROWS, COLUMNS, TOKENS, EXTRA, PLACES)
    elif end - begin > half:
        _out(buffers, given, ROWS, COLUMNS, TOKENS, 0, PLACES)
    elif end - begin > quarter:
        _out(buffers, given, ROWS, COLUMNS, half, 0, PLACES)
    else:
        _out(buffers, given, ROWS, COLUMNS, quarter, 0, PLACES)


@gluon.jit
def _out(
    buffers, given,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    (
        w, x, out, order, weights, begin, end, k, steps, first_row, inner, hidden, shift, expert, bias, bias_expert,
        bias_row,
    ) = given  # fmt: skip
    entries = entries_at(order, begin, end, TOKENS)
    more = entries_at(order, begin + TOKENS, end, max(EXTRA, 16))
    a, live = positions_at(x, begin, end, k, inner, COLUMNS, TOKENS)
    b, b_live = positions_at(x, begin + TOKENS, end, k, inner, COLUMNS, max(EXTRA, 16))
    a, b = _begin_tokens(buffers, a, live, b, b_live, steps, COLUMNS, TOKENS, EXTRA, PLACES)
    entries, more = gates_of(entries, weights), gates_of(more, weights)
    sums, extra = _products(buffers, w, a, live, b, b_live, steps, ROWS, COLUMNS, TOKENS, EXTRA, PLACES)
    write_slot_outer(
        sums, extra, out, entries, more, begin, end, first_row, hidden, shift, expert, bias, bias_expert, bias_row,
        ROWS, TOKENS, EXTRA,
    )  # fmt: skip
