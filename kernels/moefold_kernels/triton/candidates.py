"""The tiles that `moefold tune` tries: what won or came near on an H200, regime by regime of entries per expert.

Lists are by hand: their product would be thousands of kernels of seconds each to compile. A cut is (rows, columns,
warps, stages); a kind is a mode with a number of entries, and what cuts go with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefold_kernels import layout
from moefold_kernels.triton.configs import Shape
from moefold_kernels.triton.plans import Plan, Tile, leveled_bytes, tile_fits
from moefold_kernels.triton.portability import Target

Cut = tuple[int, int, int, int]

# gate and up, of which a program has `rows` each; then down
FEW: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    (
        (32, 128, 4, 3), (32, 128, 4, 4), (32, 128, 4, 5), (32, 128, 2, 3), (64, 128, 4, 3), (64, 64, 4, 4),
        (64, 64, 4, 5), (32, 64, 4, 4), (32, 64, 4, 5), (32, 64, 4, 6), (64, 128, 8, 3), (64, 128, 8, 4),
        (64, 64, 8, 5),
        (16, 128, 2, 4), (16, 128, 1, 3), (16, 256, 2, 3), (32, 256, 4, 3), (16, 128, 4, 4), (32, 64, 4, 3),
    ),
    (
        (128, 128, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (128, 128, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4),
        (64, 128, 4, 5), (64, 128, 2, 4), (64, 64, 4, 4), (64, 64, 4, 5), (64, 64, 2, 3), (32, 64, 1, 3),
        (32, 128, 2, 3), (128, 64, 8, 5), (128, 64, 8, 6), (128, 64, 4, 4), (64, 256, 4, 3), (32, 256, 2, 3),
        (32, 128, 1, 3), (32, 64, 2, 5),
    ),
)  # fmt: skip
MANY: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    (
        (64, 64, 8, 3), (64, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4),
        (32, 64, 4, 3), (32, 64, 4, 4), (64, 128, 8, 2),
    ),
    (
        (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 2), (128, 64, 4, 3), (256, 64, 8, 3), (256, 32, 8, 4),
        (64, 64, 4, 3), (64, 64, 4, 4), (128, 32, 4, 4), (128, 32, 4, 5),
    ),
)  # fmt: skip
NARROW: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((64, 32, 8, 3), (64, 32, 8, 4), (64, 32, 4, 3), (32, 32, 4, 4)),
    ((128, 32, 8, 3), (128, 32, 8, 4), (64, 32, 4, 4)),
)
"""Beside MANY, where shared memory is as small as Ampere's and Ada's consumer GPUs have it (99 KB)."""
OVERLAPPED: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    (
        (64, 64, 8, 4), (64, 64, 8, 6), (128, 64, 8, 4), (64, 32, 4, 4), (128, 32, 8, 4), (128, 32, 8, 6),
        (64, 32, 8, 6), (64, 32, 8, 8), (32, 64, 4, 4),
    ),
    (
        (128, 64, 8, 4), (128, 64, 8, 6), (256, 64, 8, 4), (128, 32, 4, 4), (256, 32, 8, 4), (256, 32, 8, 6),
        (128, 32, 8, 6), (128, 32, 8, 8), (64, 64, 4, 4),
    ),
)  # fmt: skip
"""Even numbers of places: odd ones are unrolled twice."""
OVERLAPPED_PAIR: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((64, 64, 8, 4), (64, 64, 8, 6), (32, 64, 4, 4), (32, 64, 4, 6), (64, 32, 8, 6)),
    ((128, 64, 8, 4), (128, 64, 8, 6), (64, 64, 4, 4), (64, 64, 4, 6), (128, 32, 8, 6)),
)

LEVELED: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((64, 64, 8, 2), (32, 64, 4, 2), (64, 64, 8, 3), (64, 64, 4, 4), (128, 64, 8, 2)),
    ((128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 4), (256, 64, 8, 2)),
)
"""For the few-bit formats on Hopper with bf16 operands (leveled.py), where every step is of 128 columns."""
E4M3: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((64, 256, 8, 2), (64, 256, 4, 2), (64, 256, 8, 3), (64, 256, 8, 4)),
    ((64, 256, 4, 2), (64, 128, 4, 3), (128, 256, 8, 2), (64, 256, 4, 3)),
)
"""The same with e4m3 operands (e4m3.py), and"""
E4M3_MANY: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((64, 128, 8, 2), (64, 256, 8, 2), (64, 128, 8, 4), (64, 128, 8, 3)),
    ((64, 256, 4, 2), (64, 128, 4, 2), (128, 128, 8, 2), (64, 128, 4, 3)),
)
"""from 32 tokens on, which take more of shared memory than words."""
REGISTERS_SHARED = 128
"""A limit that tiles of 32 and 64 tokens are tried with, too: two programs of eight warps then share a processor."""

LARGE = 128 * 1024
"""Shared memory of a block from which on NARROW is not tried."""
REGISTERS, REGISTERS_OVERLAPPED = 170, 150
"""Sums a thread may hold: of its 255 registers the rest goes to operands and pointers (two sets when overlapped)."""
SPARE = 6144
"""Shared memory that Triton takes beside the tiles, at most."""
PROGRAMS = 4
"""Programs for each multiprocessor from which on splitting the columns only adds work."""


class Kind(NamedTuple):
    """One way to serve entries: `cuts` for gate and up, and for down."""

    mode: str
    tokens: int
    extra: int = 0
    few: bool = False
    terms: int = 0


class Regime(NamedTuple):
    """What is tried up to some number of entries per expert; a number of groups is tried with everything."""

    load: float
    kinds: tuple[Kind, ...]
    groups: tuple[int, ...] = (1,)


REGIMES = (
    Regime(1, (Kind("pair", 16, few=True), Kind("slot", 16, few=True))),
    Regime(6, (Kind("pair", 16, few=True),)),
    Regime(14, (Kind("pair", 16, few=True), Kind("pair", 32, few=True))),
    Regime(
        26,
        (Kind("pair", 32, few=True), Kind("pair", 32, 16, few=True), Kind("overlapped_pair", 32)),
    ),
    Regime(
        48,
        (
            Kind("pair", 32, 16, few=True), Kind("pair", 64, few=True), Kind("overlapped_pair", 32, 16),
            Kind("overlapped_pair", 64), Kind("overlapped", 32, 16), Kind("overlapped", 64),
        ),
    ),
    Regime(
        110,
        (
            Kind("pair", 64, 16), Kind("pair", 64, 32), Kind("slot", 64, 16), Kind("overlapped_pair", 64, 16),
            Kind("overlapped", 64, 16), Kind("overlapped", 64, 32), Kind("overlapped", 128),
        ),
        (1, 4),
    ),
    Regime(
        200,
        (Kind("slot", 128, 32), Kind("overlapped", 128, 32), Kind("overlapped", 128), Kind("overlapped", 256)),
        (2, 8),
    ),
    Regime(
        float("inf"),
        (
            Kind("slot", 128, 32), Kind("slot", 128), Kind("overlapped", 256), Kind("overlapped", 256, 32),
            Kind("overlapped", 128),
        ),
        (8, 16),
    ),
)  # fmt: skip
LEVELED_REGIMES = (
    Regime(1, (Kind("overlapped", 4, terms=2), Kind("overlapped_pair", 4, terms=2))),
    Regime(6, (Kind("overlapped_pair", 8, terms=2), Kind("overlapped_pair", 4, terms=2))),
    Regime(14, (Kind("overlapped_pair", 16, terms=2), Kind("overlapped_pair", 32, terms=2))),
    Regime(26, (Kind("overlapped_pair", 32, terms=2), Kind("overlapped_pair", 16, terms=2))),
    Regime(48, (Kind("overlapped_pair", 32, terms=2), Kind("overlapped", 64, terms=2), Kind("overlapped_pair", 64))),
    Regime(
        110,
        (
            Kind("overlapped_pair", 64, 16), Kind("overlapped", 64, terms=2), Kind("overlapped", 64, 16, terms=2),
            Kind("overlapped", 128),
        ),
        (1, 4),
    ),
    Regime(200, (Kind("overlapped", 128, 32), Kind("overlapped", 128), Kind("overlapped", 256)), (2, 8)),
    Regime(float("inf"), (Kind("overlapped", 256, 32), Kind("overlapped", 128), Kind("overlapped", 256)), (2, 8, 16)),
)  # fmt: skip
"""REGIMES of the few-bit formats."""
FEW_TOKENS = 4
"""So few tokens are of the first regime, whatever their experts: few pairs have both slots in use."""


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
    return _side(shape, room, 0, before.first), _side(shape, room, 1, before.second)


def _side(shape: Shape, room: Room, side: int, before: Tile) -> list[Tile]:
    length = (shape.hidden, shape.inner)[side]
    tried = (tile for tile in _tiles(shape, room, side) if _able(tile, shape, side == 0, room, length))
    return list(dict.fromkeys([before, *tried]))


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
                if kind.terms and kind.tokens in (32, 64) and warps == 8:
                    yield replace(tile, registers=REGISTERS_SHARED)
                if side and (leveled or regime is REGIMES[0]) and _idle(tile, shape, room):
                    yield from (replace(tile, splits=splits) for splits in (2, 4) if shape.inner >= 512 * splits)


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
