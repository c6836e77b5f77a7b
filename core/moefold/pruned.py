"""Experts of which some router outputs are gone: what is left of a layer, in memory and in files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moefold.artifacts import Experts
from moefold.errors import CheckpointError

if TYPE_CHECKING:
    from moefold.layer import Layer
    from moefold.skeleton import Skeleton


def kept(experts: Experts) -> Tensor | None:
    """The router outputs that are left, in order; None where none is gone."""
    if experts.route is None or bool((experts.route >= 0).all()):
        return None
    return (experts.route >= 0).nonzero().flatten()


def renumbered(experts: Experts) -> Experts:
    """The same for a router that has only the outputs that are left."""
    outputs = kept(experts)
    if outputs is None or experts.route is None:
        return experts
    route = experts.route[outputs]
    own = torch.equal(route, torch.arange(experts.count, device=route.device))
    return replace(experts, route=None if own else route)


@contextmanager
def standing_in(skeleton: Skeleton, number: int, outputs: Tensor) -> Iterator[None]:
    """Inside, one decoder layer is that of a model whose router has only these outputs; nothing of it is real yet.

    What is filled in it inside is to be cleared inside.
    """
    narrow, path = skeleton.narrow(len(outputs)), f"{skeleton.layers}.{number}"
    layers, own = skeleton.module(skeleton.layers), skeleton.module(path)
    blank, parts = skeleton.blank, skeleton.parts
    layers[number] = narrow.model.get_submodule(path)
    skeleton.blank = blank | {name: t for name, t in narrow.blank.items() if name.startswith(f"{path}.")}
    skeleton.parts = {name: (axis, outputs) for name, axis in narrow.axes.items() if name.startswith(f"{path}.")}
    try:
        yield
    finally:
        layers[number], skeleton.blank, skeleton.parts = own, blank, parts


@dataclass(frozen=True)
class Pruning:
    """What leaving out some of a layer's experts takes: which numbers are possible, and what follows in the files.

    Methods raise CheckpointError for a model of which it cannot be told what follows the number of experts.
    """

    layer: Layer

    @property
    def groups(self) -> list[list[int]]:
        """The router's groups of experts (one group in most models): of each, as many have to remain."""
        from moefold.narrow import expert_groups, total_experts  # transformers is slow to import

        total, (count, _) = total_experts(self._skeleton), expert_groups(self._skeleton)
        size = total // count
        return [list(range(first, first + size)) for first in range(0, total, size)]

    def check(self, count: int) -> None:
        """Raises InputError where the router cannot do with that many experts; says with how many it can."""
        self._skeleton.narrow(count)

    def config(self, count: int) -> dict[str, int]:
        """The keys of config.json (of its text part, for composite models) that say how many experts there are."""
        return self._skeleton.narrow(count).config

    def beside(self, outputs: Tensor) -> dict[str, Tensor]:
        """Of every tensor in the files that has something for each expert, but the experts' own: what is left of it.

        Router rows, mostly, and vectors with a value for each expert; `outputs` are those of the router that are left.
        """
        skeleton, number = self._skeleton, self.layer.number
        prefix, path = f"{skeleton.layers}.{number}.", f"{skeleton.experts[number]}."
        persistent, left = skeleton.model.state_dict().keys(), {}
        for name, axis in skeleton.narrow(len(outputs)).axes.items():
            if name in persistent and name.startswith(prefix) and not name.startswith(path):
                key = self._key(name)
                left[key] = skeleton.checkpoint.tensor(key).index_select(axis, outputs.cpu())
        return left

    @property
    def _skeleton(self) -> Skeleton:
        return self.layer.checkpoint.skeleton

    def _key(self, name: str) -> str:
        source = self._skeleton.sources.find(name)
        if source.converter is not None or len(source.all_keys) != 1:
            raise CheckpointError(
                f"{self._skeleton.where}: {name} is made of {source.all_keys[0]} in a way that moefold cannot reverse; "
                "save the model with transformers' save_pretrained first, and give that directory"
            )
        return source.all_keys[0]
