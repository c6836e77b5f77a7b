"""What merging any two experts of a layer would cost, before any is merged: what a budget chooses pairs by.

A pair's cost is predicted as `pair.by_error` does it (pair_errors): sharing one magnitude between two weights, neurons
in the cheaper of two orders, is an error of known size, and calibration says what it does to the layer's output. Here
it is the mean over all tokens of the layer, so that a rarely used expert costs little; an expert's tokens are blended
with `blend` of the layer's, which count as its own. Errors of rounding to few bits come on top, by the mean square of
what is read. Compensation, which the merge does later, takes its share of all of it: damages are for comparing pairs,
not for believing.

Layers are put beside each other by the squared length of the residual stream behind them (`stream`), which differs
23-fold in the five layers of the shipped model: the loss that merging all of a layer cost on unseen modules was 0.1
(the first layer) and 0.6 to 1.1 times its damage in this unit (2026-11-28).
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

import torch
from pydantic import Field
from torch import Tensor

from moefold import (
    Codec,
    Context,
    Experts,
    Layer,
    Levels,
    LevelTable,
    PairDamage,
    Routed,
    Stage,
    StreamedModel,
    Text,
    hookimpl,
    stage,
)
from moefold.errors import InputError
from moefold_kernels import layout_pairs
from moefold_kernels.layout_pairs import GROUP
from moefold_plugins.codecs import Exponent
from moefold_plugins.compensated import Blend, Format
from moefold_plugins.finite import finite
from moefold_plugins.moments import Calibration
from moefold_plugins.pair_codecs import Pair4, Pair5, Pair6, Pair8, sample
from moefold_plugins.pair_errors import costs_and_reads, pair_errors, spaced_neurons
from moefold_plugins.visits import visits

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Exponent, Pair8, Pair6, Pair5, Pair4)}
"""The formats that a plan can name, the most exact one first."""

FORMATS: tuple[str, ...] = get_args(Format)
SAMPLES = 4
"""Of the calibration text, that go through the whole decoder layer once more."""


@stage("damage.pairs", version=2)
def damage_pairs(
    layer: Layer,
    text: Text,
    routed: Routed,
    experts: Experts,
    table: LevelTable | None,
    context: Context,
    *,
    sample: Annotated[
        int, Field(ge=1, description="neurons of each expert, evenly spaced, that stand for all: bounds the time")
    ] = 128,
    blend: Blend = 1024.0,
) -> PairDamage:
    """Predict what merging every two of a layer's experts would cost, in each format."""
    if experts.route is not None:
        raise InputError("damage.pairs predicts for the model's own experts, not for merged ones")
    experts = experts.to(context.device)
    found = pair_errors(experts, Calibration(layer, routed, experts, blend), sample, "usage", costs_and_reads)
    scale = experts.inner / len(spaced_neurons(experts.inner, sample)) / len(routed.tokens)
    cost, *reads = (scale * figure for figure in found.figures.float().unbind(dim=-1))
    noise = [_rounding(weights, table) for weights in (experts.gate_up, experts.down)]
    matrices = experts.matrices().values()
    said = "what merging experts would cost, by their weights and activations, is"
    return PairDamage(
        damage={
            name: finite(cost + sum(n.get(name, 0.0) * read for n, read in zip(noise, reads, strict=False)), said)
            for name in CODECS  # one expert alone has no pairs, and nothing is read
        },
        tokens=torch.tensor(found.tokens),
        peak=_peaks(layer, routed, experts).cpu(),
        stream=_stream(layer, text, routed, context.device),
        weights=sum(matrix[0].numel() for matrix in matrices),
        expert_bytes=sum(matrix[0].numel() * matrix.element_size() for matrix in matrices),
        pair_bytes={name: sum(codec().size(*m.shape[1:]) for m in matrices) for name, codec in CODECS.items()},
    )


def _peaks(layer: Layer, routed: Routed, experts: Experts) -> Tensor:
    """The largest output of each expert over its tokens, by magnitude: [expert]."""
    found = torch.zeros(experts.count, device=experts.down.device)
    for visit in visits(routed, experts, experts.down.device):
        inner = layer.activate(experts, visit.expert, visit.tokens)
        bias = None if experts.down_bias is None else experts.down_bias[visit.expert].to(inner.dtype)
        output = torch.nn.functional.linear(inner, experts.down[visit.expert], bias)
        found[visit.expert] = torch.maximum(found[visit.expert], output.abs().amax())
    return found


def _stream(layer: Layer, text: Text, routed: Routed, device: torch.device) -> float:
    """Mean squared length of what the decoder layer gives, over some samples: what an error in it is small against."""
    ids, hidden = (part[:SAMPLES].to(device) for part in (text.tokens.long(), routed.layer_input))
    streamed = StreamedModel(layer.checkpoint, device)
    with streamed.loaded(layer.number):
        given = streamed.through(layer.number, ids, hidden)
    return float(given.float().square().sum(dim=-1).mean())


def _rounding(weights: Tensor, table: LevelTable | None) -> dict[str, float]:
    """Of few-bit formats, the mean squared error of rounding merged magnitudes, in units of their mean square."""
    units = sample(weights, 1 << 16) if len(weights) > 1 else torch.empty(0)
    units = units[: len(units) // GROUP * GROUP].view(-1, GROUP)
    enough = units if len(units) > 64 else units.repeat(64, 1)  # tiny models: of too few magnitudes none can be learnt
    found: dict[str, float] = {}
    for name, bits in layout_pairs.MAGNITUDE_BITS.items():
        if len(units):
            levels = table.levels(bits) if table else Levels.learn(enough, bits)
            grid = levels.on(units.device)
            read = grid.round(units, grid.scale(units)[:, None])[1]
            found[name] = float((read - units).square().mean() / units.square().mean())
    return found


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [damage_pairs]
