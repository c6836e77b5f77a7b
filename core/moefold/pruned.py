"""Experts of which some router outputs are gone: what is left of a layer, in memory and in files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moefold.artifacts import Experts
from moefold.errors import CheckpointError

if TYPE_CHECKING:
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


def beside_experts(skeleton: Skeleton, number: int, outputs: Tensor) -> dict[str, Tensor]:
    """What the files of a layer hold for each expert beside the experts: of each such tensor what is left of it.

    Router rows, mostly, and vectors with a value for each expert. Raises CheckpointError where it cannot be told.
    """
    prefix, path = f"{skeleton.layers}.{number}.", f"{skeleton.experts[number]}."
    persistent, left = skeleton.model.state_dict().keys(), {}
    for name, axis in skeleton.narrow(len(outputs)).axes.items():
        if name in persistent and name.startswith(prefix) and not name.startswith(path):
            source = skeleton.sources.find(name)
            if source.converter is not None or len(source.all_keys) != 1:
                raise CheckpointError(
                    f"{skeleton.where}: {name} is made of {source.all_keys[0]} in a way that moefold cannot reverse; "
                    "save the model with transformers' save_pretrained first, and give that directory"
                )
            key = source.all_keys[0]
            left[key] = skeleton.checkpoint.tensor(key).index_select(axis, outputs.cpu())
    return left
