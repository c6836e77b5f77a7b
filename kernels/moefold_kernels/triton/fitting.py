"""What of a plan depends on the shape that it was measured for: how many programs there are, and so splits and blocks.

Tiles are chosen by the entries per expert, so a plan of another shape's is a good one if nothing else is taken with it.
Splits of the columns (`Tile.splits`) are there because few rows of few experts do not fill a device, and blocks of rows
in turn (`Tile.blocks`) because there are more programs than the device runs at once; of a layer with other sizes
neither need be so. Mixtral's plan for one token, in four splits, took 68 us for 4 tokens of Qwen3 (pair8, an H200),
and 50 us in one; four blocks of rows in turn, from Qwen3, took 812 us for 128 tokens of Mixtral, and one 406 us.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moefold_kernels.triton.plans import BY_ENTRY, STREAMED, Plan, Tile, join

if TYPE_CHECKING:
    from moefold_kernels.triton.configs import Shape

COLUMNS = 512
"""Of a split, at least: fewer are too few steps (moefold tune tries none)."""
PROGRAMS = 4
"""For each multiprocessor: with more, blocks in turn leave none of them idle."""


def fitted(plan: Plan, known: Shape, shape: Shape, processors: int) -> Plan:
    """The plan that was measured for `known`, in about as many programs for `shape`; the same where nothing differs.

    One stream has steps of 64 columns where those of 128 are not whole.
    """
    if plan.first.mode == STREAMED and (shape.hidden % plan.first.columns or shape.inner % plan.first.columns):
        tile = plan.first  # of half as many columns at twice as many places
        return join(replace(tile, columns=64, stages=tile.stages * tile.columns // 64))
    if plan.joined or known == shape or (plan.by_entry and plan.second.blocks == 1):
        return plan
    first, second = (_fitted(tile, known, shape, processors, down) for down, tile in enumerate(plan.tiles))
    return replace(plan, first=first, second=second)


def _fitted(tile: Tile, known: Shape, shape: Shape, processors: int, down: int) -> Tile:
    had, have = _programs(tile, known, down), _programs(tile, shape, down)
    most = max(1, shape.inner // COLUMNS)
    splits = min(tile.splits, most, -(-had * tile.splits // have))
    if tile.mode == BY_ENTRY:
        splits = tile.splits  # two sums, not programs
    enough = min(had / tile.blocks, PROGRAMS * processors)
    rows = _blocks(tile, shape, down)
    blocks = max(n for n in range(1, tile.blocks + 1) if n == 1 or (rows % n == 0 and have / n >= enough))
    return replace(tile, splits=splits, blocks=blocks)


def _programs(tile: Tile, shape: Shape, down: int) -> int:
    """Of one projection, without splits, one block of rows each; as many experts hit as there can be."""
    if tile.mode == BY_ENTRY and down:
        return shape.tokens * _blocks(tile, shape, down)
    entries = shape.tokens * shape.top_k
    experts = min(shape.experts, entries)
    units = min(max(1, shape.experts // 2), entries) if tile.paired and not shape.dense else experts
    tiles = -(-entries // (experts * tile.entries))
    return units * tiles * _blocks(tile, shape, down)


def _blocks(tile: Tile, shape: Shape, down: int) -> int:
    """Of rows."""
    return -(-(shape.hidden if down else shape.inner) // tile.rows)
