"""Fitting a merged expert's down projection from sums over tokens: no activation outlives its chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moefold import Experts, Json, Layer, Reduced, Routed
from moefold.errors import StageError

CHUNK = 32768
"""Tokens of a layer that are on the device at a time."""

BUDGET = 4 * 2**30
"""Bytes of sums held at a time: more groups than fit are gathered in several passes over the tokens."""

PARTS = 8
"""One part in so many of the calibration text is held out to choose the ridge by."""

RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""What `ridge: auto` chooses from, besides the average itself; in units of the mean diagonal. Tried in this order until
two in a row predict worse than the best so far: each costs a Cholesky factor, and the error has one valley."""


@dataclass
class Moments:
    """Sums over tokens: p p^T [inner, inner], r p^T [hidden, inner], both float64, r^2, and how many tokens."""

    square: Tensor
    cross: Tensor
    error: Tensor  # [] float64
    tokens: int = 0

    @staticmethod
    def zero(hidden: int, inner: int, device: torch.device) -> Moments:
        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return Moments(empty(inner, inner), empty(hidden, inner), empty())

    def add(self, p: Tensor, r: Tensor) -> None:
        """Take in tokens: p `[token, inner]`, r `[token, hidden]`."""
        self.square += p.T @ p
        self.cross += r.T @ p
        self.error += r.square().sum()
        self.tokens += len(p)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.square + other.square,
            self.cross + other.cross,
            self.error + other.error,
            self.tokens + other.tokens,
        )


@dataclass
class Sums:
    """One group's sums: of the tokens to fit on, and of those held out."""

    fit: Moments
    held: Moments

    @staticmethod
    def gather(
        layer: Layer,
        routed: Routed,
        experts: Experts,
        merged: Reduced,
        groups: Mapping[int, list[int]],
        shares: Mapping[int, float],
        target: str,
        tokens: str,
    ) -> dict[int, Sums]:
        """Go over the layer's tokens once, for the groups (by their number in `merged`) given."""
        device, hidden = experts.down.device, experts.down.shape[1]
        sums = {
            n: Sums(Moments.zero(hidden, experts.inner, device), Moments.zero(hidden, experts.inner, device))
            for n in groups
        }
        reached, held = routed.reaches(experts), held_out(routed)
        kind = torch.promote_types(routed.tokens.dtype, torch.float32)
        for start in range(0, len(routed.tokens), CHUNK):
            chunk = slice(start, start + CHUNK)
            x, chosen, gates, out = (
                part[chunk].to(device) for part in (routed.tokens, reached, routed.top_k_weights, held)
            )
            for number, group in groups.items():
                hits = [(chosen == expert) for expert in group]
                rows = torch.stack(hits).any(dim=0).any(dim=1)
                if target == "published" and tokens == "all":
                    rows = torch.ones_like(rows)
                own = x[rows]
                if not len(own):
                    continue
                if target == "published":
                    weights = [torch.full((len(own),), shares[expert], dtype=kind, device=device) for expert in group]
                else:
                    weights = [(gates.to(kind) * hit)[rows].sum(dim=1) for hit in hits]
                p, r = _residual(layer, experts, merged, number, group, own, weights)
                for moments, part in ((sums[number].fit, ~out[rows]), (sums[number].held, out[rows])):
                    moments.add(p[part], r[part])
        return sums


def _residual(
    layer: Layer,
    experts: Experts,
    merged: Reduced,
    number: int,
    group: list[int],
    x: Tensor,
    weights: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """G p(x) `[token, inner]`, and what the average leaves of the weighted outputs, `[token, hidden]`."""
    kind = weights[0].dtype
    total = torch.stack(weights).sum(dim=0)[:, None]  # [token, 1]: G
    p = layer.activate(merged, number, x).to(kind) * total
    r = -F.linear(p, merged.down[number].to(kind))
    if merged.down_bias is not None:
        r -= total * merged.down_bias[number].to(kind)
    for expert, weight in zip(group, weights, strict=True):
        active = weight != 0
        if bool(active.any()):
            r[active] += layer.output(experts, expert, x[active]).to(kind) * weight[active, None]
    return p, r


def held_out(routed: Routed) -> Tensor:
    """Which tokens choose the ridge: every eighth sample, or eighth stretch where samples are few; [token] bool."""
    samples, length = routed.layer_input.shape[:2]
    count = len(routed.tokens)
    stretch = length if samples >= PARTS and count == samples * length else max(1, -(-count // PARTS))
    return torch.arange(count) // stretch % PARTS == PARTS - 1


def passes(groups: Mapping[int, list[int]], experts: Experts) -> Iterator[dict[int, list[int]]]:
    """The groups in as many parts as their sums need to stay within the budget."""
    inner, hidden = experts.inner, experts.down.shape[1]
    each = 2 * 8 * inner * (inner + hidden)
    size = max(1, BUDGET // each)
    items = list(groups.items())
    for start in range(0, len(items), size):
        yield dict(items[start : start + size])


@dataclass
class Fit:
    """A down projection's correction, and how it was come by."""

    correction: Tensor  # [hidden, inner] float64
    ridge: float | None
    """None: no ridge was better than the average alone."""
    tokens: int
    left: float | None
    """Share of the average's squared error that is left on held-out tokens (None: there were none)."""

    def facts(self) -> dict[str, Json]:
        return {"ridge": self.ridge, "tokens": self.tokens, "left": self.left}


def solve(sums: Sums, ridge: float | str) -> Fit:
    """The correction `R P^T (P P^T + ridge I)^-1` of all tokens, in float64.

    `auto` takes the ridge that predicts held-out tokens best from the others, or none where the average does better.
    """
    every, before = sums.fit + sums.held, float(sums.held.error)
    testable = sums.fit.tokens > 0 and before > 0
    tried = RIDGES if ridge == "auto" else (float(ridge),)
    scored = _scores(sums, tried, before) if testable else {}
    best = min(scored, key=scored.__getitem__, default=None if ridge == "auto" else tried[0])
    left = scored.get(best) if best is not None else None
    if best is None or (ridge == "auto" and left is not None and left >= 1):
        return Fit(torch.zeros_like(every.cross), None, every.tokens, 1.0 if testable else None)
    return Fit(correction(every, best) if every.tokens else torch.zeros_like(every.cross), best, every.tokens, left)


def correction(moments: Moments, ridge: float) -> Tensor:
    """[hidden, inner]; a ridge of 0 is the pseudo-inverse, as published."""
    if ridge == 0:
        inverse: Tensor = torch.linalg.pinv(moments.square, hermitian=True)
        return moments.cross @ inverse
    damped = moments.square.clone()
    damped.diagonal().add_(ridge * moments.square.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise SingularError(f"P P^T + {ridge} of its mean diagonal has no Cholesky factor; write a larger one, or auto")
    solved: Tensor = torch.cholesky_solve(moments.cross.T, factor)
    return solved.T


class SingularError(StageError):
    """The ridge is too small for what is fitted."""


def _scores(sums: Sums, tried: Sequence[float], before: float) -> dict[float, float]:
    """The share of the held-out error that each ridge leaves, from the first until two in a row are no better."""
    scored: dict[float, float] = {}
    for value in tried:
        scored[value] = _held_error(sums, value) / before
        *earlier, last, now = [math.inf, *scored.values()]
        if earlier and min(last, now) > min(earlier):
            break
    return scored


def _held_error(sums: Sums, ridge: float) -> float:
    """The held-out squared error of what is fitted on the rest; infinite where nothing can be."""
    held = sums.held
    try:
        delta = correction(sums.fit, ridge)
    except SingularError:
        return math.inf
    change = ((delta @ held.square) * delta).sum() - 2 * (delta * held.cross).sum()
    return float(held.error + change)
