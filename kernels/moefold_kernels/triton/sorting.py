"""The kernels of routing.py: entries are counted by place, the counts cut into tiles, and each entry put in its place.

Few entries take one kernel, `route_few`; many are counted, scanned and placed in chunks. Programs behind those of
`route_few`, or of `count_chunks`, rewrite a token each (token_rows.py) where a layer wants that, which saves a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moefold_kernels.triton.portability import after_the_one_before
from moefold_kernels.triton.token_rows import prepare_row


@triton.jit
def _place_of(index, places, entry, entries, n_places, n_experts):
    """The places of some entries; entries of experts that do not exist go last, to a place of no expert."""
    inside = entry < entries
    expert = tl.load(index + entry, mask=inside, other=-1)
    known = inside & (expert >= 0) & (expert < n_experts)
    place = tl.load(places + tl.where(known, expert, 0), mask=known, other=0)
    return tl.where(known, place, tl.where(inside, n_places, n_places + 1))


@triton.jit
def _write_tiles(longest, first, table, capacity, TOKENS: tl.constexpr, UNITS: tl.constexpr):
    """Lay out ceil(longest / TOKENS) tiles for each unit; `longest` [UNITS] is of units numbered from -first."""
    unit = tl.arange(0, UNITS) - first
    tiles = (longest + TOKENS - 1) // TOKENS
    begin = tl.cumsum(tiles, 0) - tiles
    for number in range(0, tl.max(tiles, 0)):
        tl.store(table + begin + number, unit, mask=number < tiles)
        tl.store(table + capacity + begin + number, number, mask=number < tiles)
    for start in range(tl.sum(tiles, 0), capacity, UNITS):
        free = start + tl.arange(0, UNITS)
        tl.store(table + free, -1, mask=free < capacity)


@triton.jit
def _plan(
    held, offsets, tiles, n_places, n_packed, packed1, alone1, packed2, alone2, zeros,
    TOKENS1: tl.constexpr, TOKENS2: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Offsets and tiles of the counts `held` [PLACES]; four tables lie behind one another, then Tables.ready."""
    place = tl.arange(0, PLACES)
    tl.store(offsets + place + 1, tl.cumsum(held, 0), mask=place <= n_places)
    tl.store(offsets, 0)
    pairs = tl.max(tl.reshape(tl.where(place < n_packed, held, 0), (PLACES // 2, 2)), 1)
    alone = tl.where((place >= n_packed) & (place < n_places), held, 0)
    if packed1 > 0:
        _write_tiles(pairs, 0, tiles, packed1, TOKENS1, PLACES // 2)
    if alone1 > 0:
        _write_tiles(alone, n_packed, tiles + 2 * packed1, alone1, TOKENS1, PLACES)
    tiles += 2 * (packed1 + alone1)
    if packed2 > 0:
        _write_tiles(pairs, 0, tiles, packed2, TOKENS2, PLACES // 2)
    if alone2 > 0:
        _write_tiles(alone, n_packed, tiles + 2 * packed2, alone2, TOKENS2, PLACES)
    if zeros > 0:
        tiles += 2 * (packed2 + alone2)
        number = tl.sum((pairs + TOKENS1 - 1) // TOKENS1, 0) + tl.sum((alone + TOKENS1 - 1) // TOKENS1, 0)
        tl.store(tiles, number)
        for start in range(0, zeros, PLACES):
            tl.store(tiles + 4 + start + place, 0, mask=start + place < zeros)


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
    TOKENS1: tl.constexpr, TOKENS2: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr, FORM: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, COUNT_STEP: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Program 0 counts and plans; others find the rank of `BLOCK` entries each, among all; the rest rewrite tokens."""
    after_the_one_before(CHAIN)
    program = tl.program_id(0)
    if program == 0:
        held = tl.zeros((PLACES,), tl.int32)
        for start in range(0, entries, COUNT_STEP):
            other = _place_of(index, places, start + tl.arange(0, COUNT_STEP), entries, n_places, n_experts)
            held += tl.histogram(other, PLACES)
        _plan(
            held, offsets, tiles, n_places, n_packed, packed1, alone1, packed2, alone2, zeros,
            TOKENS1, TOKENS2, PLACES,
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
    elif FORM:
        prepare_row(program - 1 - tl.cdiv(entries, BLOCK), x, rows, factors, columns, x_row, COLUMNS, FORM)


@triton.jit(do_not_specialize=["entries", "n_experts", "n_places"])
def count_chunks(
    index, places, chunks, x, rows, factors, entries, n_experts, n_places, columns, x_row,
    PLACES: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, FORM: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """How many entries of each place are in each chunk: chunks [chunk, PLACES]; the rest of programs rewrite tokens."""
    after_the_one_before(CHAIN)
    program, count = tl.program_id(0), tl.cdiv(entries, CHUNK)
    if program < count:
        number = program * CHUNK + tl.arange(0, CHUNK)
        held = tl.histogram(_place_of(index, places, number, entries, n_places, n_experts), PLACES)
        tl.store(chunks + program * PLACES + tl.arange(0, PLACES), held)
    elif FORM:
        prepare_row(program - count, x, rows, factors, columns, x_row, COLUMNS, FORM)


@triton.jit(do_not_specialize=["n_chunks", "n_places", "n_packed", "packed1", "alone1", "packed2", "alone2", "zeros"])
def scan_chunks(
    chunks, offsets, tiles, n_chunks, n_places, n_packed, packed1, alone1, packed2, alone2, zeros,
    TOKENS1: tl.constexpr, TOKENS2: tl.constexpr, PLACES: tl.constexpr, STEP: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """Counts, offsets and tiles of all; `chunks` becomes where each chunk's entries of a place begin within it."""
    after_the_one_before(CHAIN)
    place = tl.arange(0, PLACES)
    held = tl.zeros((PLACES,), tl.int32)
    for start in range(0, n_chunks, STEP):
        row = start + tl.arange(0, STEP)
        at = chunks + row[:, None] * PLACES + place[None, :]
        here = tl.load(at, mask=(row < n_chunks)[:, None], other=0)
        tl.store(at, held[None, :] + tl.cumsum(here, 0) - here, mask=(row < n_chunks)[:, None])
        held += tl.sum(here, 0)
    _plan(
        held, offsets, tiles, n_places, n_packed, packed1, alone1, packed2, alone2, zeros, TOKENS1, TOKENS2, PLACES
    )  # fmt: skip


@triton.jit(do_not_specialize=["entries", "n_experts", "n_places"])
def place_chunks(
    index, places, chunks, offsets, order, entries, n_experts, n_places,
    PLACES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Write each entry's number where it belongs; those of its chunk that come before it are counted by comparison."""
    after_the_one_before(CHAIN)
    first = tl.program_id(0) * CHUNK
    number = first + tl.arange(0, CHUNK)
    entry = first + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    other = _place_of(index, places, number, entries, n_places, n_experts)
    own = _place_of(index, places, entry, entries, n_places, n_experts)
    before = (other[None, :] == own[:, None]) & (number[None, :] < entry[:, None])
    begin = tl.load(offsets + own, mask=inside, other=0)
    begin += tl.load(chunks + tl.program_id(0) * PLACES + own, mask=inside, other=0)
    tl.store(order + begin + tl.sum(before.to(tl.int32), 1), entry, mask=inside)
