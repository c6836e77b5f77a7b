"""A packed (or dense) experts layer for one token, or very few: each (token, choice) by itself, without routing tables.

With so few entries hardly two want the same words, so there is nothing to sort. A program of the first kernel looks up
where its entry's expert is and makes a few rows of gate and up, with the activation and times the gate weight; one of
the second makes a few rows of the output, of all of a token's experts, added in one order. So a layer is two launches
instead of four, each with as many programs of as few rows as fill the device evenly; of several tokens a program of
down does several blocks of rows, one after another. Products are no tensor cores' (cells.py). Gate weights are the
first kernel's, as down has no registers for them and for sums of each choice: programs of 2 rows of DeepSeek's took 147
with them, in two waves, and with 128 a layer's all run at once (docs/kernels.md).

What is under way has PLACES, by which loops are unrolled, so that registers that were read are loaded anew and nothing
is moved. Of gate and up a place has the token's values, too. Words are read to be forgotten (cells.py); what says where
they are is to be kept, as a program has nothing to do until it has its index, one in a hundred for 1.3 to 1.9 us.
Masks are of each cell: with one for all cells, where rows are whole steps, down took 1 to 5 us more, and why was not
found (docs/kernel-log.md).
"""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples that grow)

from __future__ import annotations

import triton
import triton.language as tl

from moefold_kernels.triton.cells import (
    cells_of,
    moved,
    multiplied,
    numbers,
    offsets_of,
    place_of,
    planes_of,
    read,
    tables_of,
    tokens,
)
from moefold_kernels.triton.decode import rescale
from moefold_kernels.triton.decode_levels import TABLE
from moefold_kernels.triton.portability import after_the_one_before, ask
from moefold_kernels.triton.project import activate


@triton.jit
def _both(
    gates, ups, x, offsets, start, cell, zeros, cells, hidden, LOW: tl.constexpr, BANDS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Cells of gate and up from `start` on, and the token's values for them."""
    inside = start + cell + zeros < cells
    gate = read(gates, offsets, start, inside, LOW, BANDS)
    up = read(ups, offsets, start, inside, LOW, BANDS)
    return gate, up, tokens(x, start, cell, zeros, inside, hidden, LOW, False, WHOLE)


@triton.jit(do_not_specialize=["top_k", "first", "last", "limit", "alpha", "bias_expert", "bias_row", "bias_up"])
def gate_up(
    x, words, low, scale, levels, out, index, places, weights, bias,
    hidden, inner, width, top_k, n_experts, first, last, x_row, w_unit, w_row, w_up,
    gate_shift, up_shift, bias_expert, bias_row, bias_up, limit, alpha,
    ROWS: tl.constexpr, CELLS: tl.constexpr, EXPERTS: tl.constexpr, DENSE: tl.constexpr, LOW: tl.constexpr,
    BANDS: tl.constexpr, WHOLE: tl.constexpr, PLACES: tl.constexpr, ACTIVATION: tl.constexpr, ASM: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """Gate and up with their activation, times the entry's gate weight, so that down only adds: out [entry, width].

    Of entries whose expert's place is `first` to `last` - 1. `x` [token, hidden / 2] and `words` [unit, row,
    columns / 2] are integers of two numbers each, up rows `w_up` of them behind gate rows. In few-bit formats (LOW)
    `words`, `low` and `scale` are planes of 2 * inner rows, `levels` is of gate, then up, and `out` lies as `place_of`
    says. `index` [entry] are experts, `places` [expert] where they are, `weights` [entry] are the router's. WHOLE:
    `hidden` is a number of 64. Side by side are programs of all entries, in few bits those of an entry, whose rows lie
    in bands.
    """
    entry, block = tl.program_id(0), tl.program_id(1)
    if LOW >= 0:
        block, entry = entry, block
    expert = tl.arange(0, EXPERTS)
    # before the wait: a parameter, which no kernel writes
    home = tl.load(places + expert, mask=expert < n_experts, other=-1, eviction_policy="evict_last")
    row = tl.minimum(block * ROWS + tl.arange(0, ROWS), inner - 1)[:, None]  # twice, rather than masked
    cell, cells = tl.arange(0, CELLS)[None, :], cells_of(hidden, LOW)
    offsets = offsets_of(row, cell, hidden, w_row, LOW, BANDS)
    after_the_one_before(CHAIN)
    own = tl.load(index + entry, eviction_policy="evict_last")
    weight = tl.load(weights + entry).to(tl.float32)
    home = tl.max(tl.where(expert == own, home, -1), 0)  # not another load behind that of the index
    if home < first or home >= last:
        return
    unit, slot = (home - first).to(tl.int64), 0
    if not DENSE:
        unit, slot = unit // 2, home % 2
    gates = planes_of(words, low, scale, unit, 2 * inner, 0, hidden, w_unit, w_row, LOW)
    ups = planes_of(words, low, scale, unit, 2 * inner, inner, hidden, w_unit, 0, LOW)
    if LOW < 0:
        ups = (gates[0] + w_up, gates[1], gates[2])
    gate_tables, up_tables, other_levels = (), (), levels
    if LOW >= 0:
        other_levels += TABLE
        if ASM:
            gate_tables, up_tables = tables_of(levels, slot, LOW), tables_of(other_levels, slot, LOW)
    x += (entry // top_k).to(tl.int64) * x_row
    zeros = row * 0
    gate, up = tl.zeros((ROWS, CELLS), tl.float32), tl.zeros((ROWS, CELLS), tl.float32)
    held = ()
    for place in tl.static_range(PLACES):
        held += (_both(gates, ups, x, offsets, place * CELLS, cell, zeros, cells, hidden, LOW, BANDS, WHOLE),)
    for start in tl.range(PLACES * CELLS, cells, PLACES * CELLS):
        following = ()
        for place in tl.static_range(PLACES):
            own_gate, own_up, values = held[place]
            gate = multiplied(gate, own_gate, values, cell, levels, gate_tables, slot, DENSE, LOW, ASM)
            up = multiplied(up, own_up, values, cell, other_levels, up_tables, slot, DENSE, LOW, ASM)
            at = start + place * CELLS
            following += (_both(gates, ups, x, offsets, at, cell, zeros, cells, hidden, LOW, BANDS, WHOLE),)
        held = following
    for place in tl.static_range(PLACES):
        own_gate, own_up, values = held[place]
        gate = multiplied(gate, own_gate, values, cell, levels, gate_tables, slot, DENSE, LOW, ASM)
        up = multiplied(up, own_up, values, cell, other_levels, up_tables, slot, DENSE, LOW, ASM)
    gate, up = tl.sum(gate, 1), tl.sum(up, 1)
    if LOW >= 0:
        gate, up = gate * numbers(levels, LOW, ASM), up * numbers(other_levels, LOW, ASM)
    elif not DENSE:
        gate, up = rescale(gate, gate_shift), rescale(up, up_shift)
    row = block * ROWS + tl.arange(0, ROWS)
    if bias is not None:
        at = bias + own * bias_expert + row * bias_row
        gate += tl.load(at, mask=row < inner, other=0.0)
        up += tl.load(at + bias_up, mask=row < inner, other=0.0)
    made = activate(gate, up, limit, alpha, ACTIVATION) * weight
    out += entry.to(tl.int64) * width
    tl.store(out + (place_of(row) if LOW >= 0 else row), made.to(out.dtype.element_ty), mask=row < inner)


@triton.jit
def _choice(index, places, entry, n_experts):
    """An entry's expert (0 if there is none of its number) and the expert's place, or -1."""
    expert = tl.load(index + entry, eviction_policy="evict_last")
    known = (expert >= 0) & (expert < n_experts)
    expert = tl.where(known, expert, 0).to(tl.int32)
    return expert, tl.where(known, tl.load(places + expert, eviction_policy="evict_last"), -1)


@triton.jit
def _cells(
    planes, there, offsets, start, cell, cells, TOP_K: tl.constexpr, LOW: tl.constexpr, BANDS: tl.constexpr,
):  # fmt: skip
    """Of each choice the cells from `start` on."""
    found = ()
    for k in tl.static_range(TOP_K):
        found += (read(planes[k], offsets, start, there[k] & (start + cell < cells), LOW, BANDS),)
    return found


@triton.jit
def _values(rows, there, start, cell, zeros, cells, inner, TOP_K: tl.constexpr, LOW: tl.constexpr):
    """Of each choice the activations for them."""
    found = ()
    for k in tl.static_range(TOP_K):
        inside = there[k] & (start + cell + zeros < cells)
        found += (tokens(rows[k], start, cell, zeros, inside, inner, LOW, LOW >= 0, True),)
    return found


@triton.jit
def _begun(
    x, words, low, scale, levels, index, places, entry, row, cell,
    inner, width, hidden, n_experts, first, last, w_unit, w_row,
    CELLS: tl.constexpr, TOP_K: tl.constexpr, DENSE: tl.constexpr, LOW: tl.constexpr,
    BANDS: tl.constexpr, PLACES: tl.constexpr, AHEAD: tl.constexpr, ASM: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """A token's choices whose places are `first` to `last` - 1, and their first words, read before the wait.

    AHEAD: so many cache lines of each row, behind the words that registers hold already, are asked for in L2 before the
    wait, behind which nothing else is read until activations have come and registers have been multiplied with them.
    """
    offsets = offsets_of(row, cell, inner, w_row, LOW, BANDS)
    cells = cells_of(inner, LOW)
    # Indices are of kernels before the one in front, which has waited for them.
    planes, slots, there, tables, rows = (), (), (), (), ()
    for k in tl.static_range(TOP_K):
        _, place = _choice(index, places, entry + k, n_experts)
        live = (place >= first) & (place < last)
        unit = tl.where(live, place - first, 0).to(tl.int64)
        slot = (unit % 2).to(tl.int32)
        if not DENSE:
            unit = unit // 2
        planes += (planes_of(words, low, scale, unit, hidden, 0, inner, w_unit, w_row, LOW),)
        slots += (slot,)
        there += (live,)
        rows += (x + (entry + k).to(tl.int64) * (width // 2),)
        tables += (tables_of(levels, slot, LOW) if LOW >= 0 and ASM else (),)
    zeros = row * 0
    held = ()
    for place in tl.static_range(PLACES):
        held += (_cells(planes, there, offsets, place * CELLS, cell + zeros, cells, TOP_K, LOW, BANDS),)
    if CHAIN and ASM and LOW < 0 and AHEAD > 0:
        line = tl.minimum(PLACES * CELLS + 32 * tl.arange(0, AHEAD)[None, :], cells - 1)
        for k in tl.static_range(TOP_K):
            ask(planes[k][0] + tl.where(there[k], row * w_row + line, 0))
    after_the_one_before(CHAIN)
    return (planes, slots, there, tables, rows, offsets), held


@triton.jit
def _summed(
    choices, held, turn, levels, cell, zeros, inner, w_row,
    ROWS: tl.constexpr, CELLS: tl.constexpr, TOP_K: tl.constexpr, DENSE: tl.constexpr, LOW: tl.constexpr,
    BANDS: tl.constexpr, PLACES: tl.constexpr, SPLITS: tl.constexpr, BLOCKS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The sum [ROWS] of a block of rows, the program's `turn`-th, before `rescale`; and the next one's first words.

    SPLITS: 2 for choices of even and of odd number apart, which wait for each other's sums less, and take registers.
    """
    planes, slots, there, tables, rows, offsets = choices
    cells = cells_of(inner, LOW)
    sums, others = tl.zeros((ROWS, CELLS), tl.float32), tl.zeros((ROWS, CELLS), tl.float32)
    for start in tl.range(0, cells, PLACES * CELLS):
        following, ahead, source = (), start + PLACES * CELLS, planes
        if BLOCKS > 1:
            ended = ahead >= cells
            ahead = tl.where(ended, tl.where(turn + 1 < BLOCKS, 0, cells), ahead)
            source = moved(planes, tl.where(ended, turn + 1, turn) * (tl.num_programs(2) * ROWS * w_row), TOP_K)
        for place in tl.static_range(PLACES):
            values = _values(rows, there, start + place * CELLS, cell, zeros, cells, inner, TOP_K, LOW)
            for k in tl.static_range(TOP_K):
                given = held[place][k], values[k], tables[k], slots[k]
                if k % SPLITS == 0:
                    sums = multiplied(sums, given[0], given[1], cell, levels, given[2], given[3], DENSE, LOW, ASM)
                else:
                    others = multiplied(others, given[0], given[1], cell, levels, given[2], given[3], DENSE, LOW, ASM)
            at = ahead + place * CELLS
            following += (_cells(source, there, offsets, at, cell + zeros, cells, TOP_K, LOW, BANDS),)
        held = following
    return tl.sum(sums if SPLITS == 1 else sums + others, 1), held


@triton.jit(do_not_specialize=["n_packed", "out_row", "bias_expert", "bias_row"])
def down(
    x, words, low, scale, levels, dense, out, index, places, weights, bias,
    inner, width, hidden, n_experts, n_packed, w_unit, w_row, dense_unit, dense_row, out_row, shift, bias_expert,
    bias_row,
    ROWS: tl.constexpr, CELLS: tl.constexpr, TOP_K: tl.constexpr, PACKED: tl.constexpr, ALONE: tl.constexpr,
    LOW: tl.constexpr, BANDS: tl.constexpr, PLACES: tl.constexpr, SPLITS: tl.constexpr, AHEAD: tl.constexpr,
    BLOCKS: tl.constexpr, ASM: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """The output [token, hidden]: down, a token's choices added in float32 and in their order.

    With both kinds of experts those in pairs come first. `x` [entry, width / 2] is what `gate_up` wrote, times gate
    weights; `weights` [entry], the router's, are for biases. Experts whose places are below `n_packed` are in `words`
    (with LOW in planes), others in `dense`, as far as there are PACKED or ALONE ones. Side by side are programs of all
    tokens, so that words of which two have a use are read once from memory. BLOCKS: a program does so many blocks of
    rows, one after another, as far apart as there are programs; each one's first words are read when the last ones of
    the block before are multiplied. `hidden` is whole blocks then, of words of 16 bits, or of experts alone.
    """
    # Not the first axis, whose numbers may be 2 ** 31: pointers of these, below 2 ** 16, take fewer registers.
    token, block = tl.program_id(1), tl.program_id(2)
    entry = token * TOP_K
    row = tl.minimum(block * ROWS + tl.arange(0, ROWS), hidden - 1)[:, None]
    cell, zeros = tl.arange(0, CELLS)[None, :], row * 0
    if PACKED:
        kind, first, last, strides = (words, low, scale, levels), 0, n_packed, (w_unit, w_row)
        if LOW >= 0:
            kind = (words, low, scale, levels + 2 * TABLE)
    else:
        kind, first, last, strides = (dense, None, None, None), n_packed, n_experts, (dense_unit, dense_row)
    choices, held = _begun(
        x, kind[0], kind[1], kind[2], kind[3], index, places, entry, row, cell, inner, width, hidden, n_experts,
        first, last, strides[0], strides[1], CELLS, TOP_K, not PACKED, LOW, BANDS, PLACES, AHEAD, ASM, CHAIN,
    )  # fmt: skip
    for turn in tl.range(BLOCKS):
        sums, held = _summed(
            choices, held, turn, kind[3], cell, zeros, inner, strides[1],
            ROWS, CELLS, TOP_K, not PACKED, LOW, BANDS, PLACES, SPLITS, BLOCKS, ASM,
        )  # fmt: skip
        if PACKED:
            sums = rescale(sums, shift) if LOW < 0 else sums * numbers(kind[3], LOW, ASM)
        if PACKED and ALONE:
            others, their = _begun(
                x, dense, None, None, None, index, places, entry, row, cell, inner, width, hidden, n_experts,
                n_packed, n_experts, dense_unit, dense_row, CELLS, TOP_K, True, -1, False, PLACES, AHEAD, ASM, False,
            )  # fmt: skip
            found, _ = _summed(
                others, their, turn, None, cell, zeros, inner, dense_row,
                ROWS, CELLS, TOP_K, True, -1, False, PLACES, SPLITS, BLOCKS, ASM,
            )  # fmt: skip
            sums += found
        at = (turn * tl.num_programs(2) + block) * ROWS + tl.arange(0, ROWS)
        if bias is not None:
            for k in tl.static_range(TOP_K):
                expert, place = _choice(index, places, entry + k, n_experts)
                gate = tl.where(place >= 0, tl.load(weights + entry + k).to(tl.float32), 0.0)
                sums += gate * tl.load(bias + expert * bias_expert + at * bias_row, mask=at < hidden, other=0.0)
        tl.store(out + token.to(tl.int64) * out_row + at, sums.to(out.dtype.element_ty), mask=at < hidden)
