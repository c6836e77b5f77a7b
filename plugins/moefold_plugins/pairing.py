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
from moefold_plugins.compensated import Blend, Damping, Weigh, chunks
from moefold_plugins.compensation import factor
from moefold_plugins.matching import matchings
from moefold_plugins.moments import Calibration

AT_ONCE = 1 << 26
"""Elements of pairs whose errors are computed together."""

Fraction = Annotated[
    float, Field(ge=0, le=1, description="share of the layer's experts that take part; the others stay as they are")
]
Skip = Annotated[list[int], Field(description="decoder layers that stay as they are")]


def _skips(layer: Layer, skip: list[int]) -> bool:
    """Whether the layer stays as it is; raises InputError where `skip` names one that has no experts."""
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
    rows: Annotated[
        int, Field(ge=1, description="of each matrix, evenly spaced, that stand for all: bounds the time")
    ] = 256,
    weigh: Weigh = "usage",
    blend: Blend = 256.0,
    damping: Damping = 0.01,
    fraction: Fraction = 1.0,
    skip: Skip = [],  # noqa: B006
) -> Groups:
    """The perfect matching whose compensated merges are predicted to cost least; the cheapest pairs first.

    For puzzlemoe.compensated, with the same `weigh`, `blend` and `damping`. An error in column k of expert e costs
    n_e / (H_e^-1)_kk: what is left of it when all other columns make up for it as well as they can (GPTQ, arXiv
    2210.17323, equation 2). A pair's cost is the sum over elements of the least of sharing their mean and keeping one.
    """
    if _skips(layer, skip) or experts.count < 2:
        return _pairs([], experts.count, fraction, skipped=True)
    experts = experts.to(context.device)
    costs = _column_costs(Calibration(layer, routed, experts, blend), experts, damping, weigh)
    total = torch.zeros(experts.count, experts.count, dtype=torch.float64)
    for weights, cost in zip((experts.gate_up, experts.down), costs, strict=True):
        some = weights[:, :: max(1, weights.shape[1] // rows)]
        total += _errors(some, cost) * (weights.shape[1] / some.shape[1])
    pairs = sorted(matchings(total, range(experts.count))[0], key=lambda pair: (float(total[pair]), pair))
    return replace(_pairs(pairs, experts.count, fraction, skipped=False), costs=total.float())


def _column_costs(calibration: Calibration, experts: Experts, damping: float, weigh: str) -> tuple[Tensor, Tensor]:
    """What a squared error in a column of gate and up, and of down, costs once it is made up for: [expert, columns]."""
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for chunk in chunks([[expert] for expert in range(experts.count)], experts):
        moments = calibration.moments([expert for part in chunk for expert in part])
        usage = [float(max(n, 1)) if weigh == "usage" else 1.0 for n in moments.tokens]
        for costs, moment in zip(found, (moments.x, moments.h), strict=True):
            factors = factor(moment, damping)
            for unit, cost, share in zip(factors.unit, factors.cost, usage, strict=True):
                eye = torch.eye(len(unit), device=unit.device)
                inverse = torch.linalg.solve_triangular(unit, eye, upper=True, unitriangular=True)
                costs.append(share / (inverse.square() / cost[:, None]).sum(dim=0))
    return torch.stack(found[0]), torch.stack(found[1])


def _errors(weights: Tensor, cost: Tensor) -> Tensor:
    """The least cost of every two experts, from weights [expert, rows, columns]: [expert, expert] on the CPU."""
    count, size = len(weights), weights.float().abs()
    alone = size.square() * cost[:, None]
    found = torch.zeros(count, count, dtype=torch.float64, device=weights.device)
    step = max(1, AT_ONCE // size[0].numel())
    for first in range(count):
        for start in range(first + 1, count, step):
            some = slice(start, start + step)
            both = cost[first] * cost[some] / (cost[first] + cost[some])  # an error of the best mean
            shared = (size[some] - size[first]).square_() * both[:, None]
            least = torch.minimum(torch.minimum(shared, alone[some]), alone[first]).sum(dim=(1, 2))
            found[first, some] = found[some, first] = least.double()
    return found.cpu()


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [pair_random, pair_by_usage, pair_similar, pair_by_error]
