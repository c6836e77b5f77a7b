"""Pruned layers without calibration, and small checkpoints to prune."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from models import samples, tiny
from moefold import (
    Activity,
    Checkpoint,
    Layers,
    Reduced,
)
from moefold_plugins.pruning import prune_by_use

IDS = samples(4, 24)


def used(layer: Any, counts: list[int] | None = None) -> Activity:
    """An activity of which only the tokens matter; other experts in each layer."""
    generator = torch.Generator().manual_seed(layer.number)
    tokens = torch.randperm(layer.expert_count, generator=generator) if counts is None else torch.tensor(counts)
    return Activity(tokens, torch.ones(len(tokens), 64), torch.ones(len(tokens), 4))


def half(layer: Any) -> Reduced:
    return prune_by_use(layer, used(layer))


def prunings(checkpoint: Checkpoint) -> Layers[Reduced]:
    return Layers({layer.number: partial(half, layer) for layer in checkpoint.layers()})


def kept(value: Reduced) -> list[int]:
    return [expert for (expert,) in value.groups]


class Sources:
    """Small checkpoints by family, made once; 16 experts in 4 groups for DeepSeek, whose router wants two of each."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Checkpoint] = {}

    def __call__(self, family: str) -> Checkpoint:
        if family not in self._made:
            more = {"n_routed_experts": 16} if family == "deepseek_v3" else {}
            path = tiny(family, self._root / family, num_hidden_layers=3, **more)
            self._made[family] = Checkpoint.open(str(path))
        return self._made[family]
