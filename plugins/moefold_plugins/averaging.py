"""Groups of experts become their average; what MergeMoE starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moefold import Activity, Context, Experts, Groups, Json, Reduced, Stage, hookimpl, stage
from moefold.errors import InputError
from moefold_plugins.finite import finite


@stage("average", keep="until read")
def average(experts: Experts, groups: Groups, context: Context) -> Reduced:
    """The plain mean of a group's weights."""
    experts = experts.to(context.device)
    return averaged(experts, groups, {expert: 1.0 for group in groups.all() for expert in group})


@stage("msmoe", keep="until read")
def msmoe(experts: Experts, groups: Groups, activity: Activity, context: Context) -> Reduced:
    """The mean of a group's weights, each by its share of the group's tokens (M-SMoE, arXiv 2310.01334).

    Published with neurons aligned first: let `align` read the groups and name it here (`needs: {experts: align}`).
    """
    return averaged(experts.to(context.device), groups, usage(groups, activity))


def usage(groups: Groups, activity: Activity) -> dict[int, float]:
    """Each expert's routed tokens as its share of the group's; equal shares in a group that saw none.

    Raises InputError unless the activity is of the experts that are grouped.
    """
    check_groups(groups.all(), len(activity.tokens))
    shares: dict[int, float] = {}
    for group in groups.all():
        counts = {expert: float(activity.tokens[expert]) for expert in group}
        total = sum(counts.values())
        shares |= {expert: count / total if total else 1 / len(group) for expert, count in counts.items()}
    return shares


def averaged(experts: Experts, groups: Groups, weights: Mapping[int, float], figures: Json = None) -> Reduced:
    """One expert a group: the mean of its members by `weights` (of any scale), in the dtype of the experts.

    Raises InputError unless the groups hold every expert once.
    """
    every = groups.all()
    check_groups(every, experts.count)

    def mean(tensor: Tensor) -> Tensor:
        out = tensor.new_empty(len(every), *tensor.shape[1:])
        for row, group in zip(out, every, strict=True):
            row.copy_(finite(_mean(tensor, group, weights), f"the mean of experts {', '.join(map(str, group))} is"))
        return out

    up, down = experts.gate_up_bias, experts.down_bias
    return Reduced(
        mean(experts.gate_up),
        mean(experts.down),
        None if up is None else mean(up),
        None if down is None else mean(down),
        experts.gated,
        route(every, experts),
        every,
        dict(figures or {}),
    )


def route(groups: list[list[int]], experts: Experts) -> Tensor:
    """The merged expert that each router output means, also where the experts were merged before: [output] int64."""
    place = torch.empty(experts.count, dtype=torch.int64)
    for number, group in enumerate(groups):
        place[group] = number
    return place if experts.route is None else place[experts.route.cpu()]


def check_groups(groups: list[list[int]], count: int) -> None:
    """Raise InputError unless every expert is in one group."""
    members = sorted(expert for group in groups for expert in group)
    if members != list(range(count)):
        raise InputError(
            f"the groups name {len(members)} experts, and there are {count}, each of which has to be in one group; "
            "let the group.* stage and observe read the experts that this stage reads"
        )


def _mean(tensor: Tensor, group: list[int], weights: Mapping[int, float]) -> Tensor:
    if len(group) == 1:
        return tensor[group[0]]
    total = sum(weights[expert] for expert in group)
    mean = torch.zeros(tensor.shape[1:], dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)
    for expert in group:
        mean.add_(tensor[expert], alpha=weights[expert] / total)
    return mean.to(tensor.dtype)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [average, msmoe]
