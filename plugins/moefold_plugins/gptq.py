"""GPTQ (arXiv 2210.17323) and rounding to nearest in few bits: what a merge in as many bits has to be better than.

`gptq`: groups of columns of a row share a scale and a zero, both 16 bits: with groups of 64, half a bit a weight. The
result is dense experts with the values that such a format holds, for measuring. `quantize.gptq`: scales without a zero,
as compressed-tensors has them, and stored in its formats, which engines read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from moefold import Context, Experts, Json, Layer, Quantized, Reduced, Routed, Scheme, Stage, hookimpl, stage
from moefold.errors import InputError
from moefold_plugins.compensated import Blend, Block, Damping, chunks
from moefold_plugins.compensation import Walk, factor
from moefold_plugins.moments import Calibration, Changed
from moefold_plugins.quantize import chosen_scheme, quantized
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
    for part in rounded(
        experts, calibration, lambda columns: GroupCoder(bits, group, columns.dtype), damping, block, asymmetric
    ):
        done[part.name][part.members] = part.read
        raised[part.name] |= part.raised
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


@stage("quantize.gptq", keep="until read")
def quantize_gptq(
    layer: Layer,
    routed: Routed,
    experts: Experts,
    context: Context,
    *,
    scheme: Annotated[Literal["int8", "int4"], Field(description="int8: a scale for each row; int4: for each group")],
    group: Annotated[
        int | None, Field(ge=8, description="columns that share a scale, int4 only (128 by default)")
    ] = None,
    blend: Blend = 1024.0,
    damping: Damping = 0.01,
    block: Block = 128,
) -> Quantized:
    """Quantise as `quantize` does, but making up for each column's error in later ones, by what experts see (GPTQ)."""
    chosen = chosen_scheme("quantize.gptq", layer, experts, scheme, group)
    experts = experts.to(context.device)
    made: dict[str, list[Mapping[str, Tensor]]] = {}
    raised: dict[str, Json] = {}
    rows = {"gate_proj": slice(experts.inner), "up_proj": slice(-experts.inner, None), "down_proj": slice(None)}
    calibration = Calibration(layer, routed, experts, blend)
    for part in rounded(experts, calibration, lambda columns: SchemeCoder(chosen, columns), damping, block):
        scales = part.coder.scales()
        raised[part.name] = raised.get(part.name, {}) | part.raised
        for name in experts.matrices():
            if (name == "down_proj") == (part.name == "down"):
                each = zip(part.read[:, rows[name]].float(), scales[:, rows[name]], strict=True)
                made.setdefault(name, []).extend(chosen.stored(read, scale) for read, scale in each)
    return quantized(chosen, {name: made[name] for name in experts.matrices()}, experts, {"raised": raised})


class SchemeCoder(GroupCoder):
    """Codes columns to the values of a scheme of compressed-tensors, whole numbers times a scale."""

    def __init__(self, scheme: Scheme, columns: Tensor) -> None:
        """`columns` [batch, slot, columns, rows] are to be coded."""
        super().__init__(scheme.bits, scheme.group or columns.shape[2], columns.dtype)
        self.scheme, self.opened = scheme, list[Tensor]()

    def open(self, start: int, columns: Tensor | None) -> None:  # noqa: ARG002  (a group at a time)
        """Span the group's weights, as many steps above zero as below."""
        if columns is None:
            raise NotImplementedError("GPTQ goes over columns once")
        self.opened.append(self.scheme.scales(*columns.aminmax(dim=2), self.dtype))
        self.scale = self.opened[-1].float()

    def code(self, number: int, column: Tensor) -> Tensor:  # noqa: ARG002  (of the group that was opened)
        """The nearest values, as they read."""
        most = 1 << self.bits - 1
        return ((column / self.scale).round().clamp(-most, most - 1) * self.scale).to(self.dtype).float()

    def scales(self) -> Tensor:
        """Of all groups: [batch, rows, groups]."""
        return torch.stack(self.opened, dim=-1)[:, 0]


C = TypeVar("C", bound=GroupCoder)


class Rounded(NamedTuple, Generic[C]):
    """One stack of some experts."""

    name: str
    """gate_up or down."""
    members: list[int]
    read: Tensor
    """What it reads: [member, rows, columns]."""
    coder: C
    raised: dict[str, int]
    """How often an expert's damping had to be raised tenfold, where it had to."""


def rounded(
    experts: Experts,
    calibration: Calibration | None,
    coder: Callable[[Tensor], C],
    damping: float,
    block: int,
    asymmetric: bool = False,
) -> Iterator[Rounded[C]]:
    """Code experts, as many at a time as fit: each time gate and up, then down; without calibration to nearest."""
    for chunk in chunks([[e] for e in range(experts.count)], experts):
        members = [expert for part in chunk for expert in part]
        moments = calibration.moments(members) if calibration else None
        gate_up = torch.empty(0)
        for name, weights in (("gate_up", experts.gate_up), ("down", experts.down)):
            columns = weights[members][:, None].mT  # [expert, 1, columns, rows]
            moment = None if moments is None else (moments.x if name == "gate_up" else moments.h)[:, None]
            changed = None
            if asymmetric and calibration and name == "down":
                changed = calibration.changed(members, _some(experts, members), gate_up)
                moment = changed.h[:, None]
            used = coder(columns)
            read, counts = coded(columns, moment, used, damping, block, changed)
            read = read[:, 0].mT
            if name == "gate_up":
                gate_up = read
            raised = {str(e): count for e, count in zip(members, counts, strict=True) if count}
            yield Rounded(name, members, read, used, raised)


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
    return [gptq, quantize_gptq]
