"""The tiles that `moefold tune` tries for a shape on a device: the cuts of regimes.py that both can take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefold_kernels import layout
from moefold_kernels.triton import layer, leveled_launch, plans
from moefold_kernels.triton.configs import Shape
from moefold_kernels.triton.plans import STEP, Plan, Tile, fits, join, leveled_bytes, tile_fits
from moefold_kernels.triton.portability import Target, power_of_two
from moefold_kernels.triton.regimes import (
    BY_ENTRY,
    BY_ENTRY_DOWN,
    BY_ENTRY_LEVELED,
    E4M3,
    E4M3_MANY,
    FEW,
    FEW_TOKENS,
    LEVELED,
    LEVELED_REGIMES,
    MANY,
    NARROW,
    OVERLAPPED,
    OVERLAPPED_PAIR,
    REGIMES,
    REGISTERS_SHARED,
    STREAMED,
    STREAMED_CUTS,
    Cut,
    Kind,
)

LARGE = 128 * 1024
"""Shared memory of a block from which on NARROW is not tried."""
REGISTERS, REGISTERS_OVERLAPPED = 170, 150
"""Sums a thread may hold: of its 255 registers the rest goes to operands and pointers (two sets when overlapped)."""
SPARE = 6144
"""Shared memory that Triton takes beside the tiles, at most."""
IN_TURN, IN_TURN_PAIRED = (2, 3, 4), (2, 3, 6, 8)
"""Blocks of rows that a program does in turn, beside one: of one slot, of a pair."""
PROGRAMS = 4
"""Programs for each multiprocessor from which on splitting the columns only adds work."""


class Room(NamedTuple):
    """What a device has for a kernel."""

    memory: int
    """Shared memory of a block, in bytes."""
    processors: int
    overlap: bool
    """Target.overlap."""

    @classmethod
    def of(cls, tensor: Tensor) -> Room:
        """The room on the tensor's device; under the interpreter as little as there is anywhere."""
        if not tensor.is_cuda:
            return cls(101376, 1, overlap=False)
        properties: Any = torch.cuda.get_device_properties(tensor.device)
        memory = properties.shared_memory_per_block_optin  # torch's types lack it
        return cls(memory, properties.multi_processor_count, Target.of(tensor).overlap)


def candidates(shape: Shape, room: Room, before: Plan) -> tuple[list[Tile], list[Tile]]:
    """The tiles to try for gate and up, and for down, beginning with those of the plan that the shape has now."""
    if shape.format != layout.EXPONENT and (shape.hidden % STEP or shape.inner % STEP):
        room = room._replace(overlap=False)  # project.py does those
    return _side(shape, room, 0, before.first), _side(shape, room, 1, before.second)


def _side(shape: Shape, room: Room, side: int, before: Tile) -> list[Tile]:
    length = (shape.hidden, shape.inner)[side]
    tried = (tile for tile in _tiles(shape, room, side) if _able(tile, shape, side == 0, room, length))
    return list(dict.fromkeys([before, *tried] if before.mode != plans.BY_ENTRY else tried))


def by_entry(shape: Shape) -> list[Plan]:
    """The plans to try for so few tokens that each of their entries may go by itself."""
    if shape.tokens > FEW_TOKENS:
        return []
    cuts = BY_ENTRY if shape.dense or shape.format == layout.EXPONENT else BY_ENTRY_LEVELED
    firsts, seconds = ([Tile(plans.BY_ENTRY, 1, 0, *cut, ahead=0) for cut in side] for side in cuts)
    if cuts is BY_ENTRY:
        in_turn = dict.fromkeys((1, power_of_two(shape.tokens)))  # about as many programs as of one token
        downs = [replace(second, **more) for second in seconds for more in BY_ENTRY_DOWN]
        seconds = [
            replace(second, blocks=n) for second in downs for n in in_turn if shape.hidden % (n * second.rows) == 0
        ]
    return [Plan(first, second) for first in firsts for second in seconds]


def streamed(shape: Shape, room: Room) -> list[Plan]:
    """The plans to try with both projections as one stream of packed pairs (streamed.py)."""
    if shape.dense or shape.format != layout.EXPONENT or not room.overlap or shape.tokens <= FEW_TOKENS:
        return []
    kinds: Iterable[tuple[int, int]] = next((kinds for load, kinds in STREAMED if shape.load <= load), ())
    cuts = [cut for cut in STREAMED_CUTS if shape.hidden % cut[0] == 0 and shape.inner % cut[0] == 0]
    tiles = [
        Tile(plans.STREAMED, tokens, extra, 64, columns, 8, stages)
        for tokens, extra in kinds
        for columns, stages in cuts
    ]
    return [plan for plan in map(join, tiles) if fits(plan, room.memory)]


def _tiles(shape: Shape, room: Room, side: int) -> Iterator[Tile]:
    leveled = shape.format != layout.EXPONENT and not shape.dense and room.overlap
    regimes = LEVELED_REGIMES if leveled else REGIMES
    few = shape.tokens <= FEW_TOKENS
    regime = regimes[0] if few else next(regime for regime in regimes if shape.load <= regime.load)
    for kind in dict.fromkeys(_possible(kind, shape.dense, room) for kind in regime.kinds):
        for rows, columns, warps, stages in _cuts(kind, room, leveled)[side]:
            for group in regime.groups:
                tile = Tile(kind.mode, kind.tokens, kind.extra, rows, columns, warps, stages, group, terms=kind.terms)
                yield tile
                idle = side and (leveled or regime is REGIMES[0]) and _idle(tile, shape, room)
                if kind.terms and kind.tokens in REGISTERS_SHARED and warps == 8:
                    limited = replace(tile, registers=REGISTERS_SHARED[kind.tokens])
                    yield limited
                    if idle and columns > STEP and shape.inner >= 1024:  # as many programs as the limit lets run
                        yield replace(limited, splits=2)
                yield from _in_turn(tile, shape, side, leveled)
                if idle and group == regime.groups[0]:
                    yield from (replace(tile, splits=splits) for splits in (2, 4) if shape.inner >= 512 * splits)


def _in_turn(tile: Tile, shape: Shape, side: int, leveled: bool) -> Iterator[Tile]:
    """The tile with several blocks of rows in turn: by warps apart, and of pairs in few bits.

    Gate and up have them in few bits only.
    """
    if tile.paired:
        tried = leveled and not tile.terms and tile.extra and (tile.warps, tile.group) == ((8, 4)[side], 1)
    else:
        many = tile.overlapped and tile.tokens >= leveled_launch.MANY and tile.warps == 8
        tried = many and (leveled or (side and tile.columns == layer.WIDEST))
    step = STEP if leveled else tile.columns
    columns, rows = (shape.hidden, shape.inner)[:: -1 if side else 1]
    for several in (replace(tile, blocks=n) for n in (IN_TURN_PAIRED if tile.paired else IN_TURN) if tried):
        if leveled_launch.in_turn(several, rows, columns, columns, step) > 1:
            yield several


def _possible(kind: Kind, dense: bool, room: Room) -> Kind:
    """The kind as the device has it; dense weights know no slots, and their mode is not looked at."""
    if dense:
        return kind._replace(mode="slot")
    return (
        kind
        if room.overlap
        else kind._replace(mode=kind.mode.removeprefix("overlapped_").replace("overlapped", "slot"))
    )


def _cuts(kind: Kind, room: Room, leveled: bool) -> tuple[Iterable[Cut], Iterable[Cut]]:
    if leveled:
        return LEVELED if not kind.terms else E4M3 if kind.tokens < 32 else E4M3_MANY
    if kind.mode.startswith("overlapped"):
        return OVERLAPPED_PAIR if kind.mode.endswith("pair") else OVERLAPPED
    if kind.few:
        return FEW
    return MANY if room.memory >= LARGE else (MANY[0] + NARROW[0], MANY[1] + NARROW[1])


def _idle(tile: Tile, shape: Shape, room: Room) -> bool:
    """Whether processors wait for work: few units are hit, and one program a block of rows does not fill the device."""
    units = min(shape.experts, shape.tokens * shape.top_k)
    return units * -(-shape.hidden // tile.rows) <= PROGRAMS * room.processors


def _able(tile: Tile, shape: Shape, gated: bool, room: Room, length: int) -> bool:
    """Whether sums fit the registers and tiles the shared memory, and overlapped kernels take the columns' number."""
    rows = tile.rows * (2 if gated else 1)
    entries = tile.entries * (2 if tile.paired and not shape.dense else 1)
    if rows * entries / (32 * tile.warps) > (REGISTERS_OVERLAPPED if tile.overlapped else REGISTERS):
        return False
    if tile.overlapped and shape.format != layout.EXPONENT:
        return leveled_bytes(tile, gated, shape.format) + SPARE <= room.memory
    if tile.overlapped and length % (2 * tile.columns):
        return False
    held = tile.stages if tile.overlapped or entries > 64 else tile.stages - 1  # as measured: narrow tokens take less
    within = 2 * (rows + entries) * tile.columns * held + SPARE <= room.memory
    return within and tile_fits(tile, gated, room.memory, shape.format)
