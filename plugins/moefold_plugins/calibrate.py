"""Calibration: what enters each layer's experts, and what merging needs to know of it.

`forward` reads the experts of the layer *before* (`Previous[Experts]`), so calibrating through already compressed
layers is a matter of wiring: `needs: {experts: ID_OF_THE_MERGE}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moefold import Activity, Context, Experts, Layer, Previous, Routed, Stage, StreamedModel, Text, hookimpl, stage

CHUNK = 4096
"""Tokens that one expert sees at a time: bounds memory, and changes no result but by summation order."""

TYPICAL = 1024
"""Tokens, evenly spaced over the layer's, that stand for all when an expert saw too few of its own."""


@stage("forward", keep="until read")
def forward(
    layer: Layer,
    text: Text,
    before: Previous[Routed],
    experts: Previous[Experts],
    context: Context,
    *,
    batch: Annotated[int, Field(ge=1, description="samples in one forward pass; results may differ in rounding")] = 8,
) -> Routed:
    """Carry the calibration text to this layer's experts, one decoder layer in memory at a time."""
    streamed = StreamedModel(layer.checkpoint, context.device)
    ids = text.tokens.long().to(context.device)
    if before is None:
        start, hidden = 0, torch.cat([streamed.embed(part).cpu() for part in ids.split(batch)])
    else:
        start, hidden = layer.checkpoint.layers()[layer.position - 1].number, before.layer_input
    for number in range(start, layer.number):
        own = experts if number == start and before is not None else None
        with streamed.loaded(number, own):
            hidden = torch.cat([streamed.through(number, i, h).cpu() for i, h in _batches(ids, hidden, batch)])
    with streamed.loaded(layer.number, with_experts=False):
        entered = [streamed.entering(layer.number, i, h) for i, h in _batches(ids, hidden, batch)]
    tokens, index, weights = (torch.cat([part.cpu() for part in parts]) for parts in zip(*entered, strict=True))
    return Routed(hidden, tokens, index, weights)


def _batches(ids: Tensor, hidden: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for i, h in zip(ids.split(batch), hidden.split(batch), strict=True):
        yield i, h.to(ids.device)


@stage("observe")
def observe(
    layer: Layer,
    routed: Routed,
    experts: Experts,
    context: Context,
    *,
    minimum: Annotated[
        int, Field(ge=0, description="an expert that saw fewer tokens is named, and takes the layer's statistics")
    ] = 32,
) -> Activity:
    """Count each expert's tokens and take the norms of what its matrices multiply, per input column.

    The L2 norm over routed tokens is Wanda's (arXiv 2306.11695, section 3) and PuzzleMoE's (arXiv 2511.04805): of the
    expert's inputs for gate and up, of its hidden activations for down.
    """
    experts, reached = experts.to(context.device), routed.reaches(experts)
    counts = torch.stack([(reached == expert).any(dim=1).sum() for expert in range(experts.count)])
    input_norm = torch.empty(experts.count, routed.tokens.shape[1])
    inner_norm = torch.empty(experts.count, experts.inner)
    starved = (counts < minimum).nonzero().flatten().tolist()
    typical = routed.tokens[:: max(1, len(routed.tokens) // TYPICAL)]
    for expert in range(experts.count):
        tokens, scale = typical, (minimum / len(typical)) ** 0.5
        if expert not in starved:
            tokens, scale = routed.tokens[(reached == expert).any(dim=1)], 1.0
        squares = [_squares(layer, experts, expert, part.to(context.device)) for part in tokens.split(CHUNK)]
        input_norm[expert] = sum(s[0] for s in squares).sqrt().cpu() * scale  # type: ignore[union-attr]
        inner_norm[expert] = sum(s[1] for s in squares).sqrt().cpu() * scale  # type: ignore[union-attr]
    return Activity(counts, input_norm, inner_norm, len(routed.tokens), minimum, starved)


def _squares(layer: Layer, experts: Experts, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    inner = layer.activate(experts, expert, tokens)
    return tokens.float().square().sum(dim=0), inner.float().square().sum(dim=0)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [forward, observe]
