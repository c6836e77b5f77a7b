"""Second moments of what an expert's matrices multiply, streamed over calibration tokens, some experts at a time.

For the tokens t that reach expert e with gate weights g_te, of inputs x_t and of hidden activations h_e(x_t):

    H_e = mean_t g_te^2 x_t x_t^T    (gate and up: [hidden, hidden]; down, with h for x: [inner, inner])
    H_e <- lambda H_e + (1 - lambda) mean_t(g_te^2) H_all,    lambda = n / (n + blend)

n is how many tokens reach e, and H_all the mean over all tokens that enter the layer: of x, and for down of e's own h
over a sample of them. So an expert that saw little leans on the layer, and one that saw nothing (whose mean gate is
the layer's) rests on it alone. Every other mean here is taken in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moefold import Experts, Layer, Routed
from moefold.errors import InputError
from moefold_plugins.visits import CHUNK, held, visits

SAMPLE = 4096
"""Tokens, evenly spaced over the layer's, that stand for all of them in an expert's hidden activations."""

Add = Callable[[int, Tensor, Tensor | None, float], None]
"""Adds to a row's sums what tokens give, times their squared gate weights (None: 1) and a factor."""


class Moments(NamedTuple):
    """Blended means of the experts asked for, in their order, float32."""

    x: Tensor  # [expert, hidden, hidden]: of what gate and up multiply
    h: Tensor  # [expert, inner, inner]: of what down multiplies
    tokens: list[int]
    """How many tokens reached each of the experts."""


class Inputs(NamedTuple):
    """What gate and up multiply, and what becomes of it."""

    x: Tensor  # [expert, hidden, hidden]
    activity: Tensor  # [expert, inner]: mean g^2 h^2, the diagonal of `Moments.h`
    slope: Tensor  # [expert, rows]: mean g^2 s^2 / mean g^2, s how h changes with a row of gate or up
    tokens: list[int]


class Changed(NamedTuple):
    """What down multiplies once gate and up are coded, h', beside what it multiplied before."""

    h: Tensor  # [expert, inner, inner]: mean g^2 h' h'^T
    cross: Tensor  # [expert, inner, inner]: mean g^2 (h - h') h'^T
    lost: Tensor  # [expert]: mean g^2 |D (h - h')|^2, what the experts' outputs have lost so far


class Calibration:
    """A layer's calibration tokens, to take the moments of some of its experts after others."""

    def __init__(self, layer: Layer, routed: Routed, experts: Experts, blend: float) -> None:
        """`experts` lie on the device to compute on; `blend` of its own tokens count as much as the layer's do."""
        if not len(routed.tokens):
            raise InputError(f"layer {layer.number}: no calibration tokens; give forward a text of at least one sample")
        self.device, self.gate = experts.down.device, float(routed.top_k_weights.float().square().mean())
        routed = held(routed, self.device)
        self.layer, self.routed, self.experts, self.blend = layer, routed, experts, blend
        self.hidden, self.inner = routed.tokens.shape[1], experts.inner
        self.all = torch.zeros(self.hidden, self.hidden, device=self.device)
        for tokens in routed.tokens.split(CHUNK):
            _add(self.all, tokens.to(self.device))
        self.all /= len(routed.tokens)
        self.sample = routed.tokens[:: max(1, len(routed.tokens) // SAMPLE)].to(self.device).contiguous()

    def moments(self, members: Sequence[int]) -> Moments:
        """The moments of some experts: one pass over the layer's tokens, and as many matrices as there are experts."""
        x, h = self._zeros(members, self.hidden, self.hidden), self._zeros(members, self.inner, self.inner)

        def add(row: int, tokens: Tensor, gates: Tensor | None, scale: float) -> None:
            _add(h[row], self.layer.activate(self.experts, members[row], tokens), gates, scale)

        return Moments(x, h, self._blended(members, x, (h,), add))

    def inputs(self, members: Sequence[int]) -> Inputs:
        """The moments of what gate and up multiply, and how neurons take it: one pass over the layer's tokens."""
        x, activity = self._zeros(members, self.hidden, self.hidden), self._zeros(members, self.inner)
        slope, gate = self._zeros(members, self.experts.gate_up.shape[1]), self._zeros(members)

        def add(row: int, tokens: Tensor, gates: Tensor | None, scale: float) -> None:
            weight = torch.full_like(tokens[:, 0], scale, dtype=torch.float32) if gates is None else gates.square()
            found = self.layer.slopes(self.experts, members[row], tokens)
            for total, values in zip((activity, slope), found, strict=True):
                total[row] += weight @ values.square()
            gate[row] += weight.sum()

        tokens = self._blended(members, x, (activity, slope, gate), add)
        return Inputs(x, activity, slope / gate[:, None], tokens)

    def changed(self, members: Sequence[int], before: Experts, coded: Tensor) -> Changed:
        """What coding gate and up changes in what down multiplies: one more pass over the layer's tokens.

        `before` has the members alone, in their order; `coded` [member, rows, hidden] is how their gate and up read.
        """
        after = replace(before, gate_up=coded)
        h, cross = (self._zeros(members, self.inner, self.inner) for _ in range(2))
        lost = self._zeros(members)

        def add(row: int, tokens: Tensor, gates: Tensor | None, scale: float) -> None:
            now = self.layer.activate(after, row, tokens)
            off = self.layer.activate(before, row, tokens) - now
            _add(h[row], now, gates, scale)
            _add(cross[row], off, gates, scale, now)
            missing = torch.nn.functional.linear(off, before.down[row]).float()
            lost[row] += (missing if gates is None else missing * gates[:, None]).square().sum() * scale

        self._blended(members, None, (h, cross, lost), add)
        return Changed(h, cross, lost)

    def _zeros(self, members: Sequence[int], *shape: int) -> Tensor:
        return torch.zeros(len(members), *shape, device=self.device)

    def _blended(self, members: Sequence[int], x: Tensor | None, totals: Sequence[Tensor], add: Add) -> list[int]:
        """Make blended means of the rows of `x` and of `totals`, which `add` fills; returns the members' tokens."""
        place = {expert: row for row, expert in enumerate(members)}
        counts, gates = [0] * len(members), torch.zeros(len(members), device=self.device)
        for visit in visits(self.routed, self.experts, self.device, members):
            row = place[visit.expert]
            counts[row] += len(visit.tokens)
            gates[row] += visit.gates.square().sum()
            add(row, visit.tokens, visit.gates, 1.0)
            if x is not None:
                _add(x[row], visit.tokens, visit.gates)
        for row, (count, total) in enumerate(zip(counts, gates.tolist(), strict=True)):
            share = count / (count + self.blend) if count else 0.0
            rest = (total / count if count else self.gate) * (1 - share)
            for each in totals if x is None else (x, *totals):
                each[row] *= share / max(count, 1)
            if rest:
                add(row, self.sample, None, rest / len(self.sample))
                if x is not None:
                    x[row].add_(self.all, alpha=rest)
        return counts


def _add(
    moment: Tensor, values: Tensor, gates: Tensor | None = None, scale: float = 1.0, others: Tensor | None = None
) -> None:
    """Add `scale * sum_t g_t^2 v_t o_t^T` of `values` and `others` (the values themselves) [token, columns]."""
    left = _weighted(values, gates)
    add_products(moment, left, left if others is None else _weighted(others, gates), scale)


def _weighted(values: Tensor, gates: Tensor | None) -> Tensor:
    return operand(values.float() if gates is None else values.float() * gates[:, None], values.dtype)


def operand(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values as products over tokens take them: on a GPU those of a bf16 layer rounded to bf16 once more.

    The matrix units then take a fifteenth of the time.
    """
    return values.bfloat16() if values.is_cuda and dtype == torch.bfloat16 else values


def add_products(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add `scale * sum_t l_t r_t^T` of operands [token, rows] and [token, columns] to a float32 total."""
    if left.dtype == torch.bfloat16:
        total.add_(torch.mm(left.T, right, out_dtype=torch.float32), alpha=scale)
    else:
        total.addmm_(left.T, right, alpha=scale)
