"""Launches of leveled.py for a layer's pairs, and which layers it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefold_kernels.layout_pairs import BAND
from moefold_kernels.triton.plans import STEP, Plan, Tile
from moefold_kernels.triton.portability import Target, launch
from moefold_kernels.triton.weights import Leveled, Planes, Weights

ALIGNED = 16
COPY_REGISTERS = 104
"""Of a thread that copies for leveled_apart.py."""
MANY = 256
"""Tokens of a tile of leveled_apart.py or overlapped_apart.py, at least."""
LARGEST = 2**31
"""Elements of tokens, to the last row's end, whose rows they find; a pair's weights are fewer than that."""
NUMBERED = "pair8"
"""The format whose levels leveled_decode.py knows by their numbers: they have to be fp8 numbers (eighths.py)."""


def takes(weights: Weights, plan: Plan) -> bool:
    """Whether leveled.py does a layer's pairs, both projections: on Hopper, in whole steps of columns.

    Tiles without terms and of an overlapped mode, of which groups of four warps share the rows.
    """
    kind, tiles = weights.packed, (plan.first, plan.second)
    if not isinstance(kind, Leveled) or not kind.gated or (kind.format == NUMBERED and not kind.coded):
        return False
    whole = not (kind.hidden % STEP or kind.inner % STEP)
    fitting = all(tile.overlapped and not tile.terms for tile in tiles) and all(map(shared_by_warps, tiles, (2, 1)))
    return fitting and whole and aligned(kind) and Target.of(weights.places).overlap


def slow_because(kind: Leveled, fused: bool) -> str:
    """Why pairs in few bits get project.py on a device that has faster kernels, in words; nothing if a plan says so."""
    if not kind.gated:
        return "the experts have no gate"
    if not fused:
        return "the activation is none that they compute"
    if kind.hidden % STEP or kind.inner % STEP:
        return f"hidden and inner size, {kind.hidden} and {kind.inner}, are to be multiples of {STEP}"
    if kind.format == NUMBERED and not kind.coded:
        return "the levels are no fp8 numbers times a factor: let moefold learn them, or give such ones"
    return "" if aligned(kind) else "planes are not contiguous, or begin at no multiple of 16 bytes"


def aligned(kind: Leveled) -> bool:
    """Whether planes are contiguous and begin where copies of 16 bytes may."""
    planes = [part for matrix in (kind.wide, kind.narrow) for part in matrix if part is not None]
    return all(part.is_contiguous() and part.data_ptr() % ALIGNED == 0 for part in planes)


def shared_by_warps(tile: Tile, matrices: int) -> bool:
    """Whether groups of four warps, each of which has 16 rows, share the rows of so many matrices side by side."""
    return tile.warps % 4 == 0 and tile.rows * matrices >= 16 * tile.warps


def copyable(x: Tensor) -> Tensor:
    """`x` [row, columns] bfloat16, or a copy: rows begin where copies of 16 bytes may; columns are whole groups."""
    whole = x.data_ptr() % ALIGNED == 0 and x.stride(0) * x.element_size() % ALIGNED == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def gate_up(
    grid: tuple[int, ...], x: Tensor, kind: Leveled, out: Tensor, tables: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """`tables`: order, offsets, tiles, experts and bias; `options`: numbers and constants of the kernel."""
    file, options = _file(x, options)
    planes = planes_of(kind, kind.wide)
    launch(file.project_in, grid, x, *planes, out, *tables, w_up=kind.inner, FORMAT=kind.format, **options)


def down(
    grid: tuple[int, ...], x: Tensor, kind: Leveled, out: Tensor, tables: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """The same of what `gate_up` wrote, with the gate weights before the bias."""
    file, options = _file(x, options)
    planes = planes_of(kind, kind.narrow)
    launch(file.project_out, grid, x, *planes, out, *tables, FORMAT=kind.format, **options)


def _file(x: Tensor, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """leveled.py, or leveled_apart.py for programs of which a multiprocessor holds but one, and its options."""
    from moefold_kernels.triton import leveled, leveled_apart

    if not apart(options["TOKENS"], options["num_warps"], options["PAIRED"], x):
        return leveled, options
    kept = {name: value for name, value in options.items() if name != "PAIRED"}
    return leveled_apart, kept | {"REGISTERS": COPY_REGISTERS}


def in_turn(tile: Tile, rows: int, columns: int, part: int, step: int = STEP) -> int:
    """How many blocks of rows a program does: as the tile says where rows, columns and steps are whole.

    Down has `hidden` rows, and `inner` columns in parts; gate has `inner` rows, and `hidden` columns in one.
    """
    whole = not (rows % (tile.rows * tile.blocks) or columns % part or part % (step * tile.stages) or tile.rows % BAND)
    return tile.blocks if whole else 1


def apart(tokens: int, warps: int, paired: bool, x: Tensor) -> bool:
    """Whether warps apart copy tokens, rows of `x` which they find by 32 bits, for a tile.

    They do where a multiprocessor holds but one program, and where it was measured to help (docs/kernel-log.md).
    """
    return tokens >= MANY and warps == 8 and not paired and x.shape[0] * x.stride(0) <= LARGEST


def planes_of(kind: Leveled, matrix: Planes) -> tuple[Tensor, ...]:
    """Planes, two scales in an integer, and levels, as leveled.py and e4m3.py take them."""
    low = matrix.words if matrix.low is None else matrix.low  # any pointer, where nothing is read
    return matrix.words, low, matrix.scale.view(torch.int32), kind.levels
