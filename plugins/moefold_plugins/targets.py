"""What down is to become where gate and up have been coded already, and what an error in their rows costs.

Coded gate and up give other hidden activations, h' for h. The down projection that makes the most of them,

    D* = argmin mean g^2 |D h - D* h'|^2 = D + D C H'^-1,    C = mean g^2 (h - h') h'^T,  H' = mean g^2 h' h'^T,

is what down is then coded to, under H' (asymmetric calibration: GPTAQ, arXiv 2504.02692, there from layer to layer).
Damping H' draws D* towards D. What coding D* to Q leaves of the expert's output is

    mean g^2 |D h - Q h'|^2 = mean g^2 |D (h - h')|^2 + tr((D - Q) (2 C D^T + H' (D - Q)^T)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefold import Experts
from moefold_plugins.compensation import Factors
from moefold_plugins.moments import Changed, Inputs

LEAST = 1e-6
"""A row's weight, in units of the mean, when it gives nothing: so that which of two such rows goes first is defined."""


def pulled(columns: Tensor, cross: Tensor, factors: Factors, others: Tensor | None = None) -> Tensor:
    """D* of down projections D, both [..., columns, rows]; `factors` are of H' with its damping.

    `others` [..., rows, columns] is R, where other experts' losses are to be made up for (lost).
    """
    lower, upper = factors.unit.mT, factors.unit  # H' = R R^T, R = unit * sqrt(cost)
    pull: Tensor = cross.mT @ columns.float()
    if others is not None:
        pull = pull + others.mT
    pull = torch.linalg.solve_triangular(upper, pull, upper=True, unitriangular=True) / factors.cost[..., None]
    pull = torch.linalg.solve_triangular(lower, pull, upper=False, unitriangular=True)
    return pull.add_(columns)


def left(down: Tensor, read: Tensor, changed: Changed) -> Tensor:
    """What the experts' outputs lose in all, mean g^2 |f - f'|^2: [expert], for D and Q [expert, rows, columns]."""
    off = down.float() - read.float()
    pull = 2 * down.float() @ changed.cross + off @ changed.h
    return changed.lost + (off * pull).sum(dim=(-2, -1))


def row_weights(experts: Experts, seen: Inputs) -> Tensor:
    """What a squared error of `W x` in a row of gate and up does to the output, |D_r|^2 s_r^2: [expert, rows], > 0.

    s_r is how h_r changes with it. `experts` has those in `seen` alone, in their order.
    """
    length = experts.down.float().square().sum(dim=1).repeat(1, 2 if experts.gated else 1)
    weights = length * seen.slope
    return weights.clamp_(min=LEAST * float(weights.mean())) if bool(weights.any()) else torch.ones_like(weights)
