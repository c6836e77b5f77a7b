"""Which experts to pair."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Annotated, Any

import networkx
import torch
from pydantic import Field
from torch import Tensor

from moefold import Activity, Context, Experts, Groups, Layer, Reduced, Routed, Similarity, Stage, hookimpl, stage
from moefold_plugins.compensated import Blend, Weigh, chunks
from moefold_plugins.matching import matchings
from moefold_plugins.moments import Calibration
from moefold_plugins.neurons import Neurons, gathered, ranked, total
from moefold_plugins.pair_merging import usages
from moefold_plugins.targets import row_weights

AT_ONCE = 1 << 26
"""Elements of pairs whose errors are computed together."""

Fraction = Annotated[
    float, Field(ge=0, le=1, description="share of the layer's experts that take part; the others stay as they are")
]
Skip = Annotated[list[int], Field(description="decoder layers that stay as they are")]


def _skips(layer: Layer, skip: list[int]) -> bool:
    """Whether the layer stays as it is; raises InputError where `skip` names one that has no experts."""
    if skip:
        layer.checkpoint.check_layers(skip)
    return layer.number in skip


def _pairs(order: list[tuple[int, int]], count: int, fraction: float, skipped: bool) -> Groups:
    """The first pairs that the fraction allows, in the order given (none in a skipped layer); everyone else alone."""
    chosen = [] if skipped else [sorted(pair) for pair in order[: round(count * fraction) // 2]]
    paired = {expert for pair in chosen for expert in pair}
    return Groups(sorted(chosen), [e for e in range(count) if e not in paired])


@stage("pair.random")
def pair_random(
    layer: Layer,
    merged: Reduced | None,
    *,
    seed: Annotated[int, Field(description="another seed, other pairs")] = 0,
    fraction: Fraction = 1.0,
    skip: Skip = [],  # noqa: B006  (pydantic copies defaults)
) -> Groups:
    """Random pairs, as published (PuzzleMoE, arXiv 2511.04805); the same on every machine for a seed and a layer.

    Of the merged experts, where a stage merged them before.
    """
    count = layer.expert_count if merged is None else merged.count
    order = random.Random(f"{seed} {layer.number}").sample(range(count), count)
    pairs = list(zip(order[0::2], order[1::2], strict=False))
    return _pairs(pairs, count, fraction, _skips(layer, skip))


@stage("pair.by_usage")
def pair_by_usage(
    layer: Layer,
    activity: Activity,
    *,
    fraction: Fraction = 1.0,
    skip: Skip = [],  # noqa: B006
) -> Groups:
    """Pair the busiest expert with the rarest, the second busiest with the second rarest, and so on."""
    count = len(activity.tokens)
    order = torch.argsort(activity.tokens, descending=True, stable=True).tolist()
    pairs = [(order[i], order[count - 1 - i]) for i in range(count // 2)]
    return _pairs(pairs, count, fraction, _skips(layer, skip))


@stage("pair.similar")
def pair_similar(
    layer: Layer,
    similarity: Similarity,
    *,
    fraction: Fraction = 1.0,
    skip: Skip = [],  # noqa: B006
) -> Groups:
    """The perfect matching whose pairs are most alike in sum (maximum-weight matching); the most alike pairs first."""
    matrix = similarity.matrix
    count = len(matrix)
    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, j, float(matrix[i, j])) for i in range(count) for j in range(i))
    matched = networkx.max_weight_matching(graph, maxcardinality=True)
    pairs = sorted((tuple(sorted(p)) for p in matched), key=lambda p: (-float(matrix[p[0], p[1]]), p))
    return _pairs(pairs, count, fraction, _skips(layer, skip))


@stage("pair.by_error", version=2)
def pair_by_error(
    layer: Layer,
    routed: Routed,
    experts: Experts,
    context: Context,
    *,
    sample: Annotated[
        int,
        Field(ge=1, description="neurons of each expert, evenly spaced, that stand for all: bounds the time"),
    ] = 128,
    weigh: Weigh = "usage",
    blend: Blend = 1024.0,
    fraction: Fraction = 1.0,
    skip: Skip = [],  # noqa: B006
) -> Groups:
    """The perfect matching whose compensated merges are predicted to cost least; the cheapest pairs first.

    For puzzlemoe.compensated, with the same `weigh` and `blend`. A pair's cost is that of the best of three choices,
    summed over weights, with what a squared error costs by the diagonal of the moments (neurons), where the busiest
    neurons of one expert are merged with the rarest of the other, or all in their own order where that costs less.
    With the diagonal of the inverse instead (GPTQ, arXiv 2210.17323, equation 2), which says what is left once other
    columns have made up for an error, pairs were no better.
    """
    if _skips(layer, skip) or experts.count < 2:
        return _pairs([], experts.count, fraction, skipped=True)
    experts = experts.to(context.device)
    total = _errors(experts, Calibration(layer, routed, experts, blend), sample, weigh)
    pairs = sorted(matchings(total, range(experts.count))[0], key=lambda pair: (float(total[pair]), pair))
    return replace(_pairs(pairs, experts.count, fraction, skipped=False), costs=total.float())


def _errors(experts: Experts, calibration: Calibration, sample: int, weigh: str) -> Tensor:
    """The predicted cost of every two experts: [expert, expert] on the CPU."""
    natural, falling, rising = _neurons(experts, calibration, sample, weigh)
    found = torch.zeros(experts.count, experts.count, dtype=torch.float64, device=experts.down.device)
    step = max(1, AT_ONCE // falling.size[0].numel())
    for first in range(experts.count - 1):
        for start in range(first + 1, experts.count, step):
            some = slice(start, start + step)
            orders = (natural, natural), (falling, rising)
            ways = [total(_part(one, first), _part(other, some)) for one, other in orders]
            found[first, some] = found[some, first] = torch.minimum(*ways).double()
    return found.cpu()


def _part(neurons: Neurons, some: int | slice) -> Neurons:
    return Neurons(neurons.size[some], neurons.row[some], neurons.column[some])


def _neurons(experts: Experts, calibration: Calibration, sample: int, weigh: str) -> list[Neurons]:
    """Some neurons of every expert: in their own order, by falling energy, by rising energy."""
    found: tuple[list[Neurons], ...] = [], [], []
    natural = torch.arange(experts.inner, device=experts.down.device)
    spaced = natural[:: max(1, experts.inner // sample)]
    for chunk in chunks([[expert] for expert in range(experts.count)], experts):
        members = [expert for part in chunk for expert in part]
        seen = calibration.inputs(members)
        some = Experts(experts.gate_up[members], experts.down[members], gated=experts.gated)
        usage = usages(seen.tokens, calibration.blend, weigh).to(seen.x.device)
        rows, orders = row_weights(some, seen), ranked(some, seen)
        for place in range(len(members)):
            for each, order in zip(found, (natural, orders[place], orders[place].flip(0)), strict=True):
                each.append(gathered(some, place, order[spaced], seen, rows, usage))
    return [Neurons(*map(torch.stack, zip(*each, strict=True))) for each in found]


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [pair_random, pair_by_usage, pair_similar, pair_by_error]
