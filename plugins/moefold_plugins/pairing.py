"""Which experts to pair."""

from __future__ import annotations

import random
from typing import Annotated, Any

import networkx
import torch
from pydantic import Field

from moefold import Activity, Groups, Layer, Reduced, Similarity, Stage, hookimpl, stage

Fraction = Annotated[
    float, Field(ge=0, le=1, description="share of the layer's experts that take part; the others stay as they are")
]
Skip = Annotated[list[int], Field(description="decoder layers that stay as they are")]


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
    return _pairs(pairs, count, fraction, layer.number in skip)


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
    return _pairs(pairs, count, fraction, layer.number in skip)


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
    return _pairs(pairs, count, fraction, layer.number in skip)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [pair_random, pair_by_usage, pair_similar]
