"""Second moments of what an expert's matrices multiply, streamed over calibration tokens, some experts at a time.

For the tokens t that reach expert e with gate weights g_te, of inputs x_t and of hidden activations h_e(x_t):

    H_e = mean_t g_te^2 x_t x_t^T    (gate and up: [hidden, hidden]; down, with h for x: [inner, inner])
    H_e <- lambda H_e + (1 - lambda) mean_t(g_te^2) H_all,    lambda = n / (n + blend)

n is how many tokens reach e, and H_all the mean over all tokens that enter the layer: of x, and for down of e's own h
over a sample of them. So an expert that saw little leans on the layer, and one that saw nothing (whose mean gate is
the layer's) rests on it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moefold import Experts, Layer, Routed
from moefold.errors import InputError
from moefold_plugins.visits import CHUNK, visits

SAMPLE = 4096
"""Tokens, evenly spaced over the layer's, that stand for all of them in an expert's hidden activations."""


class Moments(NamedTuple):
    """Blended means of the experts asked for, in their order, float32."""

    x: Tensor  # [expert, hidden, hidden]: of what gate and up multiply
    h: Tensor  # [expert, inner, inner]: of what down multiplies
    tokens: list[int]
    """How many tokens reached each of the experts."""


class Calibration:
    """A layer's calibration tokens, to take the moments of some of its experts after others."""

    def __init__(self, layer: Layer, routed: Routed, experts: Experts, blend: float) -> None:
        """`experts` lie on the device to compute on; `blend` of its own tokens count as much as the layer's do."""
        if not len(routed.tokens):
            raise InputError(f"layer {layer.number}: no calibration tokens; give forward a text of at least one sample")
        self.layer, self.routed, self.experts, self.blend = layer, routed, experts, blend
        self.device = experts.down.device
        self.gate = float(routed.top_k_weights.float().square().mean())
        hidden = routed.tokens.shape[1]
        self.all = torch.zeros(hidden, hidden, device=self.device)
        for tokens in routed.tokens.split(CHUNK):
            _add(self.all, tokens.to(self.device))
        self.all /= len(routed.tokens)
        self.sample = routed.tokens[:: max(1, len(routed.tokens) // SAMPLE)].to(self.device)

    def moments(self, members: Sequence[int]) -> Moments:
        """The moments of some experts: one pass over the layer's tokens, and as many matrices as there are experts."""
        place = {expert: row for row, expert in enumerate(members)}
        x, h = (torch.zeros(len(members), n, n, device=self.device) for n in (len(self.all), self.experts.inner))
        counts, gates = [0] * len(members), torch.zeros(len(members), device=self.device)
        for visit in visits(self.routed, self.experts, self.device, members):
            row = place[visit.expert]
            counts[row] += len(visit.tokens)
            gates[row] += visit.gates.square().sum()
            _add(x[row], visit.tokens, visit.gates)
            _add(h[row], self.layer.activate(self.experts, visit.expert, visit.tokens), visit.gates)
        for row, (count, total) in enumerate(zip(counts, gates.tolist(), strict=True)):
            share = count / (count + self.blend) if count else 0.0
            rest = (total / count if count else self.gate) * (1 - share)
            x[row].mul_(share / max(count, 1)).add_(self.all, alpha=rest)
            h[row].mul_(share / max(count, 1))
            if rest:
                typical = self.layer.activate(self.experts, members[row], self.sample)
                _add(h[row], typical, scale=rest / len(self.sample))
        return Moments(x, h, counts)


def _add(moment: Tensor, values: Tensor, gates: Tensor | None = None, scale: float = 1.0) -> None:
    """Add `scale * sum_t g_t^2 v_t v_t^T` of `values` [token, columns].

    On a GPU of bf16 values times gates, rounded to bf16 once more: the matrix units then take a fifteenth of the time.
    """
    weighted = values.float() if gates is None else values.float() * gates[:, None]
    if values.is_cuda and values.dtype == torch.bfloat16:
        weighted = weighted.bfloat16()
        moment.add_(torch.mm(weighted.T, weighted, out_dtype=torch.float32), alpha=scale)
    else:
        moment.addmm_(weighted.T, weighted, alpha=scale)
