"""What merging any two experts of a layer would cost, before any is merged: what a budget chooses pairs by.

Sharing one magnitude between two weights is an error of known size (pair_coding, the best of three), and calibration
says what an error in a column of a matrix does to the layer's output. For the tokens t that reach expert e with gate
weights g_te, and its hidden activations h = act(u), u = W x, a squared error of weight (r, k) adds to the output's

    down:           mean_t g^2 h_k^2
    gate and up:    mean_t g^2 x_k^2 * |D_r|^2 * mean_t g^2 h_r^2 / mean_t g^2 u_r^2

where the latter takes a relative error of u_r as one of h_r: exact for an up projection, near for SiLU and GELU of a
gate. Means are over all tokens of the layer, so a rarely used expert costs little; few tokens are blended with the
layer's own as in moments. Errors of rounding to few bits come on top, by the mean square of what is read. Compensation,
which the merge does later, takes its share of all of it: damages are for comparing pairs, not for believing.

Layers are put beside each other by the squared length of the residual stream behind them (`stream`): the loss that
merging all of a layer cost was 0.7 to 1.9 times its damage in this unit in the five layers of the shipped model, whose
streams differ 23-fold (2026-11-24).
"""

from __future__ import annotations

from dataclasses import dataclass
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
from moefold_plugins.pair_codecs import Pair4, Pair5, Pair6, Pair8, sample
from moefold_plugins.visits import visits

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Exponent, Pair8, Pair6, Pair5, Pair4)}
"""The formats that a plan can name, the most exact one first."""

FORMATS: tuple[str, ...] = get_args(Format)
TYPICAL = 1024
"""Tokens, evenly spaced over the layer's, that stand for all where an expert saw few of its own."""
SAMPLES = 4
"""Of the calibration text, that go through the whole decoder layer once more."""
BLOCK = 1 << 24
"""About so many positions are compared at a time."""


@stage("damage.pairs", version=2)
def damage_pairs(
    layer: Layer,
    text: Text,
    routed: Routed,
    experts: Experts,
    table: LevelTable | None,
    context: Context,
    *,
    rows: Annotated[
        int, Field(ge=1, description="of each matrix, evenly spaced, that stand for all: bounds the time")
    ] = 256,
    blend: Blend = 256.0,
) -> PairDamage:
    """Predict what merging every two of a layer's experts would cost, in each format."""
    if experts.route is not None:
        raise InputError("damage.pairs predicts for the model's own experts, not for merged ones")
    if not len(routed.tokens):
        raise InputError(f"layer {layer.number}: no calibration tokens; give forward a text of at least one sample")
    experts = experts.to(context.device)
    seen = Seen(layer, routed, experts, blend)
    total = {name: torch.zeros(experts.count, experts.count, device=context.device) for name in CODECS}
    for weights, columns, by_row in seen.stacks():
        step = max(1, weights.shape[1] // rows)
        scale = weights.shape[1] / len(range(0, weights.shape[1], step))
        shared, read = _shared(weights[:, ::step], columns, by_row[:, ::step])
        noise = _rounding(weights, table)
        for name, sum_ in total.items():
            sum_ += scale * (shared + noise.get(name, 0.0) * read)
    matrices = experts.matrices().values()
    said = "what merging experts would cost, by their weights and activations, is"
    return PairDamage(
        damage={name: finite(sum_, said).cpu() for name, sum_ in total.items()},
        tokens=seen.tokens,
        peak=seen.peak.cpu(),
        stream=_stream(layer, text, routed, context.device),
        weights=sum(matrix[0].numel() for matrix in matrices),
        expert_bytes=sum(matrix[0].numel() * matrix.element_size() for matrix in matrices),
        pair_bytes={name: sum(codec().size(*m.shape[1:]) for m in matrices) for name, codec in CODECS.items()},
    )


def _stream(layer: Layer, text: Text, routed: Routed, device: torch.device) -> float:
    """Mean squared length of what the decoder layer gives, over some samples: what an error in it is small against."""
    ids, hidden = (part[:SAMPLES].to(device) for part in (text.tokens.long(), routed.layer_input))
    streamed = StreamedModel(layer.checkpoint, device)
    with streamed.loaded(layer.number):
        given = streamed.through(layer.number, ids, hidden)
    return float(given.float().square().sum(dim=-1).mean())


@dataclass
class _Sums:
    """Of one kind of vector, by expert: mean over the layer's tokens of g^2 v_k^2."""

    inputs: Tensor  # [expert, hidden]
    before: Tensor  # [expert, gate and up rows]
    inner: Tensor  # [expert, inner]


class Seen:
    """What calibration says of a layer's experts."""

    def __init__(self, layer: Layer, routed: Routed, experts: Experts, blend: float) -> None:
        self.layer, self.experts = layer, experts
        count, device = experts.count, experts.down.device
        widths = (experts.gate_up.shape[2], experts.gate_up.shape[1], experts.inner)
        self.sums = _Sums(*(torch.zeros(count, width, device=device) for width in widths))
        self.tokens = torch.zeros(count, dtype=torch.int64)
        self.peak = torch.zeros(count, device=device)
        gates = torch.zeros(count, device=device)
        for visit in visits(routed, experts, device):
            self._add(visit.expert, visit.tokens, visit.gates, look=True)
            self.tokens[visit.expert] += len(visit.tokens)
            gates[visit.expert] += visit.gates.square().sum()
        self._blend(routed, blend, gates)

    def _add(self, expert: int, tokens: Tensor, gates: Tensor, look: bool = False) -> None:
        inner = self.layer.activate(self.experts, expert, tokens)
        before = _linear(tokens, self.experts.gate_up, self.experts.gate_up_bias, expert)
        weight = gates.square()[:, None]
        for total, values in (
            (self.sums.inputs, tokens),
            (self.sums.before, before),
            (self.sums.inner, inner),
        ):
            total[expert] += (values.float().square() * weight).sum(dim=0)
        if look:
            output = _linear(inner, self.experts.down, self.experts.down_bias, expert)
            self.peak[expert] = torch.maximum(self.peak[expert], output.abs().amax())

    def _blend(self, routed: Routed, blend: float, gates: Tensor) -> None:
        """Let an expert of n tokens lean on the layer's by blend / (n + blend), as if they were its own."""
        typical = routed.tokens[:: max(1, len(routed.tokens) // TYPICAL)].to(gates.device)
        layer_gate = float(routed.top_k_weights.float().square().mean())
        for expert, count in enumerate(self.tokens.tolist()):
            share = count / (count + blend) if count else 0.0
            gate = float(gates[expert]) / count if count else layer_gate
            for total in vars(self.sums).values():
                total[expert] *= share
            each = max(count, 1) * (1 - share) * gate / len(typical)
            if each:
                self._add(expert, typical, torch.full((len(typical),), each**0.5, device=gates.device))
        for total in vars(self.sums).values():
            total /= len(routed.tokens)

    def stacks(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Weights [expert, rows, columns], and what a squared error costs: the product of [columns] and [rows]."""
        experts, sums = self.experts, self.sums
        length = experts.down.float().square().sum(dim=1)  # [expert, inner]: |D_r|^2
        each = (length * sums.inner).repeat(1, 2 if experts.gated else 1)
        by_row = each / sums.before.clamp(min=torch.finfo(torch.float32).tiny)
        by_row = torch.where(sums.before > 0, by_row, 0)
        one = torch.ones(experts.down.shape[:2], device=length.device)
        return [(experts.gate_up, sums.inputs, by_row), (experts.down, sums.inner, one)]


def _linear(values: Tensor, weights: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    return torch.nn.functional.linear(
        values.to(weights.dtype), weights[expert], None if bias is None else bias[expert].to(weights.dtype)
    )


def _shared(weights: Tensor, columns: Tensor, by_row: Tensor) -> tuple[Tensor, Tensor]:
    """Of every two experts: the cost of the best of three choices, and that of an error as large as what is read."""
    count, height, width = weights.shape
    cost, read = (torch.zeros(count, count, device=weights.device) for _ in range(2))
    step = max(1, BLOCK // (height * width))
    for first in range(count - 1):
        a, c = weights[first].float().abs(), by_row[first][:, None] * columns[first]  # [rows, columns]
        for start in range(first + 1, count, step):
            some = slice(start, min(start + step, count))
            b, d = weights[some].float().abs(), by_row[some][:, :, None] * columns[some][:, None]
            best, seen = _best(a, b, c, d)
            cost[first, some] = cost[some, first] = best.sum(dim=(1, 2))
            read[first, some] = read[some, first] = seen.sum(dim=(1, 2))
    return cost, read


def _best(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """For magnitudes a, b whose squared errors cost c, d: the least cost, and that of reading it all wrong."""
    both = (c + d).clamp(min=torch.finfo(torch.float32).tiny)
    mean = (c * a + d * b) / both
    costs = torch.stack([c * d / both * (a - b).square(), d * b.square(), (c * a.square()).expand_as(b)])
    reads = torch.stack([both * mean.square(), (c * a.square()).expand_as(b), d * b.square()])
    least, which = costs.min(dim=0)
    return least, reads.gather(0, which[None])[0]


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
