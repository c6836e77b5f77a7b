"""Experts that go, with their rows of the router: what is saved is a stock checkpoint with fewer experts."""

from __future__ import annotations

import random
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moefold import Activity, Context, Experts, Json, Layer, Pruning, Reduced, Routed, Stage, hookimpl, stage
from moefold.artifacts import as_index
from moefold.errors import InputError
from moefold_plugins.finite import finite
from moefold_plugins.grouping import Count, Fraction
from moefold_plugins.visits import visits


@stage("prune.by_use", keep="until read")
def prune_by_use(layer: Layer, activity: Activity, *, experts: Count = None, fraction: Fraction = 0.5) -> Reduced:
    """The experts to which the fewest tokens are routed go."""
    return _pruned(layer, layer.experts(), activity.tokens.double(), experts, fraction)


@stage("prune.reap", keep="until read")
def prune_reap(
    layer: Layer, routed: Routed, context: Context, *, experts: Count = None, fraction: Fraction = 0.5
) -> Reduced:
    """The experts that add least to the tokens routed to them go (REAP, arXiv 2510.13999).

    Saliency: the mean over an expert's tokens of its gate weight times the norm of its output; 0 where it has none.
    """
    own = layer.experts(context.device)
    return _pruned(layer, own, _saliency(layer, own, routed), experts, fraction)


@stage("prune.random", keep="until read")
def prune_random(
    layer: Layer,
    *,
    experts: Count = None,
    fraction: Fraction = 0.5,
    seed: Annotated[int, Field(description="with the layer's number, decides which experts go")] = 0,
) -> Reduced:
    """Random experts go: what every other choice has to beat."""
    count = layer.expert_count
    order = random.Random(f"{seed} {layer.number}").sample(range(count), count)
    ranks = torch.empty(count, dtype=torch.float64)
    ranks[as_index(order)] = torch.arange(count, 0, -1, dtype=torch.float64)
    return _pruned(layer, layer.experts(), ranks, experts, fraction, shown=False)


def _saliency(layer: Layer, experts: Experts, routed: Routed) -> Tensor:
    """Mean of g_e(x) ||f_e(x)|| over the tokens routed to each expert: [expert] float64."""
    totals, counts = (torch.zeros(experts.count, dtype=torch.float64, device=experts.down.device) for _ in range(2))
    for expert, tokens, gates, _ in visits(routed, experts, experts.down.device):
        totals[expert] += (gates * layer.output(experts, expert, tokens).float().norm(dim=1)).double().sum()
        counts[expert] += len(tokens)
    return finite((totals / counts.clamp(min=1)).cpu(), "the saliency of experts is")


def _pruned(
    layer: Layer, own: Experts, saliency: Tensor, remain: int | None, fraction: float, *, shown: bool = True
) -> Reduced:
    """The experts of the largest saliency, of each of the router's groups as many; of equals the lower number stays."""
    if len(saliency) != own.count:
        raise InputError(
            f"layer {layer.number} has {own.count} experts and these figures are of {len(saliency)}; pruning starts "
            "from the model's own experts: let observe read those"
        )
    pruning = Pruning(layer)
    groups = pruning.groups
    share = _remaining(pruning, remain, fraction) // len(groups)
    ranked = (sorted(group, key=lambda expert: (-float(saliency[expert]), expert)) for group in groups)
    kept = sorted(expert for group in ranked for expert in group[:share])
    route = torch.full((own.count,), -1, dtype=torch.int64)
    route[as_index(kept)] = torch.arange(len(kept))
    figures: dict[str, Json] = {"saliency": saliency.tolist()} if shown else {}
    return Reduced(
        own.gate_up[kept],
        own.down[kept],
        None if own.gate_up_bias is None else own.gate_up_bias[kept],
        None if own.down_bias is None else own.down_bias[kept],
        own.gated,
        route if len(kept) < own.count else None,
        [[expert] for expert in kept],
        figures,
    )


def _remaining(pruning: Pruning, remain: int | None, fraction: float) -> int:
    """How many experts stay; a fraction is rounded so that each of the router's groups keeps as many."""
    groups = pruning.groups
    total = sum(map(len, groups))
    wanted = max(1, round(total * fraction / len(groups))) * len(groups) if remain is None else remain
    if wanted != total:
        pruning.check(wanted)
    return wanted


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [prune_by_use, prune_reap, prune_random]
