"""Launches of streamed.py for a layer's pairs, which layers it takes, and in which order programs take their work."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from moefold_kernels.triton import leveled_launch
from moefold_kernels.triton.plans import Tile
from moefold_kernels.triton.portability import Target, blocks, launch
from moefold_kernels.triton.weights import Projections

REGISTERS = 80
"""Of a thread that copies: so many that the others have enough for 64 + 16 entries of both slots."""
BEYOND = 256
"""Columns that could be multiplied in the time that an item takes beside its columns, about."""
TRIED = 24
"""Numbers of early and of late items that are compared, of each."""
WORTH = 0.995
"""Of the time in plain order, at most, for another order to be taken."""


def takes(kind: Projections, x: Tensor, between: Tensor) -> bool:
    """Whether streamed.py takes this: copies of 16 bytes, and rows that 32 bits find, of a unit and of a batch."""
    matrices = [matrix for matrix in (kind.gate, kind.up, kind.down) if matrix is not None]
    strides = [stride for matrix in matrices for stride in matrix.stride()[:2]] + [x.stride(0)]
    lengths = [matrix.shape[1] * matrix.stride(1) for matrix in matrices] + [len(x) * x.stride(0), between.numel()]
    return (
        Target.of(x).overlap
        and all(stride % 8 == 0 for stride in strides)
        and all(tensor.data_ptr() % 16 == 0 for tensor in (*matrices, x))
        and max(lengths) <= leveled_launch.LARGEST
    )


def both(
    operands: tuple[Tensor | None, ...], shared: dict[str, Any], tile: Tile, units: int, entries: int, guess: bool
) -> None:
    """Both projections of `units` pairs, for so many entries; `operands` and `shared` are joined.project's."""
    from moefold_kernels.triton import streamed

    x = operands[0]
    assert x is not None
    hidden, inner = shared["hidden"], shared["inner"]
    n_in, n_out = blocks(inner, tile.rows), blocks(hidden, 2 * tile.rows)
    programs = min(processors(x.device), shared["capacity"] * (n_in + n_out))
    tiles = round(units * (1 - (1 - 1 / units) ** entries))  # of as many units as are likely to have any
    early, late = in_order((tiles * n_in, hidden + BEYOND), (tiles * n_out, inner + BEYOND), programs)
    if tile.ahead == 1:
        early, late = 0, 0
    if tile.ahead < 4:
        guess = False
    launch(
        streamed.project, (programs,), *operands, **shared, units=units, early=early, late=late, PLACES=tile.stages,
        REGISTERS=REGISTERS, GUESS=guess,
    )  # fmt: skip


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=256)
def in_order(first: tuple[int, int], second: tuple[int, int], programs: int) -> tuple[int, int]:
    """How many items of the second kind come early, and how many of the first kind after them (streamed._in_order).

    A kind is how many items there are and how long one takes. Programs take them one after another, whoever is free
    first. Where all of the first kind come first, a few items of the second may be left when all programs end at about
    the same time: of DeepSeek-MoE's 704 and 512 items 132 programs do 248 or 258 steps' work, and 28 of them 22 more.
    With some of the second kind in between, what is left fits better.
    """
    (n, size), (m, other) = first, second

    def longest(early: int, late: int) -> int:
        return max(_levels([(n - late, size), (early, other), (late, size), (m - early, other)], programs))

    best, least = (0, 0), longest(0, 0)
    least = least * WORTH
    for late in range(0, min(n, 2 * programs), max(1, 2 * programs // TRIED)):
        for early in range(0, min(m, 3 * programs), max(1, 3 * programs // TRIED)):
            if (longest_now := longest(early, late)) < least:
                best, least = (early, late), longest_now
    return best


def _levels(phases: list[tuple[int, int]], programs: int) -> dict[int, int]:
    """When programs end that take so many items of such a size, phase by phase: how many end at which time."""
    levels = {0: programs}
    for count, size in phases:
        while count > 0:
            lowest = min(levels)
            moved = min(count, levels[lowest])
            levels[lowest] -= moved
            if not levels[lowest]:
                del levels[lowest]
            levels[lowest + size] = levels.get(lowest + size, 0) + moved
            count -= moved
    return levels
