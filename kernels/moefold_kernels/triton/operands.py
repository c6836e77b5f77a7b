"""What the operations of torch take: one layer's experts as plain tensors and numbers, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from moefold_kernels import layout, layout_pairs
from moefold_kernels.errors import FormatError
from moefold_kernels.levels import INTEGERS
from moefold_kernels.triton.weights import Biases, Leveled, Planes, Projections, Weights, check_rows, contiguous

INDICES = (torch.int32, torch.int64)


class Operands(NamedTuple):
    """One layer's experts, in the order of the operations' arguments. Pairs, experts alone, or both; `gated` or not."""

    gate_up_packed: Tensor | None  # [pair, 2 * inner, hidden] int16, gate rows before up rows ([pair, inner, hidden])
    down_packed: Tensor | None  # [pair, hidden, inner] int16
    gate_up_dense: Tensor | None  # [alone, 2 * inner, hidden] float (or [alone, inner, hidden]); computed with as bf16
    down_dense: Tensor | None  # [alone, hidden, inner] float
    gate_up_bias: Tensor | None  # [expert, 2 * inner] (or [expert, inner]), by original expert
    down_bias: Tensor | None  # [expert, hidden]
    places: Tensor  # [expert] int32: 2 * pair + slot, or after all pairs the number among those alone
    placed: Tensor  # [place] int32: the inverse
    tops: Sequence[int]
    """The windows' tops of gate, up and down (without a gate the first is not looked at)."""
    gated: bool
    interleaved: bool
    """Whether `gate_up_bias` alternates gate and up, as gpt-oss has it, rather than all of gate before up."""
    format: str = layout.EXPONENT
    """Of the pairs. In the few-bit formats (layout_pairs.py) `..._packed` are the nibble planes, int32, with"""
    gate_up_low: Tensor | None = None  # [pair, 2 * inner, words] int32, or in bands; not in pair4
    down_low: Tensor | None = None
    gate_up_scale: Tensor | None = None  # [pair, 2 * inner, groups] int16, or in bands
    down_scale: Tensor | None = None
    levels: Tensor | None = None  # [3, INTEGERS] int32: levels.py, of gate, up and down
    coded: bool = False
    """Whether all levels are e4m3 numbers times a factor (levels.coded)."""


def sample(operands: Operands) -> tuple[Tensor, Tensor]:
    """Gate-up and down of either kind, for their sizes."""
    kinds = (
        (operands.gate_up_packed, operands.down_packed),
        (operands.gate_up_dense, operands.down_dense),
    )
    for gate_up, down in kinds:
        if gate_up is not None and down is not None:
            return gate_up, down
    raise FormatError("a layer needs gate_up and down, of pairs (packed), of experts alone (dense), or both")


def check(
    operands: Operands,
    hidden: Tensor | None,
    top_k_index: Tensor,
    top_k_weights: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """Raise FormatError unless everything fits; looks at shapes, strides and types only."""
    outer, inner = sizes(operands)
    wide = (2 if operands.gated else 1) * inner
    n_experts = len(operands.places)
    if top_k_index.dim() != 2 or top_k_index.dtype not in INDICES:
        raise FormatError(f"top_k_index: [token, top_k] of int32 or int64, not {_is(top_k_index)}")
    tokens, top_k = top_k_index.shape
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("hidden", hidden, (tokens, outer)),
        ("rows", rows, (tokens * top_k, inner)),
        ("top_k_weights", top_k_weights, (tokens, top_k)),
        *_packed(operands, wide, outer, inner),
        ("gate_up_dense", operands.gate_up_dense, (_length(operands.gate_up_dense), wide, outer)),
        ("down_dense", operands.down_dense, (_length(operands.gate_up_dense), outer, inner)),
        ("gate_up_bias", operands.gate_up_bias, (n_experts, wide)),
        ("down_bias", operands.down_bias, (n_experts, outer)),
        ("placed", operands.placed, (n_experts,)),
    ]
    for name, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise FormatError(f"{name} is {_is(tensor)}, and the other operands want {list(shape)}")
    few, words = operands.format != layout.EXPONENT, (operands.gate_up_packed, operands.down_packed)
    tables = operands.places, operands.placed, operands.gate_up_low, operands.down_low, operands.levels
    halves = (operands.gate_up_scale, operands.down_scale, *(() if few else words))
    for kind, tensors in ((torch.int16, halves), (torch.int32, (*tables, *(words if few else ())))):
        if bad := [tensor for tensor in tensors if tensor is not None and tensor.dtype != kind]:
            raise FormatError(
                f"words are int16 and tables of places int32 (in few-bit formats words are int32, scales int16); one "
                f"of them is {_is(bad[0])}"
            )
    for name in ("gate_up_dense", "down_dense", *(() if few else ("gate_up_packed", "down_packed"))):
        if (matrices := getattr(operands, name)) is not None:
            check_rows(name, matrices)
    for name in ("places", "placed", "levels"):
        if (table := getattr(operands, name)) is not None and not table.is_contiguous():
            raise FormatError(f"{name} has strides {tuple(table.stride())}: give {name}.contiguous()")
    if (operands.gate_up_bias is None) != (operands.down_bias is None):
        raise FormatError("biases are those of both projections, or none")
    if 2 * _length(operands.gate_up_packed) + _length(operands.gate_up_dense) != n_experts:
        raise FormatError(f"places has {n_experts} experts, which the pairs and the experts alone do not make up")


def sizes(operands: Operands) -> tuple[int, int]:
    """(hidden, inner)."""
    gate_up, down = sample(operands)
    rows = gate_up.shape[1] // (2 if operands.gated else 1)
    if gate_up is not operands.gate_up_packed or operands.format == layout.EXPONENT:
        return down.shape[1], rows
    try:
        inner, hidden = layout_pairs.layer_sizes((rows, gate_up.shape[2]), tuple(down.shape[1:]))
    except FormatError as error:
        raise FormatError(
            f"gate_up_packed is {_is(gate_up)} and down_packed is {_is(down)}, no nibble planes of one layer"
        ) from error
    return hidden, inner


def _packed(operands: Operands, wide: int, outer: int, inner: int) -> list[tuple[str, Tensor | None, tuple[int, ...]]]:
    """What is packed, with the shapes it must have; FormatError where a plane is missing."""
    pairs = _length(operands.gate_up_packed)
    if operands.format == layout.EXPONENT:
        matrices = (("gate_up", wide, outer), ("down", outer, inner))
        return [(f"{name}_packed", getattr(operands, f"{name}_packed"), (pairs, *size)) for name, *size in matrices]
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [("levels", operands.levels, (3, INTEGERS))]
    for name, fused, rows, columns in (("gate_up", 1 + operands.gated, inner, outer), ("down", 1, outer, inner)):
        for part, (lines, width) in layout_pairs.stored(operands.format, rows, columns).items():
            called = f"{name}_{'packed' if part == 'words' else part}"
            wanted.append((called, getattr(operands, called), (pairs, fused * lines, width)))
    if missing := [name for name, tensor, _ in wanted if tensor is None and pairs]:
        raise FormatError(f"{operands.format} needs {missing[0]}")
    return wanted


def _length(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[0]


def _is(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def weights(operands: Operands) -> Weights:
    """The layer as the kernels take it: views, but for experts alone that are not bfloat16."""
    few = operands.format != layout.EXPONENT
    packed = (_leveled if few else _projections)(operands.gate_up_packed, operands.down_packed, operands)
    alone = _projections(_bfloat16(operands.gate_up_dense), _bfloat16(operands.down_dense), operands)
    return Weights(packed, alone, operands.places, operands.placed, _biases(operands))


def _leveled(gate_up: Tensor | None, down: Tensor | None, operands: Operands) -> Leveled | None:
    wide, narrow, levels = operands.gate_up_scale, operands.down_scale, operands.levels
    if gate_up is None or down is None or not len(down) or wide is None or narrow is None or levels is None:
        return None
    above, below = contiguous(Planes(gate_up, operands.gate_up_low, wide)), Planes(down, operands.down_low, narrow)
    hidden, inner = sizes(operands)
    return Leveled(operands.format, above, contiguous(below), levels, operands.gated, inner, hidden, operands.coded)


def _projections(gate_up: Tensor | None, down: Tensor | None, operands: Operands) -> Projections | None:
    if gate_up is None or down is None or not len(down):
        return None
    inner = down.shape[2]
    gate, up = (gate_up[:, :inner], gate_up[:, inner:]) if operands.gated else (None, gate_up)
    return Projections(gate, up, down, cast(Any, tuple(operands.tops)))


def _biases(operands: Operands) -> Biases | None:
    both, down = operands.gate_up_bias, operands.down_bias
    if both is None or down is None:
        return None
    if not operands.gated:
        return Biases(None, both, down)
    inner = both.shape[1] // 2
    gate, up = (both[:, 0::2], both[:, 1::2]) if operands.interleaved else (both[:, :inner], both[:, inner:])
    return Biases(gate, up, down)


def _bfloat16(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.to(torch.bfloat16)
