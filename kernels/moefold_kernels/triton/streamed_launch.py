"""Launches of streamed.py for a layer's pairs: which layers it takes, and which programs go on to down early."""

from __future__ import annotations

import functools
import heapq
import random
from typing import Any

import torch
from torch import Tensor

from moefold_kernels.triton import leveled_launch
from moefold_kernels.triton.plans import Tile
from moefold_kernels.triton.portability import Target, blocks, launch
from moefold_kernels.triton.weights import Leveled, Projections

MOST_ROUNDS, STRIDE, LEAST = 20, 6, 0.995
"""`early` looks at layers of up to so many items a program, at every so many programs, for half a percent at least,"""
MARGIN = 2
"""after so many rounds of items since a tile's last (streamed_ahead.py asks for it, too),"""
DRAWS, SPREAD = 6, 0.04
"""in so many draws, of items that last so much more or less (DeepSeek's, by the clock: 13 to 17 us)."""
REGISTERS = {64: 80, 128: 104}
"""Columns of a place -> registers of a thread that copies: with fewer they are spilled, with more those that multiply
64 + 16 entries of both slots have too few."""


def takes(kind: Projections | Leveled | None, x: Tensor, entries: int) -> bool:
    """Whether streamed.py takes pairs: copies of 16 bytes, and rows that 32 bits find, of a unit and of a batch."""
    if not isinstance(kind, Projections):
        return False
    matrices = [matrix for matrix in (kind.gate, kind.up, kind.down) if matrix is not None]
    strides = [stride for matrix in matrices for stride in matrix.stride()[:2]] + [x.stride(0)]
    lengths = [matrix.shape[1] * matrix.stride(1) for matrix in matrices]
    lengths += [len(x) * x.stride(0), entries * kind.down.shape[2]]
    return (
        Target.of(x).overlap
        and all(stride % 8 == 0 for stride in strides)
        and all(tensor.data_ptr() % 16 == 0 for tensor in (*matrices, x))
        and max(lengths) <= leveled_launch.LARGEST
    )


def both(
    operands: tuple[Tensor | None, ...], items: Tensor, shared: dict[str, Any], tile: Tile, units: int, guess: bool
) -> None:
    """Both projections of `units` pairs; `operands` and `shared` are joined.project's, `items` are Tables.items."""
    from moefold_kernels.triton import streamed

    x, _, between, *_ = operands
    assert x is not None
    assert between is not None
    shared = dict(shared)
    entries, hidden, inner = between.shape[-2], shared["hidden"], shared["inner"]
    of_tile = blocks(inner, tile.rows), blocks(hidden, 2 * tile.rows)
    programs = min(processors(x.device), shared.pop("capacity") * sum(of_tile))
    steps = hidden // tile.columns, inner // tile.columns
    few, most = early(programs, units, of_tile, steps) if tiles(entries, units) == units else (0, 0)
    launch(
        streamed.project, (programs,), *operands[:6], items, *operands[8:], **shared,  # not offsets and tiles
        units=units, few=few, most=most, PLACES=tile.stages, REGISTERS=REGISTERS[tile.columns], GUESS=guess,
    )  # fmt: skip


def tiles(entries: int, units: int) -> int:
    """How many of so many units are likely to have any of so many entries."""
    return round(units * (1 - (1 - 1 / units) ** entries))


@functools.cache
def early(programs: int, n_tiles: int, of_tile: tuple[int, int], steps: tuple[int, int]) -> tuple[int, int]:
    """How many programs should go on to down early, and after how many items of gate and up: (0, 0) if none.

    A tile has `of_tile` items of gate and up and of down, which last so many `steps`. If each program takes what comes
    next, some have one more than the others at the end, and few programs do not fill the memory. With some that had
    less of the long items, and more of the short ones, all can end together: whether they do, whoever takes what when
    items last a little more or less, is tried out. That takes some tenths of a second, so it is asked with one tile for
    each unit, whatever the batch.
    """
    firsts, rounds = n_tiles * of_tile[0], n_tiles * of_tile[0] / programs
    if firsts < of_tile[0] + MARGIN * programs or n_tiles * sum(of_tile) > MOST_ROUNDS * programs:
        return 0, 0
    best = 0, 0
    least = LEAST * ends(programs, n_tiles, of_tile, steps, best)
    for most in range(max(1, int(rounds) - 2), int(rounds) + 1):
        for few in range(STRIDE, programs // 2, STRIDE):
            found = ends(programs, n_tiles, of_tile, steps, (few, most))
            if found < least:
                best, least = (few, most), found
    return best


def ends(
    programs: int, n_tiles: int, of_tile: tuple[int, int], steps: tuple[int, int], given: tuple[int, int]
) -> float:
    """When the last program ends, in steps, on average over some draws of how long items last; `given` is few, most.

    A program may go on to down early when streamed_ahead.py lets it.
    """
    few, most = given
    firsts, seconds = (n_tiles * count for count in of_tile)
    total = 0.0
    for seed in range(DRAWS):
        draw = random.Random(seed)
        begun, down, taken, last = 0, 0, [0] * programs, 0.0
        queue = [(0.0, program) for program in range(programs)]
        while queue:
            now, program = queue[0]
            wanted = ((down + few) // of_tile[1] + 1) * of_tile[0] + MARGIN * programs
            if begun < firsts and not (program < few and taken[program] >= most and begun >= wanted):
                begun, taken[program], lasts = begun + 1, taken[program] + 1, steps[0]
            elif down < seconds:
                down, lasts = down + 1, steps[1]
            else:
                last = max(last, heapq.heappop(queue)[0])
                continue
            heapq.heapreplace(queue, (now + lasts * draw.gauss(1, SPREAD), program))
        total += last
    return total / DRAWS


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
