"""A packed layer's experts out of a checkpoint's files, decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from moefold_kernels import layout, layout_pairs, reference_pairs
from moefold_kernels.checkpoint import PackedLayer
from moefold_kernels.errors import FormatError
from moefold_kernels.reference import decode


def read_layer(
    get: Callable[[str], Tensor],
    layer: PackedLayer,
    dtype: torch.dtype | None = None,
    matrices: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """The decoded matrices of every expert (all of them, or `matrices`), in the order before packing.

    Standard name -> [expert, rows, columns].

    `get` gives a tensor by its name in the files; it is asked for one pair's matrix at a time. `dtype` is the
    experts' (default: that of the experts left alone, bfloat16 where there are none).
    """
    return {matrix: _read_matrix(get, layer, matrix, dtype) for matrix in matrices or layer.matrix}


def fuse(matrices: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(gate_up [expert, 2 * inner, hidden], down [expert, hidden, inner]) of `read_layer`'s matrices."""
    up = matrices["up_proj"]
    gate_up = torch.cat([matrices["gate_proj"], up], dim=1) if "gate_proj" in matrices else up
    return gate_up, matrices["down_proj"]


def _read_matrix(get: Callable[[str], Tensor], layer: PackedLayer, matrix: str, dtype: torch.dtype | None) -> Tensor:
    first = {part: get(layer.packed(0, matrix, part)) for part in layer.parts}
    stored = get(layer.alone(0, matrix)).dtype if layer.dense else torch.bfloat16
    rows, columns = _shape(get, layer, matrix, tuple(first["words"].shape))
    out = first["words"].new_empty(layer.experts, rows, columns, dtype=dtype or stored)
    for index, pair in enumerate(layer.pairs):
        parts = {part: get(layer.packed(index, matrix, part)) for part in layer.parts} if index else first
        for part, tensor in parts.items():
            if tensor.shape != first[part].shape:
                shapes = f"{list(tensor.shape)}, that of pair 0 {list(first[part].shape)}"
                name = layer.packed(index, matrix, part)
                raise FormatError(f"{name} is {shapes}; the checkpoint is damaged, download or save it again")
        for slot, expert in enumerate(pair):
            out[expert] = _decode(layer, matrix, parts, columns, slot)
    for number, expert in enumerate(layer.dense):
        out[expert] = get(layer.alone(number, matrix))
    return out


def _shape(get: Callable[[str], Tensor], layer: PackedLayer, matrix: str, words: tuple[int, ...]) -> tuple[int, int]:
    """A matrix's rows and columns; words of few bits do not tell by themselves how far a row is padded."""
    if layer.format == layout.EXPONENT:
        return words[0], words[1]
    down = matrix == "down_proj"
    other = tuple(get(layer.packed(0, "up_proj" if down else "down_proj")).shape)
    try:
        inner, hidden = layout_pairs.layer_sizes(*((other, words) if down else (words, other)))
    except FormatError as error:
        raise FormatError(f"{layer.prefix}: {error}; the checkpoint is damaged, download or save it again") from error
    return (hidden, inner) if down else (inner, hidden)


def _decode(layer: PackedLayer, matrix: str, parts: Mapping[str, Tensor], columns: int, slot: int) -> Tensor:
    if layer.format == layout.EXPONENT:
        return decode(parts["words"], layer.window[matrix], slot)
    return reference_pairs.decode(layer.format, parts, layer.levels[matrix], columns, slot)
