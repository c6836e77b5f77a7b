"""Merging a layer's pairs chunk by chunk: neurons in order, gate and up coded, then down for what they have become."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefold import Experts, Groups, Json, Levels, LevelTable, MergedPairs
from moefold.artifacts import as_index
from moefold_kernels import layout, layout_pairs
from moefold_plugins.compensation import Walk, damped, factor
from moefold_plugins.lost import Change, Lost
from moefold_plugins.moments import Calibration, Changed, Inputs
from moefold_plugins.neurons import matched, reorder
from moefold_plugins.pair_codecs import sample
from moefold_plugins.pair_coding import Grid, Leveled, PairCoder, Window
from moefold_plugins.pair_stack import Coded, Stack
from moefold_plugins.targets import left, pulled, row_weights

PARTS = 2
"""In how many parts pairs are coded once more. Those of one part all make up for the same losses: on the shipped model
(8 pairs, 4 experts a token) two parts left as little as eight, and each part is a walk over columns of its own."""


class Rules(NamedTuple):
    """The stage's options."""

    weigh: str = "usage"
    damping: float = 0.01
    block: int = 128
    order: str = "natural"
    neurons: str = "matched"
    sweeps: int = 2
    format: str = layout.EXPONENT


class Merge:
    """A layer's pairs, merged chunk by chunk."""

    def __init__(self, experts: Experts, pairs: Groups, rules: Rules, table: LevelTable | None = None) -> None:
        self.experts, self.pairs, self.rules = experts, pairs, rules
        self.stacks = {"gate_up": Stack(experts.gate_up), "down": Stack(experts.down)}
        self.tokens: dict[str, int] = {}
        self.output: list[list[float]] = []
        self.matched: list[bool] = []
        biases = {"gate_up_bias": experts.gate_up_bias, "down_bias": experts.down_bias}
        self.biases = {name: bias.clone() for name, bias in biases.items() if bias is not None}
        paired = [expert for pair in pairs.members for expert in pair]
        self.windows: dict[str, Window] = {}
        self.levels: dict[str, Levels] = {}
        for name, stack in self.stacks.items() if paired else ():
            if rules.format == layout.EXPONENT:
                self.windows[name] = Window.over(stack.weights, paired)
                continue
            bits = layout_pairs.magnitude_bits(rules.format)
            learnt = (
                table.levels(bits) if table else Levels.learn(sample(stack.weights, members=as_index(paired)), bits)
            )
            self.levels[name] = learnt

    def add(self, chunk: list[list[int]], calibration: Calibration, lost: Lost | None = None) -> None:
        """Merge some pairs: gate and up, then down for what they have become (and for what is `lost`, if given)."""
        members = [expert for pair in chunk for expert in pair]
        seen = calibration.inputs(members)
        self.tokens |= dict(zip(map(str, members), seen.tokens, strict=True))
        by_use = self.rules.weigh == "usage"
        usage = usages(seen.tokens, calibration.blend, self.rules.weigh).to(seen.x.device)
        experts, seen = self._members(members, seen, usage)
        usage = usage[:, None]
        weight = usage * row_weights(experts, seen) if by_use else usage.expand(-1, experts.gate_up.shape[1])
        coded = self._code("gate_up", experts.gate_up, weight, seen.x)
        self.stacks["gate_up"].keep(members, coded)
        del seen
        gate_up = coded.experts().to(experts.gate_up.dtype)
        changed = calibration.changed(members, experts, gate_up)
        weight = usage.expand(-1, experts.down.shape[1])
        coded = self._code("down", experts.down, weight, changed.h, changed)
        if lost is not None:
            change = Change(members, experts, replace(experts, gate_up=gate_up))
            coded = self._together(change, coded, weight, changed, lost)
        self.stacks["down"].keep(members, coded)
        self.output += left(experts.down, coded.experts(), changed).view(-1, 2).tolist()

    def _together(self, change: Change, coded: Coded, weight: Tensor, changed: Changed, lost: Lost) -> Coded:
        """Down once more, part after part, given what all that has been coded of the layer has lost."""
        dtype, down = change.before.down.dtype, coded.experts()
        change = replace(change, after=replace(change.after, down=down.to(dtype)))
        lost.add(change)
        found = []
        pairs = -(-len(change.members) // (2 * PARTS))
        for first in range(0, len(change.members), 2 * pairs):
            some = slice(first, first + 2 * pairs)
            own = change.of(some)
            given = Changed(changed.h[some], changed.cross[some], changed.lost[some])
            now = self._code("down", own.before.down, weight[some], given.h, given, lost.pull(own))
            lost.add(Change(own.members, own.after, replace(own.after, down=now.experts().to(dtype))))
            found.append(now)
        return Coded.joined(found)

    def lost(self, tokens: int) -> float:
        """What the outputs of so many tokens lose: the root of the mean squared length, as if experts' losses had
        nothing to do with each other."""
        each = zip(self.tokens.values(), (loss for pair in self.output for loss in pair), strict=True)
        return math.sqrt(math.fsum(count * loss for count, loss in each) / tokens)

    def _members(self, members: list[int], seen: Inputs, usage: Tensor) -> tuple[Experts, Inputs]:
        """The members alone, their neurons in the order in which they are merged; and what was seen, in that order."""
        index, all_biases = as_index(members), self.biases.get("gate_up_bias")
        bias = None if all_biases is None else all_biases[index]
        found = Experts(self.experts.gate_up[index], self.experts.down[index], bias, gated=self.experts.gated)
        if self.rules.neurons == "natural":
            self.matched += [False] * (len(members) // 2)
            return found, seen
        orders = matched(found, seen, usage)
        natural = torch.arange(found.inner, device=orders.device)
        self.matched += (orders != natural).any(dim=1).view(-1, 2).any(dim=1).tolist()
        for row, order in enumerate(orders):
            reorder(found, row, order)
        if all_biases is not None and bias is not None:
            all_biases[index] = bias
        slope = seen.slope.unflatten(1, (-1, found.inner)).take_along_dim(orders[:, None], 2).flatten(1)
        return found, seen._replace(activity=seen.activity.gather(1, orders), slope=slope)

    def _code(
        self,
        name: str,
        weights: Tensor,
        weight: Tensor,
        moment: Tensor,
        changed: Changed | None = None,
        others: Tensor | None = None,
    ) -> Coded:
        """Merge one stack [member, rows, columns] under `moment` by its rows' `weight`; `others`: see `pulled`."""
        rules = self.rules
        columns = weights.unflatten(0, (-1, 2)).mT  # [pair, 2, columns, rows]
        moment, weight = moment.unflatten(0, (-1, 2)), weight.unflatten(0, (-1, 2)).contiguous()
        order = costly_first(moment) if rules.order == "activation" else None  # [pair, columns]
        if order is not None:
            columns, moment = columns.take_along_dim(order[:, None, :, None], 2), _in_order(moment, order)
        factors = factor(moment.clone(), rules.damping)
        target = columns
        if changed is not None:
            cross = changed.cross.unflatten(0, (-1, 2))
            others = None if others is None else others.unflatten(0, (-1, 2))
            if order is not None:
                cross = _in_order(cross, order)
                others = None if others is None else others.take_along_dim(order[:, None, None], 3)
            target = pulled(columns, cross, factors, others)
        grid = self._grid(name, columns.device)
        walk = Walk(target, PairCoder(grid, weight), rules.block, torch.bfloat16)
        damage = walk.first(factors)
        with damped(moment, rules.damping, factors.raised):
            for _ in range(rules.sweeps):
                damage = walk.again(moment)
        back = None if order is None else order.argsort(dim=1)[:, None, :, None]
        read = walk.read if back is None else walk.read.take_along_dim(back, 2)  # [pair, 2, columns, rows]
        scale = grid.scales() if isinstance(grid, Leveled) else None
        return Coded(read, damage, factors.raised, scale, grid.clipped(read.abs().amax(dim=1)))

    def _grid(self, name: str, device: torch.device) -> Grid:
        return self.windows[name] if name in self.windows else Leveled(self.levels[name], device)

    def done(self, lost: float | None = None) -> MergedPairs:
        """All pairs, and the experts left alone; `lost` is what the layer's output lost, for the report."""
        experts, alone = self.experts, self.pairs.alone
        left = {name: weights[as_index(alone)].cpu() for name, weights in experts.matrices().items()} if alone else {}
        route = None if experts.route is None else experts.route.tolist()
        settings = {name: {"levels": list(levels.values)} for name, levels in self._by_matrix(self.levels).items()}
        return MergedPairs(
            format=self.rules.format,
            pairs=self.pairs.members,
            alone=alone,
            magnitude=self._matrices({name: stack.magnitude for name, stack in self.stacks.items()}),
            flags=self._matrices({name: stack.flags for name, stack in self.stacks.items()}),
            experts=left,
            scale=self._matrices({name: stack.scale for name, stack in self.stacks.items()}),
            settings=settings,
            route=route,
            biases={name: bias.cpu() for name, bias in self.biases.items()},
            figures=self._figures() | {"lost": lost},
        )

    def _by_matrix(self, values: dict[str, Any]) -> dict[str, Any]:
        """What there is of a stack, by the names of its matrices."""
        if not values:
            return {}
        return {name: values["down" if name == "down_proj" else "gate_up"] for name in self.experts.matrices()}

    def _matrices(self, parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Chunks of stacks as the matrices that they hold."""
        inner = self.experts.inner
        rows = {"gate_proj": slice(inner), "up_proj": slice(-inner, None), "down_proj": slice(None)}
        return {
            name: torch.cat([part[:, rows[name]] for part in chunks])
            for name, chunks in self._by_matrix(parts).items()
            if chunks
        }

    def _figures(self) -> dict[str, Json]:
        """By stack, expert or pair.

        `damage`: see `Stack`; `output` is mean g^2 |f - f'|^2 of each expert's output, gate, up and down in one.
        `raised`: how often damping had to be raised tenfold. `matched`: pairs whose neurons were put in another order.
        """
        return {
            "tokens": self.tokens,
            "unseen": [int(expert) for expert, count in self.tokens.items() if not count],
            "damage": {name: stack.damage for name, stack in self.stacks.items()} | {"output": self.output},
            "matched": self.matched,
            "raised": {name: stack.raised for name, stack in self.stacks.items()},
            "clipped": {name: stack.clipped for name, stack in self.stacks.items()},
        }


def usages(tokens: list[int], blend: float, weigh: str) -> Tensor:
    """How much each expert's errors count: by its tokens, those that blending added among them, or alike."""
    return torch.tensor([max(count + blend, 1.0) if weigh == "usage" else 1.0 for count in tokens])


def _in_order(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of [pair, 2, columns, columns] in an order [pair, columns]."""
    return matrix.take_along_dim(order[:, None, :, None], 2).take_along_dim(order[:, None, None], 3)


def costly_first(moment: Tensor) -> Tensor:
    """Columns by both experts' second moments [pair, 2, columns, columns], largest sum first: [pair, columns]."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)  # [pair, 2, columns]
    return diagonal.sum(dim=1).argsort(dim=1, descending=True, stable=True)
