"""Where a layer's routed experts are in a checkpoint's files, and others in their place, in the same form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from torch import Tensor

from moefold import fused
from moefold.artifacts import Experts
from moefold.errors import CheckpointError
from moefold.layer import ExpertNames
from moefold.skeleton import Skeleton
from moefold.sources import split


def expert_names(skeleton: Skeleton, number: int) -> ExpertNames:
    """Where one layer's routed experts are on disk."""
    path = skeleton.experts[number]
    module = skeleton.module(path)
    weights, biases = fused.parameters(module)[:2], fused.parameters(module)[2:]
    others = tuple(key for name in biases for key in skeleton.sources.find(f"{path}.{name}").all_keys)
    packed = skeleton.checkpoint.packed_layers.get(number)
    if packed is not None:
        keys = tuple(name for name, _ in packed.shapes(0, 0))
        return ExpertNames(packed.prefix, dict(packed.matrix), keys, fused=False, biases=others)
    sources = [skeleton.sources.find(f"{path}.{name}") for name in weights]
    keys = tuple(key for source in sources for key in source.all_keys)
    standard = fused.matrices(module)
    if not all(source.stacks for source in sources):
        return ExpertNames(path, {name: name for name in standard}, keys, fused=True, biases=others)
    first = [split(group[0]) for source in sources for group in source.keys.values()]
    matrix = dict(zip(standard, (name for _, _, name in first), strict=True))
    return ExpertNames(first[0][0], matrix, keys, fused=False, biases=others)


def stored(
    skeleton: Skeleton, number: int, experts: Experts, order: Sequence[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Experts as the files hold this layer's own, biases included; `order[i]` is the one that comes as number i.

    Raises CheckpointError where the layer is packed, or its form is one that moefold cannot write.
    """
    if number in skeleton.checkpoint.packed_layers:
        raise CheckpointError(
            f"{skeleton.checkpoint.path}: the experts of layer {number} are packed, and no others can take their "
            "place; start from the checkpoint that was packed"
        )
    module, every = skeleton.module(skeleton.experts[number]), list(range(experts.count))
    order = every if order is None else list(order)
    place = expert_names(skeleton, number)
    if not place.fused:
        own = fused.biases_in_own_layout(module, experts.gate_up_bias, experts.down_bias)
        return chain(_each(place, experts, order), _whole(skeleton, number, own, order))
    return _whole(skeleton, number, fused.in_own_layout(module, experts), order)


def stored_biases(skeleton: Skeleton, number: int, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The biases alone, in canonical order, as the files hold this layer's own."""
    module = skeleton.module(skeleton.experts[number])
    return _whole(skeleton, number, fused.biases_in_own_layout(module, gate_up, down), list(range(len(down))))


def _each(place: ExpertNames, experts: Experts, order: list[int]) -> Iterator[tuple[str, Tensor]]:
    """A tensor for each expert; repeated ones are copies, because no file takes one memory under two names."""
    for matrix, weights in experts.matrices().items():
        for index, expert in enumerate(order):
            again = expert in order[:index]
            yield (
                f"{place.prefix}.{index}.{place.matrix[matrix]}.weight",
                weights[expert].clone() if again else weights[expert],
            )


def _whole(
    skeleton: Skeleton, number: int, own: Mapping[str, Tensor], order: list[int]
) -> Iterator[tuple[str, Tensor]]:
    """A tensor for all experts."""
    path = skeleton.experts[number]
    for name, tensor in own.items():
        source = skeleton.sources.find(f"{path}.{name}")
        if source.converter is not None or len(source.all_keys) != 1:
            raise CheckpointError(
                f"{skeleton.where}: {path}.{name} is made of {source.all_keys[0]} in a way that moefold cannot "
                "reverse; save the model with transformers' save_pretrained first, and give that directory"
            )
        yield source.all_keys[0], tensor if order == list(range(len(tensor))) else tensor[order]
