"""What the files hold of a layer whose experts were pruned: a stock layer with fewer experts."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch

from moefold import Experts, Layer, Pruning
from moefold.artifacts import tensor_bytes
from moefold.errors import FormatError
from moefold_plugins.layer_files import LayerFiles


def pruned_files(layer: Layer, value: Experts) -> LayerFiles:
    """Experts numbered anew, and all else that `cut` changes; `value.route` says which router outputs are gone (-1)."""
    place, size = layer.names(), tensor_bytes(value.gate_up) + tensor_bytes(value.down)
    files = LayerFiles("pruned", value.count, size, frozenset((*place.keys, *place.biases)), layer.stored(value))
    return cut(layer, files, value.route)


def cut(layer: Layer, files: LayerFiles, route: torch.Tensor | None) -> LayerFiles:
    """The same files for a router with only the outputs that are left, and their number in config.json."""
    outputs = own_outputs(layer, route, files.experts)
    pruning = Pruning(layer)
    beside = pruning.beside(outputs)
    return replace(
        files,
        drops=files.drops | beside.keys(),
        tensors=chain(beside.items(), files.tensors),
        config=pruning.config(files.experts),
    )


def own_outputs(layer: Layer, route: torch.Tensor | None, count: int) -> torch.Tensor:
    """The router outputs that are left, each of which must mean one of `count` experts of its own."""
    if route is None:
        raise FormatError(f"layer {layer.number}: these experts are not pruned")
    outputs = (route >= 0).nonzero().flatten()
    if route[outputs].tolist() != list(range(count)):
        raise FormatError(
            f"layer {layer.number} was pruned and its experts were merged as well, for which save has no form; "
            "prune or merge, or save the pruned model and merge that"
        )
    return outputs.cpu()
