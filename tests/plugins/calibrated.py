"""A tiny model's first layer, and made-up tokens that were routed to some of its experts."""

from __future__ import annotations

from pathlib import Path

import torch

from models import tiny
from moefold import Checkpoint, Layer, Routed


def first_layer(family: str, folder: Path) -> Layer:
    """Of two; it has 8 experts, hidden size 64."""
    return Checkpoint.open(str(tiny(family, folder / "m", num_hidden_layers=2))).layers()[0]


def routed_to(experts: int, tokens: int) -> Routed:
    """Random tokens, each routed to two of the first so many experts."""
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(tokens, 64, generator=generator).bfloat16()
    index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :2]
    return Routed(values[None], values, index, torch.rand(tokens, 2, generator=generator))
