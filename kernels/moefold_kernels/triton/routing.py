"""Which entries each expert works on, decided on the device: no host synchronisation, so graphs can hold it.

An entry is one (token, choice) of the router's top-k, numbered token * top_k + choice. A place is where an expert's
weights are: 2 * pair + slot for packed experts, and after all pairs one place for each expert left alone. `order` lists
the entries by place, and by number within a place (so results do not depend on scheduling); `offsets[p]` is where place
p begins. A tile is one program's share: up to `TOKENS` entries of a unit, which is a pair (both slots) or one place.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefold_kernels.triton.configs import Plan
from moefold_kernels.triton.portability import after_the_one_before, blocks, launch, power_of_two

RANK_BLOCK = 16
"""Few entries: a program ranks 16 of them by comparing with all,"""
FEWEST, CUT, LONG_CUT = 512, (512, 1024, 4), (2048, 4096, 8)
"""so many at a time; another program counts so many at a time; warps: up to FEWEST entries, and beyond."""
FEW = 2048
"""Beyond this many entries, counting in chunks (three launches) replaces comparing all with all (one)."""
CHUNK, CHUNK_STEP, CHUNK_WARPS = 256, 16, 2


class Tiles(NamedTuple):
    """One projection's work: [2, tiles] int32 each, unit (-1: no tile) and number of the tile within the unit."""

    packed: Tensor
    alone: Tensor


class Tables(NamedTuple):
    """A batch's entries sorted by place, and the work in tiles."""

    order: Tensor  # [entries] int32
    offsets: Tensor  # [places + 2] int32; the last two are the same unless the router named experts that do not exist
    first: Tiles
    second: Tiles  # the same tensors where both projections cut alike
    ready: Tensor  # for joined.py, else empty: int32 [4 + 2 * tiles], how many tiles there are, then from 4 on zeros


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
def _route_few(
    index, places, order, offsets, tiles,
    entries, n_experts, n_places, n_packed, packed1, alone1, packed2, alone2, zeros,
    TOKENS1: tl.constexpr, TOKENS2: tl.constexpr, PLACES: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, COUNT_STEP: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Program 0 counts and plans; the others find the rank of `BLOCK` entries each, among all."""
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
    else:
        entry = (program - 1) * BLOCK + tl.arange(0, BLOCK)
        own = _place_of(index, places, entry, entries, n_places, n_experts)
        rank = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, entries, STEP):
            number = start + tl.arange(0, STEP)
            other = _place_of(index, places, number, entries, n_places, n_experts)
            tie = (other[None, :] == own[:, None]) & (number[None, :] < entry[:, None])
            rank += tl.sum(((other[None, :] < own[:, None]) | tie).to(tl.int32), 1)
        tl.store(order + rank, entry, mask=entry < entries)


@triton.jit(do_not_specialize=["entries", "n_experts", "n_places"])
def _count_chunks(
    index, places, chunks, entries, n_experts, n_places,
    PLACES: tl.constexpr, CHUNK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """How many entries of each place are in each chunk: chunks [chunk, PLACES]."""
    after_the_one_before(CHAIN)
    number = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    held = tl.histogram(_place_of(index, places, number, entries, n_places, n_experts), PLACES)
    tl.store(chunks + tl.program_id(0) * PLACES + tl.arange(0, PLACES), held)


@triton.jit(do_not_specialize=["n_chunks", "n_places", "n_packed", "packed1", "alone1", "packed2", "alone2", "zeros"])
def _scan_chunks(
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
        held,
        offsets,
        tiles,
        n_places,
        n_packed,
        packed1,
        alone1,
        packed2,
        alone2,
        zeros,
        TOKENS1,
        TOKENS2,
        PLACES,
    )


@triton.jit(do_not_specialize=["entries", "n_experts", "n_places"])
def _place_chunks(
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


def capacity(entries: int, units: int, tokens: int, multiple: int) -> int:
    """The most tiles that `entries` can need in `units`, rounded up: known without looking at the routing."""
    if not units or not entries:
        return 0
    most = min(entries, units) + entries // tokens
    return -(-most // multiple) * multiple


def _whole(length: int) -> int:
    """A length of int32 rounded up to 16 bytes."""
    return blocks(length, 4) * 4


def route(
    top_k_index: Tensor,
    places: Tensor,
    pairs: int,
    alone: int,
    plan: Plan,
    chain: bool = False,
) -> Tables:
    """Sort a batch's entries by place and cut them into the tiles of both projections.

    `top_k_index` [token, top_k] is any integer; `places` [expert] int32. Units are pairs (a tile has up to
    `Tile.entries` entries of each slot) and single experts. Tables have room for whole groups of tiles. `chain` lets
    the kernels start before the one before them has ended (they wait for its data, Portability.chain).
    """
    index, (first, second) = top_k_index.contiguous(), (plan.first, plan.second)
    entries, n_packed, n_places = index.numel(), 2 * pairs, 2 * pairs + alone
    alike = first.entries == second.entries
    group = math.lcm(max(first.group, second.group), 2)
    room = [capacity(entries, units, first.entries, group) for units in (pairs, alone)]
    room += [0, 0] if alike else [capacity(entries, units, second.entries, group) for units in (pairs, alone)]
    # One allocation for all tables: this runs in front of every layer. Each begins at a multiple of 16 bytes, whatever
    # the batch: Triton compiles a kernel anew for a pointer that does not.
    zeros = 2 * sum(room) if plan.joined else 0
    sizes = (_whole(entries), _whole(n_places + 2), 2 * sum(room), zeros + 4 * plan.joined)
    order, offsets, tiles, ready = index.new_empty(sum(sizes), dtype=torch.int32).split(sizes)
    order, offsets = order[:entries], offsets[: n_places + 2]
    packed1, alone1, packed2, alone2 = (table.view(2, -1) for table in tiles.split([2 * size for size in room]))
    both = Tiles(packed1, alone1)
    tables = Tables(order, offsets, both, both if alike else Tiles(packed2, alone2), ready)
    if not entries:
        offsets.zero_()
        return tables
    size = max(16, power_of_two(n_places + 2))
    shape = (places.numel(), n_places)
    kind: dict[str, Any] = {"TOKENS1": first.entries, "TOKENS2": second.entries, "PLACES": size}
    options: dict[str, Any] = {"CHAIN": chain} | ({"launch_pdl": True} if chain else {})
    if entries <= FEW:
        grid = (1 + blocks(entries, RANK_BLOCK),)
        step, count, warps = CUT if entries <= FEWEST else LONG_CUT
        launch(
            _route_few, grid, index, places, order, offsets, tiles, entries, *shape, n_packed, *room, zeros,
            **kind, BLOCK=RANK_BLOCK, STEP=min(step, power_of_two(entries)),
            COUNT_STEP=min(count, max(32, power_of_two(entries))), num_warps=warps, **options,
        )  # fmt: skip
        return tables
    n_chunks = blocks(entries, CHUNK)
    chunks = index.new_empty(n_chunks, size, dtype=torch.int32)
    cut: dict[str, Any] = {"PLACES": size, "CHUNK": CHUNK}
    launch(_count_chunks, (n_chunks,), index, places, chunks, entries, *shape, **cut, **options)
    launch(
        _scan_chunks,
        (1,),
        chunks,
        offsets,
        tiles,
        n_chunks,
        n_places,
        n_packed,
        *room,
        zeros,
        **kind,
        STEP=32,
        num_warps=8,
        **options,
    )
    launch(
        _place_chunks,
        (n_chunks, CHUNK // CHUNK_STEP),
        index,
        places,
        chunks,
        offsets,
        order,
        entries,
        *shape,
        **cut,
        BLOCK=CHUNK_STEP,
        num_warps=CHUNK_WARPS,
        **options,
    )
    return tables
