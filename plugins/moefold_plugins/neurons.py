"""The neurons of an expert, and their order: a neuron is its rows of gate and up and its column of down.

Another order of an expert's neurons changes nothing that it computes, whatever its gate, which works neuron by neuron.
So which neurons of two experts are merged with each other is free. Merging two of them costs the best of three choices
for every weight (pair_coding), with what a squared error costs by the diagonal of the moments. The neurons of one
expert by falling energy and those of the other by rising energy are cut into blocks, the busiest of one against the
rarest of the other; in each block the assignment is the one of least cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefold import Experts
from moefold_plugins.moments import Inputs
from moefold_plugins.pair_coding import least_cost
from moefold_plugins.targets import row_weights

BLOCK = 64
"""Neurons among which the best assignment is sought: time grows with it, and on the shipped model (64 neurons) blocks
of 16 gave five sixths of what 64 did."""

AT_ONCE = 1 << 26
"""Elements of pairs of neurons whose costs are computed together."""


def reorder(experts: Experts, expert: int, order: Tensor) -> None:
    """Put one expert's neurons in an order [inner] int64, in place; biases of gate and up go along."""
    order = order.to(experts.down.device)
    for name, weights in experts.matrices().items():
        weights[expert] = weights[expert][:, order] if name == "down_proj" else weights[expert][order]
    if experts.gate_up_bias is not None:
        parts = experts.gate_up_bias[expert].view(-1, experts.inner)  # gate, then up
        experts.gate_up_bias[expert] = parts[:, order].flatten()


def matched(experts: Experts, seen: Inputs, usage: Tensor) -> Tensor:
    """Orders of the neurons of experts in pairs, 0 and 1, 2 and 3, ... in which merging them costs little.

    `usage` [expert] is how much an expert's errors count. Returns [expert, inner] int64.
    """
    rows = row_weights(experts, seen)
    energy = experts.down.float().square().sum(dim=1) * seen.activity  # mean g^2 |D_r h_r|^2
    orders = energy.argsort(dim=1, descending=True, stable=True)
    orders[1::2] = orders[1::2].flip(1)
    for first in range(0, len(orders), 2):
        for start in range(0, experts.inner, BLOCK):
            some = slice(start, start + BLOCK)
            one, other = (
                _of(experts, expert, orders[expert, some], seen, rows[expert], usage[expert])
                for expert in (first, first + 1)
            )
            orders[first + 1, some] = orders[first + 1, some][_assigned(_costs(*one, *other)).to(orders.device)]
    return orders


def _of(
    experts: Experts, expert: int, neurons: Tensor, seen: Inputs, rows: Tensor, usage: Tensor
) -> tuple[Tensor, Tensor]:
    """The sizes of some neurons' weights, and what a squared error of each costs: both [neuron, weight]."""
    matrices = {name: weights[expert] for name, weights in experts.matrices().items()}
    sizes = [(w[:, neurons].T if name == "down_proj" else w[neurons]).float().abs() for name, w in matrices.items()]
    columns = seen.x[expert].diagonal()
    costs = [part[neurons, None] * columns for part in rows.view(-1, experts.inner)]
    costs.append(seen.activity[expert, neurons, None].expand_as(sizes[-1]))
    return torch.cat(sizes, dim=1), torch.cat(costs, dim=1) * usage


def _costs(size: Tensor, cost: Tensor, other_size: Tensor, other_cost: Tensor) -> Tensor:
    """What merging every two neurons costs, from what `_of` gives of each expert: [neuron, neuron]."""
    step = max(1, AT_ONCE // (len(size) * len(other_size)))
    parts = [
        least_cost(a[:, None], b[None], c[:, None], d[None]).sum(dim=2)
        for a, b, c, d in zip(*(each.split(step, dim=1) for each in (size, other_size, cost, other_cost)), strict=True)
    ]
    return torch.stack(parts).sum(dim=0)


def _assigned(costs: Tensor) -> Tensor:
    """For each row the column that goes with it, the sum being the least: a permutation, [row] int64."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and plugins load with every command

    return torch.from_numpy(linear_sum_assignment(costs.double().cpu().numpy())[1])
