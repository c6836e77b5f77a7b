"""Error-compensated pair merging: PuzzleMoE's pair code (arXiv 2511.04805), coded as GPTQ does (arXiv 2210.17323).

The pair format has one magnitude for two weights. Here each element takes the best of three choices (pair_coding), and
what it gets wrong in a column is made up for in the other columns of each expert, by that expert's own second moments
(compensation, moments). Down is coded for the hidden activations that coded gate and up give (targets), and the neurons
of a pair are put beside each other so that they are cheap to merge (neurons). Bits and kernels are those of the
published merge.

Then down is coded once more, so that each expert makes up for what the layer's others have lost for its tokens (lost).

Memory: for each expert in hand 8 bytes of an entry of its inputs' moments, or 12 of its hidden activations' where that
is more, 12 of an entry of gate and up, or 20 of down's where that is more, and two copies of its weights. Pairs are
taken in chunks that fit a budget (half of what a GPU has free), each of which goes over the calibration tokens twice,
and three times more where down is coded once more; tokens stay on the GPU where they take an eighth of what it has free
at most, and so does what each of them has lost, 4 bytes of an entry. DeepSeek-V3 (7168, 2048): 0.94 GB an expert, 240
GB for all 256 at once. Each chunk makes up for itself and for those before it: with `together`, how many there are
changes down a little.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from moefold import Context, Experts, Groups, Layer, LevelTable, MergedPairs, Routed, Stage, hookimpl, stage
from moefold.errors import InputError
from moefold_kernels import layout
from moefold_plugins.averaging import check_groups
from moefold_plugins.lost import Lost
from moefold_plugins.moments import Calibration
from moefold_plugins.pair_merging import Merge, Rules

BUDGET = 4 * 2**30
"""Bytes of moments and weights held at a time where there is no GPU."""

Damping = Annotated[float, Field(gt=0, description="added to the moments' diagonal, in units of its mean")]
Block = Annotated[int, Field(ge=1, description="columns between which errors are pushed on one by one")]
Blend = Annotated[
    float, Field(ge=0, description="how many of an expert's own tokens count as much as the layer's; 0: own ones only")
]
Sweeps = Annotated[int, Field(ge=0, description="how often to code every column again, given all others")]
Weigh = Annotated[
    Literal["equal", "usage"],
    Field(
        description="whose errors count: both experts' alike, or by tokens routed to them and what rows do to outputs"
    ),
]
Order = Annotated[
    Literal["natural", "activation"],
    Field(description="columns as they are, or those first in which errors cost most (exponent only)"),
]
Neurons = Annotated[
    Literal["matched", "natural"],
    Field(description="which neurons of a pair are merged with each other: those that cost least, or by number"),
]
Together = Annotated[
    bool,
    Field(description="code down once more so that it makes up for what the layer's other experts lost"),
]
Format = Literal["exponent", "pair8", "pair6", "pair5", "pair4"]


@stage("puzzlemoe.compensated", version=5, keep="until read")
def compensated(
    layer: Layer,
    routed: Routed,
    experts: Experts,
    pairs: Groups,
    levels: LevelTable | None,
    context: Context,
    *,
    format: Annotated[
        Format | None, Field(description="whose magnitudes to round to (default: the plan's, or exponent)")
    ] = None,
    weigh: Weigh = "usage",
    blend: Blend = 1024.0,
    damping: Damping = 0.01,
    sweeps: Sweeps = 2,
    block: Block = 128,
    order: Order = "natural",
    neurons: Neurons = "matched",
    together: Together = True,
) -> MergedPairs:
    """Merge each pair element by element, making up for each column's error in the others, by what experts see.

    `figures.lost` is the length of what a calibration token's output loses, the mean over tokens; without `together`
    the root of the mean square, of experts that have nothing to do with each other.
    """
    if any(len(pair) != 2 for pair in pairs.members):
        raise InputError("puzzlemoe.compensated merges pairs; use a pair.* stage before it")
    target = _format(layer, pairs, format)
    if order != "natural" and target != layout.EXPONENT:
        raise InputError(f"puzzlemoe.compensated: {target} has scales for columns in their order; write order: natural")
    check_groups(pairs.all(), experts.count)
    experts = experts.to(context.device)
    merge = Merge(experts, pairs, Rules(weigh, damping, block, order, neurons, sweeps, target), levels)
    if pairs.members:
        calibration = Calibration(layer, routed, experts, blend)
        lost = Lost(calibration) if together else None  # before chunks: what it takes is not free for them
        for chunk in chunks(pairs.members, experts):
            merge.add(chunk, calibration, lost)
        return merge.done(merge.lost(len(routed.tokens)) if lost is None else lost.mean())
    return merge.done()


def _format(layer: Layer, pairs: Groups, asked: Format | None) -> str:
    """What the option names, or the plan; raises InputError where they differ."""
    if asked and pairs.format and asked != pairs.format:
        raise InputError(f"layer {layer.number}: the plan says {pairs.format}, and the option format {asked}; drop it")
    return asked or pairs.format or layout.EXPONENT


def chunks(pairs: list[list[int]], experts: Experts) -> Iterator[list[list[int]]]:
    """The pairs, as many at a time as fit the budget."""
    device = experts.down.device
    budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else BUDGET
    size = max(1, budget // (2 * bytes_in_hand(experts)))
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def bytes_in_hand(experts: Experts) -> int:
    """Bytes of moments and weights for each expert in hand."""
    hidden, inner = experts.down.shape[1:]
    up, down = experts.gate_up[0].numel(), experts.down[0].numel()
    moments = max(2 * hidden**2, 3 * inner**2)
    return 4 * (moments + max(3 * up, 5 * down)) + 2 * experts.down.element_size() * (up + down)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [compensated]
