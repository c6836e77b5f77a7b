"""The kernels of routing.py: entries are counted by place, the counts cut into tiles, and each entry put in its place.

Few entries take one kernel, `route_few`; many are counted in chunks by one, and placed by another. Programs behind
those of `route_few`, or of `place_chunks`, rewrite a token each (token_rows.py) where a layer wants that, which saves a
launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moefold_kernels.triton.portability import after_the_one_before, ask
from moefold_kernels.triton.token_rows import prepare_row

READY = tl.constexpr(4)
"""Where in Tables.ready the counts of tiles begin."""
FIELDS = tl.constexpr(8)
"""Of a record of Tables.items."""


@triton.jit
def _place_of(index, places, entry, entries, n_places, n_experts):
    """The places of some entries; entries of experts that do not exist go last, to a place of no expert."""
    inside = entry < entries
    expert = tl.load(index + entry, mask=inside, other=-1)
    known = inside & (expert >= 0) & (expert < n_experts)
    place = tl.load(places + tl.where(known, expert, 0), mask=known, other=0)
    return tl.where(known, place, tl.where(inside, n_places, n_places + 1))


@triton.jit
def _write_tiles(
    longest, work, first, table, capacity, records, slots,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, BY_WORK: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Lay out ceil(longest / TOKENS) tiles for each unit, and say how many; `longest` [UNITS] is of units from -first.

    BY_WORK: units with most `work` first, so that programs which last long do not begin last. Or ITEMS: a record of
    each tile, too: at 2 the unit, then where both slots' entries begin and end, then the tile. `slots` are each slot's
    number of entries [UNITS] and where they begin.
    """
    unit = tl.arange(0, UNITS)
    if BY_WORK:
        unit = tl.sort(unit - work * UNITS) & UNITS - 1
        longest = tl.gather(longest, unit, 0)
    unit -= first
    tiles = (longest + TOKENS - 1) // TOKENS
    begin = tl.cumsum(tiles, 0) - tiles
    for number in range(0, tl.max(tiles, 0)):
        there = number < tiles
        tl.store(table + begin + number, unit, mask=there)
        tl.store(table + capacity + begin + number, number, mask=there)
        if ITEMS:
            held0, begin0, held1, begin1 = slots
            record, done = records + FIELDS * (begin + number), number * TOKENS
            tl.store(record + 2, unit, mask=there)
            tl.store(record + 3, begin0 + done, mask=there)
            tl.store(record + 4, begin0 + held0, mask=there)
            tl.store(record + 5, begin1 + done, mask=there)
            tl.store(record + 6, begin1 + held1, mask=there)
            tl.store(record + 7, begin + number, mask=there)
    count = tl.sum(tiles, 0)
    for start in range(count, capacity, UNITS):
        free = start + tl.arange(0, UNITS)
        tl.store(table + free, -1, mask=free < capacity)
    return count


@triton.jit
def _plan(
    held, offsets, tiles, n_places, n_packed, packed1, alone1, packed2, alone2, zeros,
    TOKENS1: tl.constexpr, TOKENS2: tl.constexpr, PLACES: tl.constexpr, BY_WORK: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Offsets and tiles of the counts `held` [PLACES]; behind one another lie four tables, Tables.ready, .items."""
    place = tl.arange(0, PLACES)
    ends = tl.cumsum(held, 0)
    tl.store(offsets + place + 1, ends, mask=place <= n_places)
    tl.store(offsets, 0)
    held0, held1 = tl.split(tl.reshape(tl.where(place < n_packed, held, 0), (PLACES // 2, 2)))
    begin0, begin1 = tl.split(tl.reshape(ends - held, (PLACES // 2, 2)))
    slots = held0, begin0, held1, begin1
    longest, work = tl.maximum(held0, held1), held0 + held1
    alone = tl.where((place >= n_packed) & (place < n_places), held, 0)
    ready = tiles + 2 * (packed1 + alone1 + packed2 + alone2)
    records = ready + zeros + READY
    count = 0 * packed1
    if packed1 > 0:
        count += _write_tiles(longest, work, 0, tiles, packed1, records, slots, TOKENS1, PLACES // 2, BY_WORK, ITEMS)
    tiles += 2 * packed1
    if alone1 > 0:
        count += _write_tiles(alone, alone, n_packed, tiles, alone1, records, slots, TOKENS1, PLACES, BY_WORK, False)
    tiles += 2 * alone1
    if packed2 > 0:
        _write_tiles(longest, work, 0, tiles, packed2, records, slots, TOKENS2, PLACES // 2, BY_WORK, False)
    tiles += 2 * packed2
    if alone2 > 0:
        _write_tiles(alone, alone, n_packed, tiles, alone2, records, slots, TOKENS2, PLACES, BY_WORK, False)
    if zeros > 0:
        tl.store(ready, count)
        for start in range(1, zeros + READY, PLACES):
            tl.store(ready + start + place, 0, mask=start + place < zeros + READY)


@triton.jit(
    do_not_specialize=[
        "entries",
        "n_experts",
        "n_places",
        "n_packed",
        "packed1",
        "alone1",
        "packed2",
        "alone2",
        "zeros",
    ]
)
def route_few(
    index, places, order, offsets, tiles, x, rows, factors,
    entries, n_experts, n_places, n_packed, packed1, alone1, packed2, alone2, zeros, columns, x_row,
    TOKENS1: tl.constexpr, TOKENS2: tl.constexpr, PLACES: tl.constexpr, BY_WORK: tl.constexpr,
    ITEMS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, COUNT_STEP: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """Program 0 counts and plans; others find the rank of `BLOCK` entries each, among all; the rest rewrite tokens."""
    if CHAIN:  # these come from memory meanwhile
        ask(index + tl.minimum(16 * tl.arange(0, max(STEP // 16, 1)), entries - 1))
        ask(places + tl.minimum(32 * tl.arange(0, PLACES // 16), n_experts - 1))
    after_the_one_before(CHAIN)
    program = tl.program_id(0)
    if program == 0:
        held = tl.zeros((PLACES,), tl.int32)
        for start in range(0, entries, COUNT_STEP):
            other = _place_of(index, places, start + tl.arange(0, COUNT_STEP), entries, n_places, n_experts)
            held += tl.histogram(other, PLACES)
        _plan(
            held, offsets, tiles, n_places, n_packed, packed1, alone1, packed2, alone2, zeros,
            TOKENS1, TOKENS2, PLACES, BY_WORK, ITEMS,
        )  # fmt: skip
    elif program <= tl.cdiv(entries, BLOCK):
        entry = (program - 1) * BLOCK + tl.arange(0, BLOCK)
        own = _place_of(index, places, entry, entries, n_places, n_experts)
        rank = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, entries, STEP):
            number = start + tl.arange(0, STEP)
            other = _place_of(index, places, number, entries, n_places, n_experts)
            tie = (other[None, :] == own[:, None]) & (number[None, :] < entry[:, None])
            rank += tl.sum(((other[None, :] < own[:, None]) | tie).to(tl.int32), 1)
        tl.store(order + rank, entry, mask=entry < entries)
    elif COLUMNS:
        prepare_row(program - 1 - tl.cdiv(entries, BLOCK), x, rows, factors, columns, x_row, COLUMNS)


@triton.jit(do_not_specialize=["entries", "n_experts", "n_places"])
def count_chunks(
    index, places, chunks, keys, entries, n_experts, n_places,
    PLACES: tl.constexpr, CHUNK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """How many entries of each place are in each chunk: chunks [chunk, PLACES]; and its entries by place.

    As `keys` [chunk, CHUNK]: the place times CHUNK, plus the entry's number within the chunk.
    """
    after_the_one_before(CHAIN)
    first, number = tl.program_id(0) * CHUNK, tl.arange(0, CHUNK)
    own = _place_of(index, places, first + number, entries, n_places, n_experts)
    tl.store(chunks + tl.program_id(0) * PLACES + tl.arange(0, PLACES), tl.histogram(own, PLACES))
    tl.store(keys + first + number, tl.sort(own * CHUNK + number))


@triton.jit(
    do_not_specialize=[
        "entries", "n_chunks", "n_places", "n_packed", "packed1", "alone1", "packed2", "alone2", "zeros",
    ]
)  # fmt: skip
def place_chunks(
    chunks, keys, order, offsets, tiles, x, rows, factors,
    entries, n_chunks, n_places, n_packed, packed1, alone1, packed2, alone2, zeros, columns, x_row,
    TOKENS1: tl.constexpr, TOKENS2: tl.constexpr, PLACES: tl.constexpr, BY_WORK: tl.constexpr, CHUNK: tl.constexpr,
    ITEMS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Write each entry's number where it belongs, a chunk a program; one in front plans, the rest rewrite tokens.

    Tokens' programs need nothing of the kernel before and do not wait for it: it has waited for what made the tokens.
    """
    program = tl.program_id(0)
    if program <= n_chunks:
        after_the_one_before(CHAIN)
        place = tl.arange(0, PLACES)
        held, before = tl.zeros((PLACES,), tl.int32), tl.zeros((PLACES,), tl.int32)
        for start in range(0, n_chunks, STEP):
            row = (start + tl.arange(0, STEP))[:, None]
            here = tl.load(
                chunks + row * PLACES + place[None, :], mask=(row < n_chunks) & (place <= n_places)[None, :], other=0
            )
            held += tl.sum(here, 0)
            before += tl.sum(tl.where(row < program - 1, here, 0), 0)
        if program == 0:
            _plan(
                held, offsets, tiles, n_places, n_packed, packed1, alone1, packed2, alone2, zeros,
                TOKENS1, TOKENS2, PLACES, BY_WORK, ITEMS,
            )  # fmt: skip
        else:
            chunk, number = program - 1, tl.arange(0, CHUNK)
            here = tl.load(chunks + chunk * PLACES + place, mask=place <= n_places, other=0)
            begin = tl.cumsum(held, 0) - held + before - (tl.cumsum(here, 0) - here)  # for the chunk's first by place
            key = tl.load(keys + chunk * CHUNK + number)
            entry = chunk * CHUNK + key % CHUNK
            tl.store(order + tl.gather(begin, key // CHUNK, 0) + number, entry, mask=entry < entries)
    elif COLUMNS:
        prepare_row(program - 1 - n_chunks, x, rows, factors, columns, x_row, COLUMNS)
