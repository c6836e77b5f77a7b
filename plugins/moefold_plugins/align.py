"""Putting the neurons of experts that are to be merged in one order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moefold import Aligned, Context, Experts, Groups, Stage, hookimpl, stage


@stage("align", keep="until read")
def align(experts: Experts, groups: Groups, context: Context) -> Aligned:
    """Permute each expert's neurons to match those of its group's first; what it computes does not change.

    Matching is the Hungarian method on the inner products of neurons, a neuron being its rows of gate and up and its
    column of down (M-SMoE, arXiv 2310.01334, section 3.2; ZipIt, arXiv 2305.03053, for weights instead of activations).
    It takes time cubic in the inner size: seconds for 2,048 neurons, many minutes for 14,336.
    """
    out = experts.to(context.device)
    found = Aligned(out.gate_up.clone(), out.down.clone(), out.gate_up_bias, out.down_bias, out.gated, out.route)
    if found.gate_up_bias is not None:
        found = replace(found, gate_up_bias=found.gate_up_bias.clone())
    for first, *others in groups.members:
        for expert in others:
            _permute(found, expert, matching(found, first, expert))
    return found


def matching(experts: Experts, first: int, other: int) -> Tensor:
    """For each neuron of expert `first` the neuron of `other` that goes with it: a permutation, [inner] int64."""
    inner = experts.inner
    agreement = torch.zeros(inner, inner, dtype=torch.float64, device=experts.down.device)
    for name, weights in experts.matrices().items():
        one, two = weights[first].float(), weights[other].float()
        agreement += (one.T @ two if name == "down_proj" else one @ two.T).double()
    _, order = linear_sum_assignment(agreement.cpu().numpy(), maximize=True)
    return torch.from_numpy(order)


def _permute(experts: Experts, expert: int, order: Tensor) -> None:
    order = order.to(experts.down.device)
    for name, weights in experts.matrices().items():
        weights[expert] = weights[expert][:, order] if name == "down_proj" else weights[expert][order]
    if experts.gate_up_bias is not None:
        parts = experts.gate_up_bias[expert].view(-1, experts.inner)  # gate, then up
        experts.gate_up_bias[expert] = parts[:, order].flatten()


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [align]
