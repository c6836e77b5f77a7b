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
from torch import Tensor

from moefold_kernels.triton import sorting
from moefold_kernels.triton.plans import STREAMED, Plan
from moefold_kernels.triton.portability import blocks, launch, power_of_two

RANK_BLOCK = 16
"""Few entries: a program ranks 16 of them by comparing with all,"""
FEWEST, CUT, LONG_CUT = 512, (512, 1024, 4), (2048, 4096, 8)
"""so many at a time; another program counts so many at a time; warps: up to FEWEST entries, and beyond."""
FEW = 1024
"""Beyond this many entries, counting in chunks (two launches) replaces comparing all with all (one)."""
CHUNK, LARGEST_CHUNK, FACTOR = 256, 2048, 2.5
"""Entries of a chunk, at least and at most; between, about this times the root of all: a program sorts one chunk, and
reads the counts of all."""
LONG = 256
"""Tokens of a tile from which on programs of several blocks in turn last so long that their order matters."""
CHUNK_WARPS, COUNTED = 8, 2**13
"""Warps of a chunk's program; counts that it reads at a time."""


class Tiles(NamedTuple):
    """One projection's work: [2, tiles] int32 each, unit (-1: no tile) and number of the tile within the unit."""

    packed: Tensor
    alone: Tensor


class Rows(NamedTuple):
    """Tokens to be rewritten while entries are sorted, as token_rows.py has them."""

    x: Tensor  # [token, columns] bf16
    values: Tensor  # [token, 2 * columns] float8_e4m3fn
    factors: Tensor  # [token] float32


class Tables(NamedTuple):
    """A batch's entries sorted by place, and the work in tiles."""

    order: Tensor  # [entries] int32
    offsets: Tensor  # [places + 2] int32; the last two are the same unless the router named experts that do not exist
    first: Tiles
    second: Tiles  # the same tensors where both projections cut alike
    ready: Tensor  # for joined plans, else empty: int32 [READY + 2 * tiles], how many tiles there are, then zeros
    items: Tensor  # for streams, else empty: int32 [tiles, FIELDS] of pairs, as sorting.py writes them
    rows: Rows | None = None
    """Tokens that were rewritten on the way, for the first projection."""


def by_work(plan: Plan) -> bool:
    """Whether units with most entries come first in a plan's tables."""
    return any(tile.blocks > 1 and tile.tokens >= LONG for tile in (plan.first, plan.second))


def capacity(entries: int, units: int, tokens: int, multiple: int) -> int:
    """The most tiles that `entries` can need in `units`, rounded up: known without looking at the routing."""
    if not units or not entries:
        return 0
    most = min(entries, units) + entries // tokens
    return -(-most // multiple) * multiple


def _whole(length: int) -> int:
    """A length of int32 rounded up to 16 bytes."""
    return blocks(length, 4) * 4


def _rewriting(rows: Rows | None) -> tuple[int, tuple[Tensor | None, ...], tuple[int, int], dict[str, int]]:
    """Programs for tokens, and what kernels take for them: tensors, columns and a row's stride, a constant."""
    if rows is None:
        return 0, (None, None, None), (0, 0), {"COLUMNS": 0}
    tokens, columns = rows.x.shape
    return tokens, (*rows,), (columns, rows.x.stride(0)), {"COLUMNS": power_of_two(columns)}


def route(
    top_k_index: Tensor,
    places: Tensor,
    pairs: int,
    alone: int,
    plan: Plan,
    chain: bool = False,
    rows: Rows | None = None,
) -> Tables:
    """Sort a batch's entries by place and cut them into the tiles of both projections.

    `top_k_index` [token, top_k] is any integer; `places` [expert] int32. Units are pairs (a tile has up to
    `Tile.entries` entries of each slot) and single experts. Tables have room for whole groups of tiles. `chain` lets
    the kernels start before the one before them has ended (they wait for its data, Portability.chain). `rows` are
    rewritten by further programs of the same kernels.
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
    items = plan.joined and first.mode == STREAMED
    sizes = (
        _whole(entries), _whole(n_places + 2), 2 * sum(room), zeros + sorting.READY.value * plan.joined,
        sorting.FIELDS.value * room[0] * items,
    )  # fmt: skip
    order, offsets, tiles, ready, records = index.new_empty(sum(sizes), dtype=torch.int32).split(sizes)
    order, offsets = order[:entries], offsets[: n_places + 2]
    packed1, alone1, packed2, alone2 = (table.view(2, -1) for table in tiles.split([2 * size for size in room]))
    both = Tiles(packed1, alone1)
    tables = Tables(order, offsets, both, both if alike else Tiles(packed2, alone2), ready, records, rows)
    if not entries:
        offsets.zero_()
        return tables
    size = max(16, power_of_two(n_places + 2))
    shape = (places.numel(), n_places)
    kind: dict[str, Any] = {"TOKENS1": first.entries, "TOKENS2": second.entries, "PLACES": size}
    kind |= {"BY_WORK": by_work(plan), "ITEMS": items}
    options: dict[str, Any] = {"CHAIN": chain} | ({"launch_pdl": True} if chain else {})
    tokens, given, ends, wide = _rewriting(rows)
    if entries <= FEW:
        grid = (1 + blocks(entries, RANK_BLOCK) + tokens,)
        step, count, warps = CUT if entries <= FEWEST else LONG_CUT
        launch(
            sorting.route_few, grid, index, places, order, offsets, tiles, *given, entries, *shape, n_packed, *room,
            zeros, *ends, **kind, **wide, BLOCK=RANK_BLOCK, STEP=min(step, power_of_two(entries)),
            COUNT_STEP=min(count, max(32, power_of_two(entries))), num_warps=warps, **options,
        )  # fmt: skip
        return tables
    chunk = _chunk(entries)
    n_chunks = blocks(entries, chunk)
    counted = [n_chunks * size, n_chunks * chunk]
    chunks, keys = index.new_empty(sum(counted), dtype=torch.int32).split(counted)
    cut: dict[str, Any] = {"CHUNK": chunk, "num_warps": CHUNK_WARPS} | options
    launch(sorting.count_chunks, (n_chunks,), index, places, chunks, keys, entries, *shape, PLACES=size, **cut)
    launch(
        sorting.place_chunks, (1 + n_chunks + tokens,), chunks, keys, order, offsets, tiles, *given, entries, n_chunks,
        n_places, n_packed, *room, zeros, *ends, **kind, **wide, STEP=max(1, COUNTED // size), **cut,
    )  # fmt: skip
    return tables


def _chunk(entries: int) -> int:
    """How many entries a program sorts."""
    return min(LARGEST_CHUNK, max(CHUNK, power_of_two(int(FACTOR * math.sqrt(entries)))))
