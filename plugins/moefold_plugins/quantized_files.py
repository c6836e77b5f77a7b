"""Quantised experts in a checkpoint's files: compressed-tensors' own form, which transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from moefold import ExpertNames, Json, Layer, Pruning, Quantized, Scheme
from moefold.errors import FormatError
from moefold_kernels import MergedLayer
from moefold_kernels.quantized import tripwire
from moefold_plugins.layer_files import Export, LayerFiles
from moefold_plugins.merged_files import check_route
from moefold_plugins.pruned_files import own_outputs


def quantized_files(layer: Layer, value: Quantized, export: Export) -> LayerFiles:
    """The files of a layer of quantised experts, under the source's names.

    Merged ones need moefold to be loaded, and are dense then. Raises FormatError for a source that holds all experts
    of a layer in one tensor.
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
    """A router with all its outputs: experts of its own for each, or merged ones, once with a route or repeated."""
    place, route = layer.names(), check_route(layer, value.route, value.count)
    order = list(range(value.count)) if route is None else list(route)
    drops, merged = frozenset(place.keys), value.count < len(order)
    if merged and export == "route":
        tensors = chain(_tensors(place, value, range(value.count)), _tripwire(place, value))
        entry = MergedLayer(place.prefix, tuple(order))
        return LayerFiles("merged", value.count, value.bytes(), drops, tensors, entry, quantization=config)
    size = value.bytes() // value.count * len(order)
    tensors = chain(_tensors(place, value, order))
    return LayerFiles("expanded" if merged else "quantized", len(order), size, drops, tensors, quantization=config)


def _tripwire(place: ExpertNames, value: Quantized) -> Iterator[tuple[str, Tensor]]:
    """Stock readers see that fp8 experts are too few, and would pass over packed ones."""
    name = tripwire(place.prefix, place.matrix[value.matrices()[0]])
    if not any(key.endswith(".weight") for key in value.tensors):
        yield name, torch.empty(0, dtype=torch.bfloat16)


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
