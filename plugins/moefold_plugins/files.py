"""What the files of a checkpoint hold where a layer's routed experts were replaced: one function for each kind."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moefold import Experts, Layer, Packed, Quantized, Reduced, Replacement
from moefold.errors import FormatError
from moefold_kernels import PackedLayer, layout, reference_pairs
from moefold_kernels.checkpoint import FORMATS
from moefold_plugins.layer_files import Export, LayerFiles
from moefold_plugins.merged_files import check_route, merged_files
from moefold_plugins.pruned_files import cut, pruned_files
from moefold_plugins.quantized_files import quantized_files


def layer_files(layer: Layer, value: Replacement, export: Export = "route") -> LayerFiles | None:
    """The files of a layer whose experts `value` replaces; None where it replaces nothing (a skipped layer)."""
    if isinstance(value, Packed):
        return _packed(layer, value, export)
    if isinstance(value, Reduced):
        return pruned_files(layer, value) if value.pruned else merged_files(layer, value, export)
    if isinstance(value, Quantized):
        return quantized_files(layer, value, export)
    raise FormatError(f"save does not know how to write {type(value).__name__}; give it what a pack.* stage makes")


def _packed(layer: Layer, value: Packed, export: Export) -> LayerFiles | None:
    pruned = -1 in (value.route or ())
    if not value.pairs:  # skipped by the packer; merged or pruned before, it is still not the source's
        if value.route is None or layer.number in layer.checkpoint.packed_layers:
            return None
        return pruned_files(layer, _unpaired(value)) if pruned else merged_files(layer, _unpaired(value), export)
    if value.format not in FORMATS:
        raise FormatError(f"format {value.format} has no checkpoint layout; save knows {', '.join(FORMATS)}")
    if export == "expanded":
        raise FormatError(
            f"layer {layer.number}: packed experts have no form that stock readers know; drop `export: expanded`, or "
            "save what was merged before it was packed"
        )
    place = layer.names()
    pairs = tuple((first, second) for first, second in value.pairs)
    matrix = {name: place.matrix[name] for name in value.words}
    count = 2 * len(pairs) + len(value.dense)
    route = None if pruned else check_route(layer, value.route, count)
    exponent = value.format == layout.EXPONENT
    window = value.settings if exponent else {}
    levels = {} if exponent else {name: tuple(each["levels"]) for name, each in value.settings.items()}
    entry = PackedLayer(place.prefix, window, pairs, tuple(value.dense), matrix, value.format, route, levels)
    drops = frozenset((*place.keys, *(place.biases if value.biases else ())))
    files = LayerFiles("packed", count, value.bytes(), drops, _packed_tensors(layer, entry, value), entry)
    return cut(layer, files, torch.tensor(value.route)) if pruned else files


def _packed_tensors(layer: Layer, entry: PackedLayer, value: Packed) -> Iterator[tuple[str, Tensor]]:
    for matrix, words in value.words.items():
        for pair in range(len(value.pairs)):
            parts = {"words": words[pair]}
            if value.format != layout.EXPONENT:
                columns = value.settings[matrix]["columns"]
                planes = reference_pairs.from_record(value.format, words[pair], columns)
                parts = reference_pairs.stored(value.format, planes, columns)
            yield from ((entry.packed(pair, matrix, part), tensor) for part, tensor in parts.items())
        for number in range(len(value.dense)):
            yield entry.alone(number, matrix), value.experts[matrix][number]
    yield entry.tripwire, torch.empty(0, dtype=torch.bfloat16)
    if value.biases:
        yield from layer.stored_biases(value.biases["gate_up_bias"], value.biases["down_bias"])


def _unpaired(value: Packed) -> Experts:
    """Experts that were merged or pruned and then all left alone."""
    order = torch.tensor(value.dense).argsort()
    *up, down = (weights[order] for weights in value.experts.values())
    return Experts(torch.cat(up, dim=1), down, **value.biases, gated=len(up) > 1, route=torch.tensor(value.route))
