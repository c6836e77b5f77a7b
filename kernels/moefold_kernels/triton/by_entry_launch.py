"""Launches of by_entry.py for a layer, and which layers it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moefold_kernels import layout, layout_pairs
from moefold_kernels.triton import by_entry
from moefold_kernels.triton.leveled_launch import NUMBERED
from moefold_kernels.triton.plans import Plan, Tile
from moefold_kernels.triton.portability import Target, blocks, launch, power_of_two
from moefold_kernels.triton.weights import (
    Leveled,
    Projections,
    Weights,
    elements_between,
    planes_of,
    rescaling,
    stride_of,
)

if TYPE_CHECKING:
    from moefold_kernels.triton.layer import Activation

MOST = 65535
"""Programs along a grid's second axis or third: entries, tokens or blocks of rows."""
CHOICES = 8
"""Of a token, at most: down's program holds words of all of them at once, and of 16 its registers are spilled."""
LARGEST = 2**31
"""Cells of a unit's matrix, whose offsets are 32 bits."""
COMPILED = "--register-usage-level=6"
"""For ptxas, of 16 bits: one above what it does unasked. Up to 2 % less time (docs/kernel-log.md)."""
PER_CELL = layout_pairs.WORD // layout_pairs.NIBBLE
"""Weights of a cell in few bits."""


def takes(weights: Weights, plan: Plan, tokens: int, top_k: int) -> bool:
    """Whether by_entry.py does a layer of gated experts: a plan of its mode, and numbers that are two an integer."""
    if not plan.by_entry or tokens * top_k > MOST or top_k > CHOICES:
        return False
    if max(blocks(weights.any.inner, plan.first.rows), blocks(weights.any.hidden, plan.second.rows)) > MOST:
        return False
    return all(map(_in_cells, (weights.packed, weights.alone)))


def _in_cells(kind: Projections | Leveled | None) -> bool:
    if isinstance(kind, Leveled):
        return kind.gated and not (kind.hidden % 2 or kind.inner % 2) and (kind.coded or kind.format != NUMBERED)
    if kind is None:
        return True
    matrices = [kind.gate, kind.up, kind.down]
    return all(
        matrix is not None
        and matrix.data_ptr() % 4 == 0
        and matrix.shape[2] % 2 == 0
        and matrix.stride(2) == 1
        and all(stride % 2 == 0 for stride in matrix.stride()[:2])
        and matrix.shape[1] * matrix.stride(1) // 2 < LARGEST
        for matrix in matrices
    )


def forward(
    weights: Weights, x: Tensor, index: Tensor, gates: Tensor, plan: Plan, activation: Activation, fused: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The layer's output [token, hidden]: `x` [token, hidden] bf16, `index` and `gates` [token, top_k], contiguous."""
    x = _cells(x if x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0 else x.clone(memory_format=torch.contiguous_format))
    if not len(index):
        return x.new_empty(0, weights.any.hidden, dtype=dtype)
    inner, few = weights.any.inner, isinstance(weights.packed, Leveled)
    whole = layout_pairs.groups(inner) * layout_pairs.GROUP if few else inner
    make = x.new_empty if whole == inner else x.new_zeros  # nobody writes a group's further columns
    between = make((index.numel(), whole), dtype=torch.bfloat16)
    for kind, first, last in _kinds(weights):
        _gate_up(weights, kind, first, last, x, index, gates, between, plan.first, activation, fused)
    return _down(weights, _cells(between), index, gates, plan.second, dtype)


def _kinds(weights: Weights) -> list[tuple[Projections | Leveled, int, int]]:
    """What to launch gate and up for, and its places."""
    pairs, all_of_them = layout.SLOTS * weights.pairs, len(weights.places)
    kinds = (weights.packed, 0, pairs), (weights.alone, pairs, all_of_them)
    return [(kind, first, last) for kind, first, last in kinds if kind is not None and last > first]


def _gate_up(
    weights: Weights, kind: Projections | Leveled, first: int, last: int, x: Tensor, index: Tensor, gates: Tensor,
    out: Tensor, tile: Tile, activation: Activation, fused: int,
) -> None:  # fmt: skip
    target, bias, n_experts = Target.of(x), weights.biases, len(weights.places)
    hidden, inner = weights.any.hidden, weights.any.inner
    shifts = dict.fromkeys(("gate_shift", "up_shift"), 1.0)
    planes: tuple[Tensor | None, ...]
    strides: tuple[int, ...] = (0, 0)
    if isinstance(kind, Leveled):
        planes, up = planes_of(kind, kind.wide), 0
    else:
        assert kind.gate is not None
        words, other = _cells(kind.gate), _cells(kind.up)
        planes, strides = (words, None, None, None), words.stride()[:2]
        up = elements_between(words, other)
        shifts = {"gate_shift": rescaling(kind.tops[0]), "up_shift": rescaling(kind.tops[1])}
    gate_bias = None if bias is None else bias.gate
    assert bias is None or gate_bias is not None
    grid = index.numel(), blocks(inner, tile.rows)
    if isinstance(kind, Leveled):
        grid = grid[::-1]
    launch(
        by_entry.gate_up, grid, x, *planes, out, index, weights.places, gates, gate_bias,
        hidden, inner, out.shape[1], index.shape[1], n_experts, first, last, x.stride(0), *strides, up, **shifts,
        bias_expert=stride_of(gate_bias, 0), bias_row=stride_of(gate_bias, 1),
        bias_up=0 if bias is None else elements_between(gate_bias, bias.up),
        limit=activation.limit, alpha=activation.alpha, EXPERTS=power_of_two(n_experts),
        DENSE=kind is weights.alone, ACTIVATION=fused,
        WHOLE=hidden % layout_pairs.GROUP == 0, **_cut(kind, tile, inner, hidden, target),
    )  # fmt: skip


def _down(weights: Weights, x: Tensor, index: Tensor, gates: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    target, n_experts = Target.of(x), len(weights.places)
    (tokens, top_k), hidden, inner = index.shape, weights.any.hidden, weights.any.inner
    out = x.new_empty(tokens, hidden, dtype=dtype)
    bias = None if weights.biases is None else weights.biases.down
    packed, alone = weights.packed, weights.alone
    planes: tuple[Tensor | None, ...] = (None, None, None, None)
    strides: tuple[int, ...] = (0, 0)
    shift, dense = 1.0, None
    if isinstance(packed, Leveled):
        planes = planes_of(packed, packed.narrow)
    elif packed is not None:
        words = _cells(packed.down)
        planes, strides, shift = (words, None, None, None), words.stride()[:2], rescaling(packed.tops[2])
    if alone is not None:
        dense = _cells(alone.down)
    in_turn = _in_turn(weights, tile)
    launch(
        by_entry.down, (1, tokens, blocks(hidden, tile.rows * in_turn)), x, *planes, dense, out, index,
        weights.places, gates, bias, inner, 2 * x.shape[1], hidden, n_experts, layout.SLOTS * weights.pairs, *strides,
        *((0, 0) if dense is None else dense.stride()[:2]), out.stride(0), shift=shift,
        bias_expert=stride_of(bias, 0), bias_row=stride_of(bias, 1),
        TOP_K=top_k, PACKED=packed is not None, ALONE=alone is not None, SPLITS=tile.splits, AHEAD=tile.ahead,
        BLOCKS=in_turn, **_cut(packed, tile, hidden, inner, target),
    )  # fmt: skip
    return out


def _in_turn(weights: Weights, tile: Tile) -> int:
    """How many blocks of rows a program of down does: the tile's, of experts of one kind and of 16 bits, if whole."""
    alike = (weights.packed is None or weights.alone is None) and not isinstance(weights.packed, Leveled)
    return tile.blocks if alike and weights.any.hidden % (tile.rows * tile.blocks) == 0 else 1


def _cut(kind: Projections | Leveled | None, tile: Tile, rows: int, columns: int, target: Target) -> dict[str, Any]:
    """What both kernels take of a tile, of matrices of so many rows and columns."""
    few = isinstance(kind, Leveled)
    cells = max(tile.columns, layout_pairs.STEP) // PER_CELL if few else tile.columns // 2
    cut: dict[str, Any] = {
        "ROWS": tile.rows, "CELLS": cells, "PLACES": tile.stages,
        "LOW": layout_pairs.low_bits(kind.format) if isinstance(kind, Leveled) else -1,
        "BANDS": few and layout_pairs.banded(rows, columns), "ASM": target.assembly, "CHAIN": target.chain,
        "num_warps": tile.warps,
    }  # fmt: skip
    if target.chain:
        cut["launch_pdl"] = True
    if target.assembly and not few:
        cut["ptx_options"] = COMPILED
    if target.assembly and tile.registers:
        cut["maxnreg"] = tile.registers
    return cut


def _cells(matrix: Tensor) -> Tensor:
    """Two numbers an integer."""
    return matrix.view(torch.int32)
