"""GPTQ (arXiv 2210.17323) and rounding to nearest in few bits: what a merge in as many bits has to be better than.

Groups of columns of a row share a scale and a zero, both 16 bits: with groups of 64, half a bit a weight. The result is
dense experts with the values that such a format holds, for measuring; `quantize` writes formats that engines read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moefold import Context, Experts, Json, Layer, Reduced, Routed, Stage, hookimpl, stage
from moefold.errors import InputError
from moefold_plugins.compensated import Blend, Block, Damping, chunks
from moefold_plugins.compensation import Walk, factor
from moefold_plugins.moments import Calibration, Changed
from moefold_plugins.targets import pulled

SIDE = 32
"""Bits that a group takes beside its weights: a scale and a zero."""


class GroupCoder:
    """Codes columns to whole numbers times a scale, less a zero, in groups of columns, for many experts at once."""

    def __init__(self, bits: int, group: int, dtype: torch.dtype) -> None:
        """`dtype` is what the values are read in."""
        self.bits, self.group, self.dtype = bits, group, dtype
        self.scale = self.zero = torch.empty(0)

    def weigh(self, cost: Tensor) -> None:
        """Nothing depends on it: every row of every expert is coded by itself."""

    def open(self, start: int, columns: Tensor | None) -> None:  # noqa: ARG002  (a group at a time)
        """Span the group's weights, zero among them."""
        if columns is None:
            raise NotImplementedError("GPTQ goes over columns once")
        low, high = columns.amin(dim=2).clamp(max=0), columns.amax(dim=2).clamp(min=0)  # [batch, slot, rows]
        steps = (1 << self.bits) - 1
        self.scale = ((high - low) / steps).half().float()
        self.scale = torch.where(self.scale > 0, self.scale, 1.0)
        self.zero = (-low / self.scale).round().clamp(0, steps)

    def code(self, number: int, column: Tensor) -> Tensor:  # noqa: ARG002  (of the group that was opened)
        """The nearest values: [batch, slot, rows]."""
        steps = (column / self.scale + self.zero).round().clamp(0, (1 << self.bits) - 1)
        return ((steps - self.zero) * self.scale).to(self.dtype).float()

    def strip(self, start: int, target: Tensor, whole: Tensor, follow: Tensor) -> Tensor | None:  # noqa: ARG002
        """Column by column: it is a reference."""
        return None


@stage("gptq", keep="until read")
def gptq(
    layer: Layer,
    routed: Routed,
    experts: Experts,
    context: Context,
    *,
    bits: Annotated[Literal[2, 3, 4], Field(description="of a weight, beside its share of a scale and a zero")] = 4,
    group: Annotated[int, Field(ge=8, description="columns of a row that share a scale and a zero")] = 64,
    compensate: Annotated[
        bool, Field(description="make up for each column's error in later ones; false: round to nearest")
    ] = True,
    asymmetric: Annotated[
        bool, Field(description="code down for what coded gate and up give, as puzzlemoe.compensated does; not GPTQ's")
    ] = False,
    blend: Blend = 1024.0,
    damping: Damping = 0.01,
    block: Block = 128,
) -> Reduced:
    """Round every expert to few bits, as dense experts again: the reference for merges at known bits, not a format."""
    if asymmetric and not compensate:
        raise InputError("gptq: nothing is made up for with compensate: false; drop asymmetric")
    experts = experts.to(context.device)
    done = {"gate_up": torch.empty_like(experts.gate_up), "down": torch.empty_like(experts.down)}
    raised: dict[str, dict[str, int]] = {name: {} for name in done}
    calibration = Calibration(layer, routed, experts, blend) if compensate else None
    for chunk in chunks([[e] for e in range(experts.count)], experts):
        members = [expert for part in chunk for expert in part]
        moments = calibration.moments(members) if calibration else None
        for name, weights in (("gate_up", experts.gate_up), ("down", experts.down)):
            columns = weights[members][:, None].mT  # [expert, 1, columns, rows]
            moment = None if moments is None else (moments.x if name == "gate_up" else moments.h)[:, None]
            changed = None
            if asymmetric and calibration and name == "down":
                changed = calibration.changed(members, _some(experts, members), done["gate_up"][members])
                moment = changed.h[:, None]
            read, counts = coded(columns, moment, GroupCoder(bits, group, columns.dtype), damping, block, changed)
            done[name][members] = read[:, 0].mT
            raised[name] |= {str(e): count for e, count in zip(members, counts, strict=True) if count}
    figures: Json = {"bits_per_weight": bits + SIDE / group, "bits": bits, "group": group, "raised": raised}
    return Reduced(
        done["gate_up"],
        done["down"],
        experts.gate_up_bias,
        experts.down_bias,
        experts.gated,
        experts.route,
        [[expert] for expert in range(experts.count)],
        figures,
    )


def _some(experts: Experts, members: list[int]) -> Experts:
    bias = None if experts.gate_up_bias is None else experts.gate_up_bias[members]
    return Experts(experts.gate_up[members], experts.down[members], bias, gated=experts.gated)


def coded(
    columns: Tensor,
    moment: Tensor | None,
    coder: GroupCoder,
    damping: float,
    block: int,
    changed: Changed | None = None,
) -> tuple[Tensor, list[int]]:
    """What matrices [batch, slot, columns, rows] read, in their dtype, and how often damping was raised for each.

    Without moments every weight is rounded to nearest. `changed`: down is coded for other hidden activations.
    """
    if moment is None:
        eye = torch.eye(columns.shape[2], device=columns.device)
        moment = eye.expand(*columns.shape[:2], -1, -1).contiguous()
    factors = factor(moment, damping)
    target = columns if changed is None else pulled(columns, changed.cross[:, None], factors)
    walk = Walk(target, coder, block, columns.dtype)
    walk.first(factors)
    return walk.read, factors.raised


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [gptq]
