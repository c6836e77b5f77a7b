"""Which experts to pair."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Annotated, Any

import networkx
import torch
from pydantic import Field

from moefold import Activity, Context, Experts, Groups, Layer, Reduced, Routed, Similarity, Stage, hookimpl, stage
from moefold_plugins.compensated import Blend, Weigh
from moefold_plugins.matching import perfect
from moefold_plugins.moments import Calibration
from moefold_plugins.pair_errors import pair_errors

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
    the neurons in the cheaper of two orders (pair_errors). With the diagonal of the inverse in place of the moments'
    (GPTQ, arXiv 2210.17323, equation 2), which says what is left once other columns have made up for an error, pairs
    were no better.
    """
    if _skips(layer, skip) or experts.count < 2:
        return _pairs([], experts.count, fraction, skipped=True)
    experts = experts.to(context.device)
    total = pair_errors(experts, Calibration(layer, routed, experts, blend), sample, weigh).figures[..., 0]
    pairs = sorted(perfect(total, range(experts.count)), key=lambda pair: (float(total[pair]), pair))
    return replace(_pairs(pairs, experts.count, fraction, skipped=False), costs=total.float())


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [pair_random, pair_by_usage, pair_similar, pair_by_error]
