"""Going over a layer's calibration tokens expert by expert, a chunk of tokens on the device at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moefold import Experts, Routed

CHUNK = 32768
"""Tokens of a layer on the device at a time: bounds memory, and changes no result but by summation order."""


class Visit(NamedTuple):
    """The tokens of one chunk that reach one expert, each once."""

    expert: int
    tokens: Tensor  # [token, hidden]
    gates: Tensor  # [token] float32: weights of a token's choices that mean this expert, added up
    rows: Tensor  # [token] int64: which of the layer's tokens they are


def visits(
    routed: Routed, experts: Experts, device: torch.device, only: Sequence[int] | None = None
) -> Iterator[Visit]:
    """The tokens of every expert, or of some `only`, chunk after chunk; experts that it does not reach are left out."""
    reached = routed.reaches(experts)
    for start in range(0, len(routed.tokens), CHUNK):
        chunk = slice(start, start + CHUNK)
        tokens, chosen = routed.tokens[chunk].to(device), reached[chunk].to(device)
        weights = routed.top_k_weights[chunk].to(device).float()
        counts = torch.bincount(chosen.flatten(), minlength=experts.count).tolist()
        for expert in (e for e in (range(experts.count) if only is None else only) if counts[e]):
            hits = chosen == expert
            rows = hits.any(dim=1).nonzero().flatten()
            yield Visit(expert, tokens[rows], (weights[rows] * hits[rows]).sum(dim=1), rows + start)
