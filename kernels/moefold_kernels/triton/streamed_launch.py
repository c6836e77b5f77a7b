"""Launches of streamed.py for a layer's pairs, and which layers it takes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from moefold_kernels.triton import leveled_launch
from moefold_kernels.triton.plans import Tile
from moefold_kernels.triton.portability import Target, blocks, launch
from moefold_kernels.triton.weights import Projections

REGISTERS = {64: 80, 128: 104}
"""Columns of a place -> registers of a thread that copies: with fewer they are spilled, with more those that multiply
64 + 16 entries of both slots have too few."""


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


def both(operands: tuple[Tensor | None, ...], shared: dict[str, Any], tile: Tile, units: int, guess: bool) -> None:
    """Both projections of `units` pairs; `operands` and `shared` are joined.project's."""
    from moefold_kernels.triton import streamed

    x = operands[0]
    assert x is not None
    items = shared["capacity"] * (blocks(shared["inner"], tile.rows) + blocks(shared["hidden"], 2 * tile.rows))
    launch(
        streamed.project, (min(processors(x.device), items),), *operands, **shared, units=units, PLACES=tile.stages,
        REGISTERS=REGISTERS[tile.columns], GUESS=guess,
    )  # fmt: skip


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
