"""Error-compensated pair merging: PuzzleMoE's pair code (arXiv 2511.04805), coded as GPTQ does (arXiv 2210.17323).

The pair format has one magnitude for two weights. Here each element takes the best of three choices (pair_coding), and
what it gets wrong in a column is made up for in the later columns of each expert, by that expert's own second moments
(compensation, moments). Bits and kernels are those of the published merge.

Memory: of the experts in hand, their [hidden, hidden] and [inner, inner] moments and their weights once more, float32.
They are taken in chunks of pairs that fit BUDGET, each of which goes over the calibration tokens once, and which change
no result. DeepSeek-V3 (7168, 2048): 0.22 GB of moments and 0.23 GB for weights an expert, 116 GB for all 256 at once; 18
pairs in hand fit the budget, eight passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moefold import Context, Experts, Groups, Json, Layer, MergedPairs, Routed, Stage, hookimpl, stage
from moefold.artifacts import as_index
from moefold.errors import InputError
from moefold_kernels import layout
from moefold_plugins.averaging import check_groups
from moefold_plugins.compensation import factor, walk
from moefold_plugins.moments import Calibration, Moments
from moefold_plugins.pair_coding import Grid, PairCoder, Window

BUDGET = 16 * 2**30
"""Bytes of moments and weights held at a time."""

HEADROOM = 2
"""Exponents above the largest weight's that a compensated one may reach before it is clipped."""

Damping = Annotated[float, Field(gt=0, description="added to the moments' diagonal, in units of its mean")]
Block = Annotated[int, Field(ge=1, description="columns between which errors are pushed on one by one")]
Blend = Annotated[
    float, Field(ge=0, description="how many of an expert's own tokens count as much as the layer's; 0: own ones only")
]
Weigh = Annotated[
    Literal["equal", "usage"],
    Field(description="whose errors count: those of both experts alike, or each one's by its routed tokens"),
]
Order = Annotated[
    Literal["natural", "activation"],
    Field(description="columns as they are, or those first in which errors cost most"),
]


@stage("puzzlemoe.compensated", keep="until read")
def compensated(
    layer: Layer,
    routed: Routed,
    experts: Experts,
    pairs: Groups,
    context: Context,
    *,
    weigh: Weigh = "equal",
    blend: Blend = 256.0,
    damping: Damping = 0.01,
    block: Block = 128,
    order: Order = "natural",
) -> MergedPairs:
    """Merge each pair element by element, making up for each column's error in the columns after it."""
    if any(len(pair) != 2 for pair in pairs.members):
        raise InputError("puzzlemoe.compensated merges pairs; use a pair.* stage before it")
    check_groups(pairs.all(), experts.count)
    experts = experts.to(context.device)
    merge = _Merge(experts, pairs, weigh, damping, block, order)
    if pairs.members:
        calibration = Calibration(layer, routed, experts, blend)
        for chunk in chunks(pairs.members, experts):
            merge.add(chunk, calibration.moments([expert for pair in chunk for expert in pair]))
    return merge.done()


def chunks(pairs: list[list[int]], experts: Experts) -> Iterator[list[list[int]]]:
    """The pairs, as many at a time as fit the budget."""
    hidden, inner = experts.down.shape[1:]
    weights = max(experts.gate_up[0].numel(), experts.down[0].numel())
    size = max(1, BUDGET // (2 * 4 * (hidden**2 + inner**2 + 2 * weights)))
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


@dataclass
class _Done:
    """What is there of one stack of matrices, gate and up in one: chunks of [pair, rows, columns]."""

    grid: Grid
    magnitude: list[Tensor] = field(default_factory=list)
    flags: list[Tensor] = field(default_factory=list)
    clipped: int = 0


class _Merge:
    """A layer's pairs, merged chunk by chunk."""

    def __init__(self, experts: Experts, pairs: Groups, weigh: str, damping: float, block: int, order: str) -> None:
        self.experts, self.pairs, self.weigh = experts, pairs, weigh
        self.damping, self.block, self.order = damping, block, order
        self.stacks = {"gate_up": experts.gate_up, "down": experts.down}
        paired = as_index([expert for pair in pairs.members for expert in pair])
        self.parts = {name: _Done(window(stack[paired])) for name, stack in self.stacks.items() if len(paired)}
        self.tokens: dict[str, int] = {}
        self.damage: dict[str, list[list[float]]] = {name: [] for name in self.stacks}
        self.raised: dict[str, dict[str, int]] = {name: {} for name in self.stacks}

    def add(self, chunk: list[list[int]], moments: Moments) -> None:
        """Merge some pairs; `moments` are of their experts in order, and are overwritten."""
        members = [expert for pair in chunk for expert in pair]
        self.tokens |= dict(zip(map(str, members), moments.tokens, strict=True))
        usage = torch.tensor([max(count, 1) if self.weigh == "usage" else 1 for count in moments.tokens])
        for name, moment in (("gate_up", moments.x), ("down", moments.h)):
            weights = self.stacks[name][as_index(members)]
            raised = self._code(name, weights.unflatten(0, (-1, 2)).mT, moment.unflatten(0, (-1, 2)), usage.view(-1, 2))
            self.raised[name] |= {str(e): count for e, count in zip(members, raised, strict=True) if count}

    def _code(self, name: str, columns: Tensor, moment: Tensor, usage: Tensor) -> list[int]:
        """`columns` [pair, 2, columns, rows]; returns how often each expert's damping was raised."""
        usage, done = usage.to(columns.device), self.parts[name]
        order = _costly_first(moment, usage) if self.order == "activation" else None  # [pair, columns]
        if order is not None:
            columns = columns.take_along_dim(order[:, None, :, None], 2)
            moment = moment.take_along_dim(order[:, None, :, None], 2).take_along_dim(order[:, None, None], 3)
        factors = factor(moment.contiguous(), self.damping)
        coder = PairCoder(factors.cost * usage[:, :, None], columns.shape[3], done.grid)
        coded, damage = walk(columns, factors, coder, self.block)
        flags = coder.flags(coded)
        for held, found in ((done.magnitude, coder.magnitude), (done.flags, flags)):
            back = found if order is None else found.take_along_dim(order.argsort(dim=1)[:, :, None], 1)
            held.append(back.mT.contiguous())
        done.clipped += done.grid.clipped(coder.magnitude)
        self.damage[name] += damage.tolist()
        return factors.raised

    def done(self) -> MergedPairs:
        """All pairs, and the experts left alone."""
        experts, alone = self.experts, self.pairs.alone
        left = {name: weights[as_index(alone)].cpu() for name, weights in experts.matrices().items()} if alone else {}
        biases = {"gate_up_bias": experts.gate_up_bias, "down_bias": experts.down_bias}
        route = None if experts.route is None else experts.route.tolist()
        return MergedPairs(
            format=layout.EXPONENT,
            pairs=self.pairs.members,
            alone=alone,
            magnitude=self._matrices({name: done.magnitude for name, done in self.parts.items()}),
            flags=self._matrices({name: done.flags for name, done in self.parts.items()}),
            experts=left,
            route=route,
            biases={} if route is None else {name: bias.cpu() for name, bias in biases.items() if bias is not None},
            figures=self._figures(),
        )

    def _matrices(self, parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """The chunks of both stacks as the matrices that they hold."""
        if not parts:
            return {}
        rows = {"down_proj": slice(None), "up_proj": slice(-self.experts.inner, None)}
        rows |= {"gate_proj": slice(self.experts.inner)} if self.experts.gated else {}
        return {
            name: torch.cat([part[:, rows[name]] for part in parts["down" if name == "down_proj" else "gate_up"]])
            for name in self.experts.matrices()
        }

    def _figures(self) -> dict[str, Json]:
        """For the report: tokens by expert; what merging each pair costs its experts, tr(D H D^T) as damped; ..."""
        return {
            "tokens": self.tokens,
            "damage": self.damage,
            "raised": self.raised,
            "clipped": {name: done.clipped for name, done in self.parts.items()},
        }


def window(weights: Tensor) -> Window:
    """The magnitudes that one window of the format `exponent` holds, with room above the largest of the weights."""
    least, most = torch.aminmax(weights)
    largest = torch.maximum(-least, most).bfloat16()
    if not bool(largest.isfinite()):
        raise InputError(f"weights lie in {least.item()} .. {most.item()}, and bf16 has to hold them")
    exponent = int(largest.view(torch.int16)) >> layout.FRACTION_BITS
    top = min(max(exponent, 1) + HEADROOM, layout.LARGEST_EXPONENT)
    bits = torch.tensor([layout.smallest(top), layout.largest(top)], dtype=torch.int16)
    return Window(*bits.view(torch.bfloat16).tolist())


def _costly_first(moment: Tensor, usage: Tensor) -> Tensor:
    """Columns by the sum of both experts' second moments, largest first: [pair, columns]."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)  # [pair, 2, columns]
    return (diagonal * usage[:, :, None]).sum(dim=1).argsort(dim=1, descending=True, stable=True)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [compensated]
