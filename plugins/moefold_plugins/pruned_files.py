"""What the files hold of a layer whose experts were pruned: a stock layer with fewer experts."""

from __future__ import annotations

import torch

from moefold import Layer, Pruning, Reduced
from moefold.errors import FormatError
from moefold_plugins.layer_files import LayerFiles


def pruned_files(layer: Layer, value: Reduced) -> LayerFiles:
    """Experts numbered anew, whatever else has something for each expert cut alike, their number in config.json."""
    outputs = own_outputs(layer, value.route, value.count)
    place, pruning = layer.names(), Pruning(layer)
    beside = pruning.beside(outputs)
    return LayerFiles(
        "pruned",
        value.count,
        value.bytes(),
        frozenset([*place.keys, *place.biases, *beside]),
        [*beside.items(), *layer.stored(value)],
        config=pruning.config(value.count),
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
