"""Quantised experts in a checkpoint's files: compressed-tensors' own form, which transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from moefold import ExpertNames, Json, Layer, Pruning, Quantized, Scheme
from moefold.errors import FormatError
from moefold_plugins.layer_files import Export, LayerFiles
from moefold_plugins.merged_files import check_route
from moefold_plugins.pruned_files import own_outputs


def quantized_files(layer: Layer, value: Quantized, export: Export) -> LayerFiles:
    """The files of a layer of quantised experts, under the source's names.

    Raises FormatError for a source that holds all experts of a layer in one tensor, and for merged experts.
    """
    place = layer.names()
    if place.fused:
        raise FormatError(
            f"layer {layer.number}: the source holds all experts in one tensor, for which compressed-tensors has no "
            "form; save without quantize"
        )
    config = Scheme(value.scheme, value.group).to_config(place.prefix.rpartition(".")[2])
    return _pruned(layer, value, config) if value.pruned else _whole(layer, value, export, config)


def _whole(layer: Layer, value: Quantized, export: Export, config: Mapping[str, Json]) -> LayerFiles:
    """As many experts as the router has outputs: none was merged, or each is repeated."""
    place, route = layer.names(), check_route(layer, value.route, value.count)
    order = list(range(value.count)) if route is None else list(route)
    if export == "route" and value.count < len(order):
        raise FormatError(
            f"layer {layer.number}: merged experts need moefold's own route in config.json, which has room for one "
            "method only; write `export: expanded` to repeat them, or quantise without merging"
        )
    return LayerFiles(
        kind="quantized" if value.count == len(order) else "expanded",
        experts=len(order),
        bytes=value.bytes() // value.count * len(order),
        drops=frozenset(place.keys),
        tensors=_tensors(place, value, order),
        quantization=config,
    )


def _pruned(layer: Layer, value: Quantized, config: Mapping[str, Json]) -> LayerFiles:
    """Fewer experts, and a router with as many outputs."""
    place, pruning = layer.names(), Pruning(layer)
    beside = pruning.beside(own_outputs(layer, torch.tensor(value.route), value.count))
    return LayerFiles(
        kind="pruned",
        experts=value.count,
        bytes=value.bytes(),
        drops=frozenset([*place.keys, *beside]),
        tensors=chain(beside.items(), _tensors(place, value, range(value.count))),
        config=pruning.config(value.count),
        quantization=config,
    )


def _tensors(place: ExpertNames, value: Quantized, order: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """Number i in the files is expert `order[i]`; copies, because safetensors refuses what shares memory."""
    for name, tensor in value.tensors.items():
        matrix, _, end = name.partition(".")
        for number, expert in enumerate(order):
            yield f"{place.prefix}.{number}.{place.matrix[matrix]}.{end}", tensor[expert].clone()
