"""Putting the neurons of experts that are to be merged in one order."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moefold import Aligned, Context, Experts, Groups, Stage, hookimpl, stage
from moefold_plugins.neurons import reorder


@stage("align", keep="never")
def align(
    experts: Experts,
    groups: Groups,
    context: Context,
    *,
    method: Annotated[
        Literal["greedy", "hungarian"],
        Field(description="greedy: best pairs first, on the device; hungarian: the best sum, cubic in time"),
    ] = "greedy",
) -> Aligned:
    """Permute each expert's neurons to match those of its group's first; what it computes does not change.

    A neuron is its rows of gate and up and its column of down; how alike two are is their inner product (M-SMoE, arXiv
    2310.01334, section 3.2, matches by the Hungarian method).
    """
    out = experts.to(context.device)
    bias = None if out.gate_up_bias is None else out.gate_up_bias.clone()
    found = Aligned(out.gate_up.clone(), out.down.clone(), bias, out.down_bias, out.gated, out.route)
    for first, *others in groups.members:
        for expert in others:
            agreement = neurons(found, first, expert)
            reorder(found, expert, best_sum(agreement) if method == "hungarian" else best_first(agreement))
    return found


def neurons(experts: Experts, first: int, other: int) -> Tensor:
    """How alike the neurons of two experts are: [neuron of first, neuron of other] float32."""
    agreement = torch.zeros(experts.inner, experts.inner, device=experts.down.device)
    for name, weights in experts.matrices().items():
        one, two = weights[first].float(), weights[other].float()
        agreement += one.T @ two if name == "down_proj" else one @ two.T
    return agreement


def best_sum(agreement: Tensor) -> Tensor:
    """For each row the column that goes with it, the sum being the largest possible: a permutation, [row] int64."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and plugins load with every command

    _, order = linear_sum_assignment(agreement.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(order)


def best_first(agreement: Tensor) -> Tensor:
    """The same by taking the largest entry, then the largest in what is left, and so on.

    Every round takes all entries that are the largest of their row and of their column, which is the same matching
    in a few dozen rounds instead of as many as there are rows.
    """
    left = agreement.clone()
    order = torch.full((len(left),), -1, dtype=torch.int64, device=left.device)
    rows = torch.arange(len(left), device=left.device)
    while bool((order < 0).any()):
        column = left.argmax(dim=1)
        agreed = (order < 0) & (left.argmax(dim=0)[column] == rows)
        order[agreed] = column[agreed]
        left[agreed] = -torch.inf
        left[:, column[agreed]] = -torch.inf
    return order


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [align]
