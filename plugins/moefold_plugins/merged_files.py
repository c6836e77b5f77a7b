"""Merged experts in a checkpoint's files: fewer in the source's own form and a route, or repeated for stock readers."""

from __future__ import annotations

from moefold import Experts, Layer
from moefold.artifacts import tensor_bytes
from moefold.errors import FormatError
from moefold_kernels import MergedLayer
from moefold_plugins.layer_files import Export, LayerFiles


def merged_files(layer: Layer, value: Experts, export: Export) -> LayerFiles:
    """A layer of merged experts; in stock form where nothing was merged, too, because as many experts need no route."""
    route = check_route(layer, None if value.route is None else value.route.tolist(), value.count)
    order = list(range(value.count)) if route is None else list(route)
    size = tensor_bytes(value.gate_up) + tensor_bytes(value.down)
    whole = export == "expanded" or value.count == len(order)
    tensors = layer.stored(value, order if whole else None)
    place = layer.names()
    dtype = layer.checkpoint.header(place.keys[0])[1]
    if value.down.dtype != dtype:
        raise FormatError(
            f"layer {layer.number}: the merged experts are {value.down.dtype}, the source's {dtype}; a stage that "
            "merges gives them in the source's dtype"
        )
    drops = frozenset((*place.keys, *place.biases))
    if whole:
        kind = "merged" if value.count == len(order) else "expanded"
        return LayerFiles(kind, len(order), size // value.count * len(order), drops, tensors)
    return LayerFiles("merged", value.count, size, drops, tensors, MergedLayer(place.prefix, tuple(order)))


def check_route(layer: Layer, route: list[int] | None, count: int) -> tuple[int, ...] | None:
    """A route, if it leads every output of the layer's router to one of `count` experts, and to each at least one."""
    outputs = layer.router_outputs
    given = list(range(count)) if route is None else route
    if -1 in given:
        raise FormatError(
            f"layer {layer.number} was pruned before it was packed, for which save has no form; save the pruned model, "
            "and pack that"
        )
    if len(given) != outputs or set(given) != set(range(count)):
        led = "no route" if route is None else f"a route of {len(given)} entries onto {len(set(given))}"
        raise FormatError(
            f"layer {layer.number}: {count} experts with {led} come in place of those of {outputs} router outputs; a "
            "stage that merges leads each output to an expert, and one at least to each"
        )
    return None if route is None else tuple(route)
