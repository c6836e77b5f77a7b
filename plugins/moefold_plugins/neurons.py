"""The neurons of an expert, and their order: a neuron is its rows of gate and up and its column of down.

Another order of an expert's neurons changes nothing that it computes, whatever its gate, which works neuron by neuron.
So which neurons of two experts are merged with each other is free. Merging two of them costs the best of three choices
for every weight (pair_coding), with what a squared error costs by the diagonal of the moments. The neurons of one
expert by falling energy and those of the other by rising energy are cut into blocks, the busiest of one against the
rarest of the other; in each block the assignment is the one of least cost. Where experts are alike neuron by neuron, as
upcycled ones may be, their own order costs less, and is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
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


class Neurons(NamedTuple):
    """Some neurons' weights, and what a squared error of each costs: `row` times `column`."""

    size: Tensor  # [..., neuron, matrix, hidden], of the weights' dtype
    row: Tensor  # [..., neuron, matrix]
    column: Tensor  # [..., matrix, hidden]

    def cost(self) -> Tensor:
        """[..., neuron, matrix, hidden]."""
        return self.row[..., None] * self.column[..., None, :, :]


def ranked(experts: Experts, seen: Inputs) -> Tensor:
    """Each expert's neurons by what they add to the output, mean g^2 |D_r h_r|^2, the most first: [expert, inner]."""
    energy = experts.down.float().square().sum(dim=1) * seen.activity
    return energy.argsort(dim=1, descending=True, stable=True)


def gathered(experts: Experts, expert: int, neurons: Tensor, seen: Inputs, rows: Tensor, usage: Tensor) -> Neurons:
    """Neurons of one expert, by `rows` [expert, rows], the weights of rows, and `usage` [expert], those of experts."""
    parts = {name: weights[expert] for name, weights in experts.matrices().items()}
    size = [(w[:, neurons].T if name == "down_proj" else w[neurons]).abs() for name, w in parts.items()]
    row = [part[neurons] for part in rows[expert].view(-1, experts.inner)] + [seen.activity[expert, neurons]]
    inputs = seen.x[expert].diagonal()
    column = [inputs] * (len(size) - 1) + [torch.ones_like(inputs)]
    return Neurons(torch.stack(size, dim=1), torch.stack(row, dim=1) * usage[expert], torch.stack(column))


def matched(experts: Experts, seen: Inputs, usage: Tensor) -> Tensor:
    """Orders of the neurons of experts in pairs, 0 and 1, 2 and 3, ... in which merging them costs little.

    `usage` [expert] is how much an expert's errors count. Returns [expert, inner] int64. The host waits for the device
    once: with a wait in each of 768 blocks (64 pairs of 768 neurons) it took most of the time. On the device lie costs
    of all blocks, 4 * BLOCK bytes of a neuron of a pair.
    """
    rows, orders = row_weights(experts, seen), ranked(experts, seen)
    orders[1::2] = orders[1::2].flip(1)
    natural = torch.arange(experts.inner, device=orders.device)
    costs, known = [], []
    for first in range(0, len(orders), 2):
        pair = (first, first + 1)
        costs.append(_by_block(*(gathered(experts, e, orders[e], seen, rows, usage) for e in pair)))
        known.append(_one_by_one(*(gathered(experts, e, natural, seen, rows, usage) for e in pair)))
    found = _assigned(torch.stack(costs), experts.inner)
    assigned = torch.stack([order for order, _ in found]).to(orders.device)
    orders[1::2] = orders[1::2].gather(1, assigned)
    dearer = [own <= cost for own, (_, cost) in zip(torch.stack(known).tolist(), found, strict=True)]
    orders[torch.tensor(dearer).repeat_interleave(2).to(orders.device)] = natural
    return orders


def total(one: Neurons, other: Neurons) -> Tensor:
    """What merging neurons one by one costs in all: [...]."""
    costs = least_cost(one.size.float(), other.size.float(), one.cost(), other.cost())
    return costs.sum(dim=(-3, -2, -1))


def _one_by_one(one: Neurons, other: Neurons) -> Tensor:
    """What merging all neurons of one with those of another in their order costs: one number, float64."""
    step = max(1, AT_ONCE // (4 * one.size[0].numel()))  # several values of each element are in memory here
    parts = zip(_parts(one, step), _parts(other, step), strict=True)
    return torch.stack([total(*pair).double() for pair in parts]).sum()


def _by_block(one: Neurons, other: Neurons) -> Tensor:
    """What merging every neuron of a block of one with every one of another's block costs, block after block: flat."""
    blocks = zip(_parts(one, BLOCK), _parts(other, BLOCK), strict=True)
    return torch.cat([_costs(*pair).flatten() for pair in blocks])


def _parts(neurons: Neurons, step: int) -> Iterator[Neurons]:
    """Neurons, so many at a time."""
    size, row = neurons.size.split(step), neurons.row.split(step)
    return (Neurons(*part, neurons.column) for part in zip(size, row, strict=True))


def _costs(one: Neurons, other: Neurons) -> Tensor:
    """What merging every neuron of one with every one of another costs: [neuron, neuron]."""
    values = (one.size.float(), other.size.float(), one.cost(), other.cost())
    step = max(1, AT_ONCE // (len(one.size) * len(other.size)))
    pieces = zip(*(value.flatten(1).split(step, dim=1) for value in values), strict=True)
    sums = [least_cost(a[:, None], b[None], c[:, None], d[None]).sum(dim=2) for a, b, c, d in pieces]
    return torch.stack(sums).sum(dim=0)


def _assigned(costs: Tensor, inner: int) -> list[tuple[Tensor, float]]:
    """By pair, of its blocks' costs [pair, flat]: which neuron of the other goes with each of one, and their sum."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and plugins load with every command

    def pair(flat: Any) -> tuple[Tensor, float]:
        order, cost, at = np.arange(inner), 0.0, 0
        for start in range(0, inner, BLOCK):
            count = min(BLOCK, inner - start)
            table = flat[at : at + count**2].reshape(count, count)
            rows, columns = linear_sum_assignment(table)  # a permutation: rows are in their order
            order[start : start + count] = start + columns
            cost, at = cost + float(table[rows, columns].sum()), at + count**2
        return torch.from_numpy(order), cost

    with ThreadPoolExecutor() as threads:  # scipy leaves the interpreter to others while it seeks
        return list(threads.map(pair, costs.cpu().double().numpy()))
