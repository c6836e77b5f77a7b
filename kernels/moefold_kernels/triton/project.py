"""The two projections of a packed (or dense) experts layer, and the sum over each token's experts.

A program takes one tile of the routing tables (some entries of a unit) and a block of output rows. Weights are the left
operand of the product, decoded in registers, and tokens the right one, so that few tokens waste little. There are three
modes, each with one loop: PAIR reads a tile of words once for both slots; SLOT decodes one slot for a program (the two
programs of a pair are neighbours and share the words in L2), which pays where few pairs have both slots in use, and
where products take longer than reading; DENSE reads bfloat16 weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moefold_kernels.triton.decode import decode_both, decode_slot, rescale
from moefold_kernels.triton.decode_levels import TABLE, levels_both, levels_slot
from moefold_kernels.triton.portability import after_the_one_before, ask

PAIR, SLOT, DENSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a unit is: a pair of experts, one packed expert, one dense expert."""

NONE, SILU, CLAMPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""The activation fused into the first projection: none (rows are written as they are), SiLU(gate) * up, gpt-oss's."""


@triton.jit
def share(program, n_blocks, GROUP: tl.constexpr, MODE: tl.constexpr):
    """A program's (entry in the table of tiles, block of rows, slot): blocks outside, GROUP tiles side by side.

    Programs that run together thus share rows of weights (tiles of one unit) or entries (blocks of rows) in L2.
    """
    slot = program % 2  # of SLOT; decode_slot reads the same bit
    if MODE == SLOT:
        program = program // 2
    group = program // (GROUP * n_blocks)
    within = program % (GROUP * n_blocks)
    tile = group * GROUP + within % GROUP
    return tile, within // GROUP, slot


@triton.jit
def entries_of(offsets, place, number, TOKENS: tl.constexpr):
    """Where a tile's entries of one place begin and end."""
    return tl.load(offsets + place) + number * TOKENS, tl.load(offsets + place + 1)


@triton.jit
def prefetch(rows, LINES: tl.constexpr):
    """Ask for the first LINES cache lines (64 words each) of some rows in L2; nothing waits for them."""
    ask(rows + 64 * tl.arange(0, LINES)[None, :])


@triton.jit
def _tokens(x, order, begin, end, k, top_k, x_row, N: tl.constexpr):
    """Pointers to the hidden states of N entries from `begin`, and which of them there are."""
    n = begin + tl.arange(0, N)
    live = n < end
    token = tl.load(order + n, mask=live, other=0) // top_k
    return x + token.to(tl.int64)[None, :] * x_row + k[:, None], live


@triton.jit
def _positions(x, begin, end, k, inner, N: tl.constexpr):
    """The same for activations, which lie in the entries' order."""
    n = begin + tl.arange(0, N)
    live = n < end
    return x + tl.where(live, n, 0).to(tl.int64)[None, :] * inner + k[:, None], live


@triton.jit
def _multiply(weights, x, sums, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies the bit patterns of bf16 operands
        return tl.dot(weights.to(tl.float32), x.to(tl.float32), sums)
    return tl.dot(weights, x, sums)


@triton.jit
def _finished(sums, ASM: tl.constexpr):
    """The same sums, used once in the loop (by no instruction), so that products end before their operands change.

    Triton 3.6 lets asynchronous products run on into the next round of the loop while it decodes into the very
    registers that they still read; it waits only where a sum is used.
    """
    if ASM:
        sums = tl.inline_asm_elementwise("", "=r,0", [sums], dtype=tl.float32, is_pure=True, pack=1)
    return sums


@triton.jit
def _words(pointers, k, EVEN: tl.constexpr, length):
    """A tile of words or weights [rows, COLUMNS]; what is beyond `length` reads as zero."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(k < length)[None, :], other=0)


@triton.jit
def _load(pointers, k, live, EVEN: tl.constexpr, length):
    """Tokens [COLUMNS, tokens]; what is beyond `length` or not live reads as zero."""
    if EVEN:
        return tl.load(pointers, mask=live[None, :], other=0.0)
    return tl.load(pointers, mask=(k < length)[:, None] & live[None, :], other=0.0)


@triton.jit
def one_slot(
    w, planes, x, live, more, more_live, slot, length,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, EXTRA: tl.constexpr,
    MODE: tl.constexpr, LOW: tl.constexpr, BANDS: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One slot's weights [ROWS, length] times x [length, TOKENS] and more [length, EXTRA], by their first pointers.

    LOW: bits of the plane `low` in the few-bit formats (decode_levels.py says what `planes` and `w` are then), else -1.
    """
    tl.assume(length > 0)  # else ptxas sees the sums defined twice (loop skipped) and waits for every single product
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    extra = tl.zeros((ROWS, max(EXTRA, 16)), tl.float32)
    k = tl.arange(0, COLUMNS)
    for start in tl.range(0, length, COLUMNS):
        a = _load(x, k, live, EVEN, length - start)
        if MODE != DENSE and LOW >= 0:
            tile = levels_slot(w, planes, start + k, k < length - start, slot, LOW, BANDS)
        else:
            tile = _words(w, k, EVEN, length - start)
            if MODE != DENSE:
                tile = decode_slot(tile, slot, ASM)
        if EXTRA:
            b = _load(more, k, more_live, EVEN, length - start)
            extra = _multiply(tile, b, extra, UPCAST)
        sums = _multiply(tile, a, sums, UPCAST)
        if MODE != DENSE:
            if EXTRA:
                extra = _finished(extra, ASM)
            sums = _finished(sums, ASM)
        if LOW < 0 or MODE == DENSE:
            w += COLUMNS
        x += COLUMNS
        if EXTRA:
            more += COLUMNS
    return sums, extra


@triton.jit
def both_slots(
    w, planes, x0, x1, live0, live1, more0, more1, more_live0, more_live1, length,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, EXTRA: tl.constexpr,
    LOW: tl.constexpr, BANDS: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same for both slots of a pair, each with tokens of its own, from one reading of the words."""
    tl.assume(length > 0)
    sums0 = tl.zeros((ROWS, TOKENS), tl.float32)
    sums1 = tl.zeros((ROWS, TOKENS), tl.float32)
    extra0 = tl.zeros((ROWS, max(EXTRA, 16)), tl.float32)
    extra1 = tl.zeros((ROWS, max(EXTRA, 16)), tl.float32)
    k = tl.arange(0, COLUMNS)
    for start in tl.range(0, length, COLUMNS):
        a0 = _load(x0, k, live0, EVEN, length - start)
        a1 = _load(x1, k, live1, EVEN, length - start)
        if LOW >= 0:
            first, second = levels_both(w, planes, start + k, k < length - start, LOW, BANDS)
        else:
            first, second = decode_both(_words(w, k, EVEN, length - start), ASM)
        if EXTRA:
            b0 = _load(more0, k, more_live0, EVEN, length - start)
            b1 = _load(more1, k, more_live1, EVEN, length - start)
            extra0 = _multiply(first, b0, extra0, UPCAST)
            extra1 = _multiply(second, b1, extra1, UPCAST)
        sums0 = _multiply(first, a0, sums0, UPCAST)
        sums1 = _multiply(second, a1, sums1, UPCAST)
        if EXTRA:
            extra0, extra1 = _finished(extra0, ASM), _finished(extra1, ASM)
        sums0, sums1 = _finished(sums0, ASM), _finished(sums1, ASM)
        if LOW < 0:
            w += COLUMNS
        x0 += COLUMNS
        x1 += COLUMNS
        if EXTRA:
            more0 += COLUMNS
            more1 += COLUMNS
    return sums0, sums1, extra0, extra1


@triton.jit
def activate(gate, up, limit, alpha, ACTIVATION: tl.constexpr):
    """The hidden activation of gate and up, float32 of one shape."""
    if ACTIVATION == CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return gate / (1.0 + tl.exp(-gate * alpha)) * (up + 1.0)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def write_inner(
    sums, out, begin, end, block, inner, expert, gate_shift, up_shift,
    bias, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, MODE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr = False,
):  # fmt: skip
    """Bias, activation, and the rows of one slot's entries: out [entry in order, inner] (2 * inner, not activated)."""
    row = block * ROWS + tl.arange(0, ROWS)
    entry = begin + tl.arange(0, TOKENS)
    inside = (row < inner)[:, None] & (entry < end)[None, :]
    width = inner
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (ROWS // 8, 2, 8, TOKENS)), (0, 2, 3, 1)))
        gate, up = tl.reshape(gate, (ROWS, TOKENS)), tl.reshape(up, (ROWS, TOKENS))
        if MODE != DENSE:
            gate = rescale(gate, gate_shift)
        if bias is not None:
            gate += tl.load(bias + expert * bias_expert + row * bias_row, mask=row < inner, other=0.0)[:, None]
        if ACTIVATION == NONE:
            width = 2 * inner
    else:
        up = sums
    if MODE != DENSE:
        up = rescale(up, up_shift)
    if bias is not None:
        up += tl.load(bias + expert * bias_expert + bias_up + row * bias_row, mask=row < inner, other=0.0)[:, None]
    at = out + entry[None, :].to(tl.int64) * width + row[:, None]
    if not GATED:
        tl.store(at, up.to(out.dtype.element_ty), mask=inside)
    elif ACTIVATION == NONE:
        tl.store(at, gate.to(out.dtype.element_ty), mask=inside)
        tl.store(at + inner, up.to(out.dtype.element_ty), mask=inside)
    else:
        made = activate(gate, up, limit, alpha, ACTIVATION)
        tl.store(at, made.to(out.dtype.element_ty), mask=inside, eviction_policy="evict_last" if KEEP else "")


@triton.jit(
    do_not_specialize=["top_k", "first", "units", "capacity", "bias_expert", "bias_row", "bias_up", "limit", "alpha"]
)
def project_in(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, bias,
    hidden, inner, top_k, first, units, capacity, x_row, w_unit, w_row, w_up,
    gate_shift, up_shift, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
    EXTRA: tl.constexpr, MODE: tl.constexpr, LOW: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr, CHAIN: tl.constexpr,
    LINES: tl.constexpr, GUESS: tl.constexpr, BANDS: tl.constexpr,
):  # fmt: skip
    """Gate and up projections with their activation: out [entry in order, inner].

    `words` [unit, row, hidden] holds a gate row's and its up row's columns `w_up` elements apart. Both go through one
    product as 2 * ROWS rows: eight of the one, eight of the other, so that a thread has the sums of both. In few-bit
    formats (LOW) `words`, `low` and `scale` are planes of 2 * inner rows, in BANDS or by rows, and `levels` is of gate,
    then up.
    """
    height: tl.constexpr = 2 * ROWS if GATED else ROWS
    stacked = tl.arange(0, height)
    index = stacked // 16 * 8 + stacked % 8 if GATED else stacked
    tile, block, slot = share(tl.program_id(0), tl.cdiv(inner, ROWS), GROUP, MODE)
    row = (block * ROWS + index) % inner  # wrapped, not masked: what is read twice is not written
    w = words + row.to(tl.int64)[:, None] * w_row
    if GATED:
        w += tl.where(stacked % 16 >= 8, w_up, 0)[:, None]
    if GUESS and (
        LOW < 0 or MODE == DENSE
    ):  # nearly every unit has entries, and one tile: then this is the unit, while routing still goes on
        prefetch(w + tl.minimum(tile, units - 1).to(tl.int64) * w_unit, LINES)
    after_the_one_before(CHAIN)
    unit, number = tl.load(tiles + tile), tl.load(tiles + capacity + tile)
    if unit < 0:
        return
    place = first + unit if MODE == DENSE else 2 * unit + (slot if MODE == SLOT else 0)
    begin, end = entries_of(offsets, place, number, TOKENS + EXTRA)
    if MODE == SLOT and begin >= end:
        return
    k = tl.arange(0, COLUMNS)
    if LOW < 0 or MODE == DENSE:
        w += unit.to(tl.int64) * w_unit + k[None, :]
        planes = (words, None, None, None, None, 0)
    else:
        above = tl.where(stacked % 16 >= 8, 1, 0) if GATED else stacked * 0 + 1
        w = unit.to(tl.int64) * (2 if GATED else 1) * inner + row + (above * inner if GATED else 0)
        planes = (words, low, scale, levels + above * TABLE, hidden, 0)
    a, live = _tokens(x, order, begin, end, k, top_k, x_row, TOKENS)
    b, b_live = a, live
    if EXTRA:
        b, b_live = _tokens(x, order, begin + TOKENS, end, k, top_k, x_row, EXTRA)
    if MODE == PAIR:
        begin1, end1 = entries_of(offsets, place + 1, number, TOKENS + EXTRA)
        a1, live1 = _tokens(x, order, begin1, end1, k, top_k, x_row, TOKENS)
        b1, b_live1 = a1, live1
        if EXTRA:
            b1, b_live1 = _tokens(x, order, begin1 + TOKENS, end1, k, top_k, x_row, EXTRA)
        sums, sums1, extra, extra1 = both_slots(
            w, planes, a, a1, live, live1, b, b1, b_live, b_live1, hidden,
            height, COLUMNS, TOKENS, EXTRA, LOW, BANDS, EVEN, ASM, UPCAST,
        )  # fmt: skip
        other = tl.load(experts + place + 1)
        write_inner(
            sums1, out, begin1, end1, block, inner, other, gate_shift, up_shift,
            bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, TOKENS, MODE, GATED, ACTIVATION,
        )  # fmt: skip
        if EXTRA:
            write_inner(
                extra1, out, begin1 + TOKENS, end1, block, inner, other, gate_shift, up_shift,
                bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, EXTRA, MODE, GATED, ACTIVATION,
            )  # fmt: skip
    else:
        sums, extra = one_slot(
            w, planes, a, live, b, b_live, slot, hidden,
            height, COLUMNS, TOKENS, EXTRA, MODE, LOW, BANDS, EVEN, ASM, UPCAST,
        )  # fmt: skip
    expert = tl.load(experts + place)
    write_inner(
        sums, out, begin, end, block, inner, expert, gate_shift, up_shift,
        bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, TOKENS, MODE, GATED, ACTIVATION,
    )  # fmt: skip
    if EXTRA:
        write_inner(
            extra, out, begin + TOKENS, end, block, inner, expert, gate_shift, up_shift,
            bias, bias_expert, bias_row, bias_up, limit, alpha, ROWS, EXTRA, MODE, GATED, ACTIVATION,
        )  # fmt: skip


@triton.jit
def write_outer(
    sums, out, order, weights, begin, end, block, hidden, expert, shift, bias, bias_expert, bias_row,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, MODE: tl.constexpr, KEEP: tl.constexpr = False,
):  # fmt: skip
    """Bias (by the first split only), gate weight, and the rows of one slot's entries: out [entry, hidden]."""
    row = block * ROWS + tl.arange(0, ROWS)
    position = begin + tl.arange(0, TOKENS)
    live = position < end
    if MODE != DENSE:
        sums = rescale(sums, shift)
    if bias is not None:
        present = (row < hidden) & (tl.program_id(1) == 0)
        sums += tl.load(bias + expert * bias_expert + row * bias_row, mask=present, other=0.0)[:, None]
    entry = tl.load(order + position, mask=live, other=0)
    sums *= tl.load(weights + entry, mask=live, other=0.0).to(tl.float32)[None, :]
    at = out + entry.to(tl.int64)[None, :] * hidden + row[:, None]
    inside = (row < hidden)[:, None] & live[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=inside, eviction_policy="evict_last" if KEEP else "")


@triton.jit(do_not_specialize=["first", "capacity", "bias_expert", "bias_row"])
def project_out(
    x, words, low, scale, levels, out, order, offsets, tiles, experts, weights, bias,
    inner, hidden, first, capacity, part, out_split, w_unit, w_row, shift, bias_expert, bias_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
    EXTRA: tl.constexpr, MODE: tl.constexpr, LOW: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
    UPCAST: tl.constexpr, CHAIN: tl.constexpr, LINES: tl.constexpr, BANDS: tl.constexpr,
):  # fmt: skip
    """Down projection times the gate weight: out [split, entry, hidden], a split being `part` columns of `inner`.

    `x` [entry in order, inner] is what `project_in` wrote; `weights` [entry] are the router's.
    """
    tile, block, slot = share(tl.program_id(0), tl.cdiv(hidden, ROWS), GROUP, MODE)
    unit, number = tl.load(tiles + tile), tl.load(tiles + capacity + tile)
    if unit < 0:
        after_the_one_before(CHAIN)  # also here: that this kernel has ended must mean that the one before it has
        return
    place = first + unit if MODE == DENSE else 2 * unit + (slot if MODE == SLOT else 0)
    begin, end = entries_of(offsets, place, number, TOKENS + EXTRA)
    if MODE == SLOT and begin >= end:
        after_the_one_before(CHAIN)
        return
    row = (block * ROWS + tl.arange(0, ROWS)) % hidden
    skipped = tl.program_id(1) * part
    length = tl.minimum(inner - skipped, part)
    k = skipped + tl.arange(0, COLUMNS)
    if LOW < 0 or MODE == DENSE:
        w = words + unit.to(tl.int64) * w_unit + row.to(tl.int64)[:, None] * w_row + k[None, :]
        planes = (words, None, None, None, None, 0)
    else:
        w = unit.to(tl.int64) * hidden + row
        planes = (words, low, scale, levels + 2 * TABLE + row * 0, inner, skipped)
    out += tl.program_id(1).to(tl.int64) * out_split
    if CHAIN and (
        LOW < 0 or MODE == DENSE
    ):  # the tables are of two kernels before, the words of none: have the first of them come meanwhile
        prefetch(words + unit.to(tl.int64) * w_unit + row.to(tl.int64)[:, None] * w_row + skipped, LINES)
    after_the_one_before(CHAIN)
    a, live = _positions(x, begin, end, k, inner, TOKENS)
    b, b_live = a, live
    if EXTRA:
        b, b_live = _positions(x, begin + TOKENS, end, k, inner, EXTRA)
    if MODE == PAIR:
        begin1, end1 = entries_of(offsets, place + 1, number, TOKENS + EXTRA)
        a1, live1 = _positions(x, begin1, end1, k, inner, TOKENS)
        b1, b_live1 = a1, live1
        if EXTRA:
            b1, b_live1 = _positions(x, begin1 + TOKENS, end1, k, inner, EXTRA)
        sums, sums1, extra, extra1 = both_slots(
            w, planes, a, a1, live, live1, b, b1, b_live, b_live1, length,
            ROWS, COLUMNS, TOKENS, EXTRA, LOW, BANDS, EVEN, ASM, UPCAST,
        )  # fmt: skip
        other = tl.load(experts + place + 1)
        write_outer(
            sums1, out, order, weights, begin1, end1, block, hidden, other, shift,
            bias, bias_expert, bias_row, ROWS, TOKENS, MODE,
        )  # fmt: skip
        if EXTRA:
            write_outer(
                extra1, out, order, weights, begin1 + TOKENS, end1, block, hidden, other, shift,
                bias, bias_expert, bias_row, ROWS, EXTRA, MODE,
            )  # fmt: skip
    else:
        sums, extra = one_slot(
            w, planes, a, live, b, b_live, slot, length,
            ROWS, COLUMNS, TOKENS, EXTRA, MODE, LOW, BANDS, EVEN, ASM, UPCAST,
        )  # fmt: skip
    expert = tl.load(experts + place)
    write_outer(
        sums, out, order, weights, begin, end, block, hidden, expert, shift,
        bias, bias_expert, bias_row, ROWS, TOKENS, MODE,
    )  # fmt: skip
    if EXTRA:
        write_outer(
            extra, out, order, weights, begin + TOKENS, end, block, hidden, expert, shift,
            bias, bias_expert, bias_row, ROWS, EXTRA, MODE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["top_k", "n_experts", "part_split"])
def combine(
    parts, index, out, hidden, top_k, n_experts, part_split, out_row,
    SPLITS: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """out [token, hidden] = the sum over a token's entries and splits, in float32 and always in the same order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    choice = tl.arange(0, TOP_K)
    expert = tl.load(index + token * top_k + choice, mask=choice < top_k, other=-1)  # was there before `route` began
    if CHAIN:  # addresses are looked up meanwhile
        line = tl.minimum(tl.program_id(1) * COLUMNS + tl.arange(0, max(COLUMNS // 64, 1)) * 64, hidden - 1)
        ask(parts + (token * top_k + tl.minimum(choice, top_k - 1))[:, None] * hidden + line[None, :])
        ask(out + token * out_row + line)
    after_the_one_before(CHAIN)
    known = (expert >= 0) & (expert < n_experts)  # entries of no expert were never written
    at = parts + (token * top_k + choice)[:, None] * hidden + column[None, :]
    total = tl.zeros((COLUMNS,), tl.float32)
    for split in tl.static_range(SPLITS):
        part = tl.load(at + split * part_split, mask=known[:, None] & (column < hidden)[None, :], other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
    tl.store(out + token * out_row + column, total.to(out.dtype.element_ty), mask=column < hidden)
