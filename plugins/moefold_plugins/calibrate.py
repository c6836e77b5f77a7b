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
from moefold.errors import StageError
from moefold_plugins.finite import REMEDY, finite, is_finite
from moefold_plugins.visits import visits

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
            parts = (streamed.through(number, i, h) for i, h in _batches(ids, hidden, batch))
            hidden = torch.cat([finite(part, f"what decoder layer {number} gives is").cpu() for part in parts])
    with streamed.loaded(layer.number, with_experts=False):
        entered = [streamed.entering(layer.number, i, h) for i, h in _batches(ids, hidden, batch)]
    for tokens, _, weights in entered:
        finite(tokens, "what enters the experts is")
        finite(weights, "the router's weights are")
    tokens, index, weights = (torch.cat([part.cpu() for part in parts]) for parts in zip(*entered, strict=True))
    return Routed(hidden, tokens, index, weights)


def _batches(ids: Tensor, hidden: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for i, h in zip(ids.split(batch), hidden.split(batch), strict=True):
        yield i, h.to(ids.device)


@stage("observe", version=2)
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
    experts = experts.to(context.device)
    counts = torch.zeros(experts.count, dtype=torch.int64)
    squares = [torch.zeros(experts.count, n, device=context.device) for n in (routed.tokens.shape[1], experts.inner)]
    for visit in visits(routed, experts, context.device):
        counts[visit.expert] += len(visit.tokens)
        _add_squares(squares, layer, experts, visit.expert, visit.tokens)
    starved = (counts < minimum).nonzero().flatten().tolist()
    typical = routed.tokens[:: max(1, len(routed.tokens) // TYPICAL)].to(context.device)
    for expert in starved:
        for total in squares:
            total[expert] = 0
        _add_squares(squares, layer, experts, expert, typical, minimum / len(typical))
    if broken := [expert for expert in range(experts.count) if not all(is_finite(total[expert]) for total in squares)]:
        raise StageError(f"what experts {', '.join(map(str, broken))} multiply is not finite; {REMEDY}")
    input_norm, inner_norm = (total.sqrt().cpu() for total in squares)
    return Activity(counts, input_norm, inner_norm, len(routed.tokens), minimum, starved)


def _add_squares(
    squares: list[Tensor], layer: Layer, experts: Experts, expert: int, tokens: Tensor, scale: float = 1.0
) -> None:
    """Add the squares, per column, of what an expert's matrices multiply for these tokens."""
    for total, values in zip(squares, (tokens, layer.activate(experts, expert, tokens)), strict=True):
        total[expert] += values.float().square().sum(dim=0) * scale


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [forward, observe]
