"""The few-bit pair formats on Hopper: the projections over planes of bits, with products running while others decode.

As in overlapped.py and overlapped_pair.py two sets of operand registers take turns; a program serves both slots of a
pair from one reading (PAIRED), or one. A step is 128 columns, two groups: one barrier, words of 64 bytes a row, and the
two scales of a row in one copy of 4 bytes. What the planes hold becomes operands in registers: by integer
instructions (leveled_decode.py), or LOOKED quarters of them by a table in shared memory
(leveled_lookup.py), so that two units of a processor are in use, and one answers while the other works.
"""

# ruff: noqa: RUF005 - the compiler knows tuples' `+`, and no `*given`
# mypy: disable-error-code=assignment
# (tuples that grow)

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from moefold_kernels.layout_pairs import MAGNITUDE_BITS, low_bits
from moefold_kernels.levels import INTEGERS
from moefold_kernels.triton import leveled_lookup
from moefold_kernels.triton.leveled_decode import SLOT_SIGNS, assembly, constraints
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

STEP = gl.constexpr(128)
"""Columns of a step."""
HALF = gl.constexpr(64)
"""Columns of a group, and of one set of operands."""
TABLE = gl.constexpr(INTEGERS)
"""Of a matrix in `levels`."""
WORDS, LOW, SCALE, TOKENS_OF, PADDING = (gl.constexpr(i) for i in (0, 2, 4, 5, 9))
"""Numbers of buffers: two halves of `words`, two of `low`, scales, two halves of either slot's tokens, nothing."""
FIRST = gl.constexpr(256)
"""Programs that begin together: two for each processor of a large GPU."""
SMALL = gl.constexpr(48 * 1024)
"""Bytes that Triton has to ask for more than, before it lets a kernel have more than these with the table."""


_CODE = gl.constexpr({(f, n): (assembly(f, n), constraints(f, n), 1) for f in MAGNITUDE_BITS for n in (1, 2)})
_LOW_BITS = gl.constexpr({f: low_bits(f) for f in MAGNITUDE_BITS})


@gluon.constexpr_function
def code(format, slots, looked, part):
    """The assembly (part 0), its constraints, and how many times four positions it makes."""
    return (leveled_lookup.CODE.value[format, slots, looked] if looked else _CODE.value[format, slots])[part]


@gluon.constexpr_function
def low_words(format, columns):
    """Words of the plane `low` in so many columns; one where there is no such plane."""
    return max(1, columns * _LOW_BITS.value[format] // 32)


@gluon.constexpr_function
def low_held(format):
    """Words of a row of `low` in one allocation: of a step, but of half a step for pair8 (as of `words`)."""
    return min(low_words(format, STEP.value), 8)


@gluon.constexpr_function
def _padding(rows, tokens, stages, format, paired, looked):
    """KB that bring what Triton asks for above SMALL, where that is too little with a table, of which it knows nothing."""
    bits = 4 + _LOW_BITS.value[format]
    bytes = stages * (rows * (STEP.value * bits // 8 + 4) + tokens * 2 * STEP.value * (2 if paired else 1))
    large = looked and bytes + 1024 + leveled_lookup.size(format) > SMALL.value
    return (max(SMALL.value - bytes, 0) if large else 0) // 1024 + 1


@gluon.constexpr_function
def signs_of(slot, number):
    return SLOT_SIGNS.value[2 * slot + number]


@gluon.constexpr_function
def _bits(size):
    return [1 << bit for bit in range(size.bit_length() - 1)]


@gluon.constexpr_function
def rows_layout(rows, words, warps):
    """Words [rows, words] as the product wants rows: the four threads of a group have the same ones."""
    registers = (
        [[0, bit] for bit in _bits(words)] + [[8, 0]] + [[16 * warps * bit, 0] for bit in _bits(rows // warps // 16)]
    )
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16 * bit, 0] for bit in _bits(warps)], [], [rows, words])


@gluon.constexpr_function
def units_layout(rows, warps):
    """[rows, 4 units of 16 columns, thread of a group]."""
    registers = [[0, 1, 0], [0, 2, 0], [8, 0, 0]] + [[16 * warps * bit, 0, 0] for bit in _bits(rows // warps // 16)]
    lanes = [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16 * bit, 0, 0] for bit in _bits(warps)], [], [rows, 4, 4])


@gluon.constexpr_function
def plane_layout(words, warps):
    """The layout of a copy of a plane to shared memory: 16 bytes a thread, or 4 (scales)."""
    across = max(1, words // 4)
    return gl.BlockedLayout([1, min(words, 4)], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def _rows_in(first_row, inner, w_up, ROWS: gl.constexpr, layout: gl.constexpr):
    """Gate and up rows by eights, and where the up rows are: (row, rows to skip)."""
    stacked = gl.arange(0, 2 * ROWS, gl.SliceLayout(1, layout))
    row = (first_row + stacked // 16 * 8 + stacked % 8) % inner
    return row + gl.where(stacked % 16 >= 8, w_up, 0)


@gluon.jit
def _rows_out(first_row, hidden, ROWS: gl.constexpr, layout: gl.constexpr):
    return (first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))) % hidden


@gluon.jit
def _plane(plane, unit, row, rows, words, skipped, WORDS: gl.constexpr, layout: gl.constexpr):
    """Pointers to the first WORDS words, from `skipped` on, of some rows of a unit; a plane is contiguous."""
    start = (unit.to(gl.int64) * rows + row) * words + skipped
    if WORDS > 1:
        start = gl.multiple_of(start, 4)  # whole steps: 16 bytes
    return plane + start[:, None] + gl.arange(0, WORDS, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _start_words(buffers, planes, stage, wanted, FORMAT: gl.constexpr):
    for half in gl.static_range(2):
        async_copy.async_copy_global_to_shared(buffers[WORDS + half].index(stage), planes[0] + 8 * half, mask=wanted)
    if FORMAT != "pair4":
        async_copy.async_copy_global_to_shared(buffers[LOW].index(stage), planes[1], mask=wanted)
    if FORMAT == "pair8":
        async_copy.async_copy_global_to_shared(buffers[LOW + 1].index(stage), planes[1] + 8, mask=wanted)
    async_copy.async_copy_global_to_shared(buffers[SCALE].index(stage), planes[2], mask=wanted)


@gluon.jit
def _start_tokens(buffers, x, live, stage, wanted, PAIRED: gl.constexpr):
    for slot in gl.static_range(2 if PAIRED else 1):
        for half in gl.static_range(2):
            to = buffers[TOKENS_OF + 2 * slot + half].index(stage)
            async_copy.async_copy_global_to_shared(to, x[slot] + HALF * half, mask=live[slot] & wanted)
    async_copy.commit_group()


@gluon.jit
def _operand(low, high, ROWS: gl.constexpr, left: gl.constexpr):
    """bf16 [ROWS, HALF] of pairs of them [ROWS, 4, 4]: columns 2 t and 2 t + 1 of every 16, then 8 more."""
    pairs = gl.reshape(gl.permute(gl.join(low, high), (0, 1, 3, 2)), (ROWS, HALF // 2))
    twice = gl.reshape(gl.join(pairs, pairs), (ROWS, HALF))
    made = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [twice], dtype=gl.bfloat16, is_pure=True, pack=2)
    return gl.convert_layout(made, left, assert_trivial=True)


@gluon.jit
def _pairwise(plane, WORDS: gl.constexpr, ROWS: gl.constexpr, units: gl.constexpr):
    """The two words of every 16 columns, of a plane with two."""
    first, second = gl.split(gl.reshape(plane, (ROWS, WORDS // 2, 2)))
    layout: gl.constexpr = gl.SliceLayout(2, units)
    first = gl.convert_layout(first, layout, assert_trivial=True)
    second = gl.convert_layout(second, layout, assert_trivial=True)
    return gl.expand_dims(first, 2), gl.expand_dims(second, 2)


@gluon.jit
def _scaled(level, scale):
    return gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [level, scale], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _of_rows(values):
    return gl.expand_dims(gl.expand_dims(values, 1), 2)


@gluon.jit
def _scales(buffers, stage, half: gl.constexpr, ROWS: gl.constexpr, units: gl.constexpr):
    """Each row's scale of a group, twice in an integer."""
    both = buffers[SCALE].index(stage).load(rows_layout(ROWS, 1, gl.num_warps()))
    both = gl.reshape(both, (ROWS,))
    both = gl.convert_layout(both, gl.SliceLayout(1, gl.SliceLayout(2, units)), assert_trivial=True)
    scale = (both >> 16) & 0xFFFF if half else both & 0xFFFF
    return scale | scale << 16


@gluon.jit
def _lows(buffers, stage, half: gl.constexpr, ROWS: gl.constexpr, FORMAT: gl.constexpr, units: gl.constexpr):
    """The words of `low` of every 16 columns of a group: two (pair8), one (pair6), or one with its bits moved (pair5)."""
    if FORMAT == "pair8":
        lows = buffers[LOW + half].index(stage).load(rows_layout(ROWS, 8, gl.num_warps()))
        found = _pairwise(lows, 8, ROWS, units)
    else:
        words: gl.constexpr = low_words(FORMAT, HALF)
        lows = buffers[LOW].index(stage).slice(words * half, words, 1).load(rows_layout(ROWS, words, gl.num_warps()))
        if FORMAT == "pair5":
            lows = gl.reshape(gl.join(lows, lows >> 2), (ROWS, 4))
        found = (gl.expand_dims(gl.convert_layout(lows, gl.SliceLayout(2, units), assert_trivial=True), 2),)
    return found


@gluon.jit
def _decoded(
    buffers, stage, gather, signs, tables, lookup,
    half: gl.constexpr, ROWS: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr, LOOKED: gl.constexpr,
    left: gl.constexpr,
):  # fmt: skip
    """The operands of one group: of both slots, or of one, twice."""
    units: gl.constexpr = units_layout(ROWS, gl.num_warps())
    words = buffers[WORDS + half].index(stage).load(rows_layout(ROWS, 8, gl.num_warps()))
    scale = _scales(buffers, stage, half, ROWS, units)
    given = _pairwise(words, 8, ROWS, units)
    if LOOKED:
        given = given + (lookup[0],)
        if FORMAT != "pair4":
            given = given + _lows(buffers, stage, half, ROWS, FORMAT, units)
        given = given + (_of_rows(scale), lookup[1])
        if FORMAT != "pair4" and not PAIRED:
            given = given + (lookup[2],)
    if LOOKED < 4:
        given = given + (gather,)
        if FORMAT != "pair4" and not LOOKED:
            given = given + _lows(buffers, stage, half, ROWS, FORMAT, units) + (_of_rows(scale),)
        if not PAIRED:
            given = given + signs
        if FORMAT == "pair4":
            given = given + (_of_rows(_scaled(tables[0], scale)), _of_rows(_scaled(tables[1], scale)))
        else:
            given = given + (_of_rows(tables[0]), _of_rows(tables[1]), _of_rows(tables[2]), _of_rows(tables[3]))
        if FORMAT == "pair8":
            given = given + (_of_rows(tables[4]), _of_rows(tables[5]), _of_rows(tables[6]), _of_rows(tables[7]))
    if PAIRED:
        a, b, c, d = gl.inline_asm_elementwise(
            code(FORMAT, 2, LOOKED, 0), code(FORMAT, 2, LOOKED, 1), given,
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True,
            pack=code(FORMAT, 2, LOOKED, 2),
        )  # fmt: skip
        return _operand(a, b, ROWS, left), _operand(c, d, ROWS, left)
    a, b = gl.inline_asm_elementwise(
        code(FORMAT, 1, LOOKED, 0), code(FORMAT, 1, LOOKED, 1), given,
        dtype=(gl.int32, gl.int32), is_pure=True, pack=code(FORMAT, 1, LOOKED, 2),
    )  # fmt: skip
    own = _operand(a, b, ROWS, left)
    return own, own


@gluon.jit
def _buffers(
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr,
    LOOKED: gl.constexpr,
):  # fmt: skip
    # each plane and each half of the tokens for itself: Triton puts a barrier between two copies to one allocation; of
    # words halves, too: rows of 32 bytes, four of which lie in different banks
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    turned: gl.constexpr = gl.NVMMASharedLayout(2 * HALF, 16, 2)
    others: gl.constexpr = TOKENS if PAIRED else 8
    return (
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, STEP // 16], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, STEP // 16], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS if FORMAT != "pair4" else 1, low_held(FORMAT)], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS if FORMAT == "pair8" else 1, low_held(FORMAT)], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, 1], plain),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, HALF], turned),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, HALF], turned),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, others, HALF], turned),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, others, HALF], turned),
        gl.allocate_shared_memory(
            gl.int32,
            [_padding(ROWS, TOKENS, STAGES, FORMAT, PAIRED, LOOKED), 256],
            gl.SwizzledSharedLayout(1, 1, 1, [0]),
        ),
    )


@gluon.jit
def _next(stage, STAGES: gl.constexpr):
    """The stage behind one: dividing by what is no power of two takes some twenty instructions more a round."""
    return gl.where(stage == STAGES - 1, 0, stage + 1)


@gluon.jit
def _products(
    buffers, planes, x, live, steps, slot, levels, up, table,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr,
    LOOKED: gl.constexpr,
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
        _start_tokens(buffers, (x0, x1), live, first, first < steps, PAIRED)
        x0 += STEP
        x1 += STEP
    thread = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, units))), 0), 0)
    gather = thread | (thread + 4) << 4
    lookup = (gather, gather, gather)
    if LOOKED:
        choice = 128 << 8 * thread if FORMAT == "pair4" else gather * 0x101  # of all four bytes; of two words, twice
        copies = leveled_lookup.own_copies(table, levels, up, FORMAT, PAIRED, ROWS, units)
        lookup = (choice, copies, gl.full((1, 1, 4), gl.where(slot == 0, 0x5410, 0x7632), gl.int32, units))
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
    stage = steps * 0
    to = stage + STAGES - 2
    for step in range(0, steps):
        async_copy.wait_group(STAGES - 3)
        barrier()  # this step has come, and nobody reads step - 2 any more, whose place is next
        ahead = step + STAGES - 2
        _start_words(buffers, (w, low, scale), to, ahead < steps, FORMAT)
        _start_tokens(buffers, (x0, x1), live, to, ahead < steps, PAIRED)
        to = _next(to, STAGES)
        w += STEP // 8
        if FORMAT != "pair4":
            low += low_words(FORMAT, STEP)
        scale += 1
        x0 += STEP
        x1 += STEP
        for half in gl.static_range(2):
            ours, theirs = _decoded(
                buffers, stage, gather, signs, tables, lookup, half, ROWS, FORMAT, PAIRED, LOOKED, left
            )
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
        stage = _next(stage, STAGES)
    buffers[PADDING]._keep_alive()
    return warpgroup_mma_wait(0, deps=(sums0, sums1))


@gluon.jit
def _begin(buffers, planes, steps, STAGES: gl.constexpr, FORMAT: gl.constexpr):
    """Ask for the words of the first steps, and point behind them."""
    w, low, scale = planes
    for first in gl.static_range(STAGES - 2):
        _start_words(buffers, (w, low, scale), first, first < steps, FORMAT)
        w += STEP // 8
        if FORMAT != "pair4":
            low += low_words(FORMAT, STEP)
        scale += 1
    return w, low, scale


@gluon.jit
def _entries(offsets, unit, slot, skipped, PAIRED: gl.constexpr):
    """(begin, end) of the first place's entries in a tile, and of the second's."""
    place = 2 * unit + (0 if PAIRED else slot)
    begin0, end0 = gl.load(offsets + place) + skipped, gl.load(offsets + place + 1)
    begin1, end1 = end0, end0
    if PAIRED:
        begin1, end1 = end0 + skipped, gl.load(offsets + place + 2)
    return place, begin0, end0, begin1, end1


@gluon.jit(do_not_specialize=["top_k", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"])
def project_in(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, capacity, x_row, w_up, shift, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, ACTIVATION: gl.constexpr,
    FORMAT: gl.constexpr, PAIRED: gl.constexpr, LOOKED: gl.constexpr,
):  # fmt: skip
    """overlapped.project_in; `hidden` is a number of STEPs, planes are contiguous [unit, row, word], gate rows first.

    `w_up`: rows from a gate row to its up row, within a unit of 2 * inner.
    """
    slot = 0 if PAIRED else gl.program_id(0) % 2
    table = 0
    early: gl.constexpr = LOOKED > 0 and TOKENS <= 16 and not PAIRED  # few tokens: the first programs wait here anyway
    if LOOKED:
        table = leveled_lookup.place(FORMAT)
    if early:
        if gl.program_id(0) < FIRST:
            leveled_lookup.fill(table, levels, TABLE, slot, FORMAT, PAIRED)
    after_the_one_before()
    program = gl.program_id(0) if PAIRED else gl.program_id(0) // 2
    tile, first_row = share(program, gl.cdiv(inner, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)
    if unit < 0:
        return
    skipped = gl.load(tiles + capacity + tile) * TOKENS
    place, begin0, end0, begin1, end1 = _entries(offsets, unit, slot, skipped, PAIRED)
    if not PAIRED and begin0 >= end0:
        return
    buffers = _buffers(2 * ROWS, TOKENS, STAGES, FORMAT, PAIRED, LOOKED)
    wide: gl.constexpr = plane_layout(STEP // 16, gl.num_warps())
    lows: gl.constexpr = plane_layout(low_held(FORMAT), gl.num_warps())
    one: gl.constexpr = plane_layout(1, gl.num_warps())
    row_w = _rows_in(first_row, inner, w_up, ROWS, wide)
    row_l = _rows_in(first_row, inner, w_up, ROWS, lows)
    row_s = _rows_in(first_row, inner, w_up, ROWS, one)
    planes = (
        _plane(words, unit, row_w, 2 * inner, hidden // 8, 0, STEP // 16, wide),
        _plane(low, unit, row_l, 2 * inner, hidden * low_words(FORMAT, STEP) // STEP, 0, low_held(FORMAT), lows),
        _plane(scale, unit, row_s, 2 * inner, hidden // STEP, 0, 1, one),
    )
    steps = hidden // STEP
    planes = _begin(buffers, planes, steps, STAGES, FORMAT)
    if LOOKED:
        if not early or gl.program_id(0) >= FIRST:
            leveled_lookup.fill(table, levels, TABLE, slot, FORMAT, PAIRED)
    k = gl.arange(0, HALF, gl.SliceLayout(0, copy_layout(HALF, gl.num_warps())))
    a0, live0 = tokens_at(x, order, begin0, end0, k, top_k, x_row, HALF, TOKENS)
    a1, live1 = a0, live0
    if PAIRED:
        a1, live1 = tokens_at(x, order, begin1, end1, k, top_k, x_row, HALF, TOKENS)
    sums0, sums1 = _products(
        buffers, planes, (a0, a1), (live0, live1), steps, slot, levels, TABLE, table, 2 * ROWS, TOKENS, STAGES,
        FORMAT, PAIRED, LOOKED,
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
    PAIRED: gl.constexpr, LOOKED: gl.constexpr,
):  # fmt: skip
    """overlapped.project_out, in splits of `part` columns (a number of STEPs, as `inner` is)."""
    slot = 0 if PAIRED else gl.program_id(0) % 2
    program = gl.program_id(0) if PAIRED else gl.program_id(0) // 2
    tile, first_row = share(program, gl.cdiv(hidden, ROWS), ROWS, GROUP)
    unit = gl.load(tiles + tile)  # the tables are of two kernels before
    if unit < 0:
        return
    skipped = gl.load(tiles + capacity + tile) * TOKENS
    place, begin0, end0, begin1, end1 = _entries(offsets, unit, slot, skipped, PAIRED)
    if not PAIRED and begin0 >= end0:
        return
    begin = gl.program_id(1) * part
    out += gl.program_id(1).to(gl.int64) * out_split
    buffers = _buffers(ROWS, TOKENS, STAGES, FORMAT, PAIRED, LOOKED)
    wide: gl.constexpr = plane_layout(STEP // 16, gl.num_warps())
    lows: gl.constexpr = plane_layout(low_held(FORMAT), gl.num_warps())
    one: gl.constexpr = plane_layout(1, gl.num_warps())
    planes = (
        _plane(words, unit, _rows_out(first_row, hidden, ROWS, wide), hidden, inner // 8, begin // 8, STEP // 16, wide),
        _plane(
            low, unit, _rows_out(first_row, hidden, ROWS, lows), hidden, inner * low_words(FORMAT, STEP) // STEP,
            begin * low_words(FORMAT, STEP) // STEP, low_held(FORMAT), lows,
        ),
        _plane(scale, unit, _rows_out(first_row, hidden, ROWS, one), hidden, inner // STEP, begin // STEP, 1, one),
    )  # fmt: skip
    steps = gl.minimum(inner - begin, part) // STEP
    planes = _begin(buffers, planes, steps, STAGES, FORMAT)
    table = 0
    if LOOKED:
        table = leveled_lookup.place(FORMAT)
        leveled_lookup.fill(table, levels + 2 * TABLE, 0, slot, FORMAT, PAIRED)
    after_the_one_before()
    k = begin + gl.arange(0, HALF, gl.SliceLayout(0, copy_layout(HALF, gl.num_warps())))
    a0, live0 = positions_at(x, begin0, end0, k, inner, HALF, TOKENS)
    a1, live1 = a0, live0
    if PAIRED:
        a1, live1 = positions_at(x, begin1, end1, k, inner, HALF, TOKENS)
    sums0, sums1 = _products(
        buffers, planes, (a0, a1), (live0, live1), steps, slot, levels + 2 * TABLE, 0, table, ROWS, TOKENS, STAGES,
        FORMAT, PAIRED, LOOKED,
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
