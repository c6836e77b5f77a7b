"""What merging any two experts of a layer would cost, before any is merged: what pairs are chosen by.

For the merge that `puzzlemoe.compensated` does. A pair's cost is that of the best of three choices (pair_coding),
summed over weights, with what a squared error costs by the diagonal of the moments (neurons), where the busiest neurons
of one expert are merged with the rarest of the other, or all in their own order where that costs less. Compensation
takes its share of it later: costs are for comparing pairs, not for believing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moefold import Experts
from moefold_plugins.compensated import chunks
from moefold_plugins.moments import Calibration
from moefold_plugins.neurons import Neurons, gathered, ranked, total
from moefold_plugins.pair_coding import read_cost
from moefold_plugins.pair_merging import usages
from moefold_plugins.targets import row_weights

AT_ONCE = 1 << 26
"""Elements of pairs whose errors are computed together."""

Of = Callable[[Neurons, Neurons], Tensor]
"""Of neurons merged one by one, [..., figure]: what it costs, by which orders are compared, and other sums."""


class PairErrors(NamedTuple):
    """Of every two experts, by some of their neurons."""

    figures: Tensor  # [expert, expert, figure] float64, on the CPU
    tokens: list[int]
    """How many tokens reached each expert."""


def costs(one: Neurons, other: Neurons) -> Tensor:
    """What merging neurons costs: [..., 1]."""
    return total(one, other)[..., None]


def costs_and_reads(one: Neurons, other: Neurons) -> Tensor:
    """Beside it what an error as large as what is read would: of gate and up, and of down: [..., 3]."""
    values = (one.size.float(), other.size.float(), one.cost(), other.cost())
    read = read_cost(*values).sum(dim=(-3, -1))  # [..., matrix]
    return torch.stack([total(one, other), read[..., :-1].sum(dim=-1), read[..., -1]], dim=-1)


def pair_errors(experts: Experts, calibration: Calibration, sample: int, weigh: str, of: Of = costs) -> PairErrors:
    """Sums over `sample` neurons of each expert, evenly spaced; experts lie on the device to compute on."""
    (natural, falling, rising), tokens = _neurons(experts, calibration, sample, weigh)
    rows: list[list[Tensor]] = [[] for _ in range(experts.count)]
    step = max(1, AT_ONCE // falling.size[0].numel())
    for first in range(experts.count - 1):
        for start in range(first + 1, experts.count, step):
            some = slice(start, start + step)
            orders = (natural, natural), (falling, rising)
            own, busy_with_rare = (of(_part(one, first), _part(other, some)).double() for one, other in orders)
            rows[first].append(torch.where(own[:, :1] <= busy_with_rare[:, :1], own, busy_with_rare))
    return PairErrors(_table(rows), tokens)


def _table(rows: list[list[Tensor]]) -> Tensor:
    """A symmetric table of what is after the diagonal in each row."""
    count = len(rows)
    after = [torch.cat(row).cpu() for row in rows if row]
    found = torch.zeros(count, count, after[0].shape[1] if after else 1, dtype=torch.float64)
    for first, row in enumerate(after):
        found[first, first + 1 :] = found[first + 1 :, first] = row
    return found


def _part(neurons: Neurons, some: int | slice) -> Neurons:
    return Neurons(neurons.size[some], neurons.row[some], neurons.column[some])


def _neurons(experts: Experts, calibration: Calibration, sample: int, weigh: str) -> tuple[list[Neurons], list[int]]:
    """Some neurons of every expert: in their own order, by falling energy, by rising energy; and experts' tokens."""
    found: tuple[list[Neurons], ...] = [], [], []
    tokens: list[int] = []
    natural = torch.arange(experts.inner, device=experts.down.device)
    spaced = spaced_neurons(experts.inner, sample).to(natural.device)
    for chunk in chunks([[expert] for expert in range(experts.count)], experts):
        members = [expert for part in chunk for expert in part]
        seen = calibration.inputs(members)
        tokens += seen.tokens
        some = Experts(experts.gate_up[members], experts.down[members], gated=experts.gated)
        usage = usages(seen.tokens, calibration.blend, weigh).to(seen.x.device)
        rows, orders = row_weights(some, seen), ranked(some, seen)
        for place in range(len(members)):
            for each, order in zip(found, (natural, orders[place], orders[place].flip(0)), strict=True):
                each.append(gathered(some, place, order[spaced], seen, rows, usage))
    return [Neurons(*map(torch.stack, zip(*each, strict=True))) for each in found], tokens


def spaced_neurons(inner: int, sample: int) -> Tensor:
    """The places of `sample` neurons or a few more, evenly spaced: int64."""
    return torch.arange(0, inner, max(1, inner // sample))
