"""Going over a layer's calibration tokens expert by expert, a chunk of tokens on the device at a time.

A chunk's choices are sorted by expert once, and the host waits for the device once a chunk: on a GPU, seeking each
expert's tokens among the chunk's took longer than what was then done with them (128 experts, a millisecond each).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moefold import Experts, Routed

CHUNK = 32768
"""Tokens of a layer on the device at a time: bounds memory, and changes no result but by summation order."""

HELD = 8
"""The share of a GPU's free memory, one in so many, that all of a layer's tokens may take to stay on it."""

ACTIVATED = 1 << 28
"""Of tokens that lie on a GPU, rows of gate and up times tokens in one visit: what is computed of them is bounded."""


class Visit(NamedTuple):
    """Tokens of one chunk that reach one expert, each once."""

    expert: int
    tokens: Tensor  # [token, hidden]
    gates: Tensor  # [token] float32: weights of a token's choices that mean this expert, added up
    rows: Tensor  # [token] int64: which of the layer's tokens they are


class _Sorted(NamedTuple):
    """A chunk's tokens by expert, in the order asked for, and by number."""

    rows: Tensor  # [visited] int64
    gates: Tensor  # [visited] float32
    counts: list[int]


def held(routed: Routed, device: torch.device) -> Routed:
    """The same with its tokens on a GPU, for several passes over them, where they take little of what it has free."""
    size = routed.tokens.numel() * routed.tokens.element_size()
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] // HELD:
        return routed
    parts = {name: getattr(routed, name).to(device) for name in ("tokens", "top_k_index", "top_k_weights")}
    return replace(routed, **parts)


def visits(
    routed: Routed, experts: Experts, device: torch.device, only: Sequence[int] | None = None
) -> Iterator[Visit]:
    """The tokens of every expert, or of some `only`, chunk after chunk; experts that it does not reach are left out.

    Tokens that lie on a GPU (`held`) are one chunk, and an expert that many of them reach is visited several times.
    """
    reached, members = routed.reaches(experts), range(experts.count) if only is None else only
    step, most = _steps(routed, experts)
    for start in range(0, len(routed.tokens), step):
        chunk = slice(start, start + step)
        tokens = routed.tokens[chunk].to(device)
        weights = routed.top_k_weights[chunk].to(device).float()
        found = _sorted(reached[chunk].to(device), weights, experts.count, members)
        own = zip(members, found.rows.split(found.counts), found.gates.split(found.counts), strict=True)
        for expert, rows, gates in own:
            pieces = zip(rows.split(most), gates.split(most), strict=True) if len(rows) else ()
            yield from (Visit(expert, tokens[some], weights, some + start) for some, weights in pieces)


def _steps(routed: Routed, experts: Experts) -> tuple[int, int]:
    """How many tokens a chunk has, and a visit at most."""
    if not _resident(routed):
        return CHUNK, CHUNK
    return max(1, len(routed.tokens)), max(1, min(CHUNK, ACTIVATED // experts.gate_up.shape[1]))


def _resident(routed: Routed) -> bool:
    return routed.tokens.is_cuda


def _sorted(chosen: Tensor, weights: Tensor, count: int, members: Sequence[int]) -> _Sorted:
    """Sort choices [token, top_k] of `count` experts by place among the `members`."""
    each = chosen.split(1, dim=1)
    gates = torch.stack([(weights * (chosen == one)).sum(dim=1) for one in each], dim=1)  # [token, choice]
    again = torch.stack([(chosen[:, :i] == one).any(dim=1) for i, one in enumerate(each)], dim=1)  # meant before it
    places = torch.full((count,), len(members), device=chosen.device)
    places[torch.as_tensor(list(members), device=chosen.device)] = torch.arange(len(members), device=chosen.device)
    place = places[chosen].masked_fill(again, len(members)).flatten()
    counts = torch.bincount(place, minlength=len(members) + 1).tolist()[:-1]
    order = place.argsort(stable=True)[: sum(counts)]
    return _Sorted(order // chosen.shape[1], gates.flatten()[order], counts)
