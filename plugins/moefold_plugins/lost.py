"""What a layer's output has lost, token by token, and which part of it an expert's down could make up for.

A token's output is a sum over the experts that it reaches, so that one of them can make up for what others lost. Where
they have lost r_t for a token, and h' are an expert's hidden activations as coded, its best down is that of

    argmin mean |g (D h - D* h') + r|^2 = D + (D C + R) H'^-1,    R = mean r g h'^T,

with C and H' as in targets. Tokens that blending adds have no r: how they would be routed is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from moefold import Experts
from moefold_plugins.moments import Calibration, add_products, operand
from moefold_plugins.visits import Visit, visits


@dataclass(frozen=True)
class Change:
    """Some experts as they were and as they are coded, their neurons in one order."""

    members: Sequence[int]
    before: Experts
    after: Experts

    def of(self, rows: slice) -> Change:
        """Of some of the members."""
        parts = (Experts(e.gate_up[rows], e.down[rows], _some(e.gate_up_bias, rows), gated=e.gated) for e in self.both)
        return Change(self.members[rows], *parts)

    @property
    def both(self) -> tuple[Experts, Experts]:
        return self.before, self.after


class Lost:
    """What a layer's tokens have lost so far: a float32 row for each, where the tokens themselves lie."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        shape = len(calibration.routed.tokens), calibration.experts.down.shape[1]
        self.tokens = torch.zeros(shape, device=calibration.routed.tokens.device)

    def add(self, change: Change) -> None:
        """Count in what a change of experts makes of the outputs."""
        for row, visit in self._visits(change):
            own = self._own(change, row, visit)[0]
            self.tokens[visit.rows.to(self.tokens.device)] += own.to(self.tokens.device)

    def mean(self) -> float:
        """The mean length of what a token's output has lost."""
        return float(self.tokens.norm(dim=1).double().mean())

    def pull(self, change: Change) -> Tensor:
        """R of each member, whose own change is counted in: [member, hidden, inner] float32."""
        hidden, inner = change.before.down.shape[1:]
        found = torch.zeros(len(change.members), hidden, inner, device=self.calibration.device)
        counts = [0] * len(change.members)
        for row, visit in self._visits(change):
            own, activity = self._own(change, row, visit)
            dtype, lost = visit.tokens.dtype, self.tokens[visit.rows.to(self.tokens.device)].to(own.device)
            add_products(found[row], operand(lost - own, dtype), operand(activity, dtype))
            counts[row] += len(visit.rows)
        scale = [1 / (count + self.calibration.blend) if count else 0.0 for count in counts]
        return found.mul_(torch.tensor(scale, device=found.device)[:, None, None])

    def _visits(self, change: Change) -> Iterator[tuple[int, Visit]]:
        place = {expert: row for row, expert in enumerate(change.members)}
        found = self.calibration
        for visit in visits(found.routed, found.experts, found.device, change.members):
            yield place[visit.expert], visit

    def _own(self, change: Change, row: int, visit: Visit) -> tuple[Tensor, Tensor]:
        """What a member's tokens lose, g (D h - Q h') [token, hidden], and g h' [token, inner]."""
        layer, gates = self.calibration.layer, visit.gates[:, None]
        was, now = (layer.activate(experts, row, visit.tokens) for experts in change.both)
        down, coded = change.before.down[row], change.after.down[row]
        missing = linear(was - now, down).float() + linear(now, down - coded).float()
        return missing * gates, now.float() * gates


def _some(bias: Tensor | None, rows: slice) -> Tensor | None:
    return None if bias is None else bias[rows]
