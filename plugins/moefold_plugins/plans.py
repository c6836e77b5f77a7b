"""What a plan says, carried out: read from a file, turned into groups, packed in the format of each layer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moefold import (
    Checkpoint,
    Context,
    Groups,
    Json,
    Layer,
    Layers,
    LevelTable,
    MergePlan,
    Packed,
    PairDamage,
    Paired,
    Stage,
    Unpacked,
    hookimpl,
    stage,
)
from moefold.errors import FormatError
from moefold_kernels import layout
from moefold_plugins.damage import CODECS
from moefold_plugins.plan_files import plan_digest, read_plan

PlanFile = Annotated[Path, Field(description="a plan.json, or the directory of a saved checkpoint that has one")]


def _reads(path: Path) -> Json:
    return plan_digest(path.expanduser())


@stage("plan.read", reads=_reads)
def plan_read(checkpoint: Checkpoint, damage: Layers[PairDamage] | None, *, path: PlanFile) -> MergePlan:
    """Take the plan that an earlier run wrote, as it is or changed by hand."""
    plan = read_plan(path.expanduser(), {str(layer.number): _size(layer) for layer in checkpoint.layers()})
    return plan if damage is None else _predicted(plan, damage)


def _size(layer: Layer) -> list[int]:
    """Experts, and weights of one."""
    total = sum(math.prod(layer.checkpoint.header(key)[0]) for key in layer.names().keys)
    return [layer.expert_count, total // layer.expert_count]


def _predicted(plan: MergePlan, damage: Layers[PairDamage]) -> MergePlan:
    """The plan with the damage of its pairs, and its bytes."""
    found = dict(damage.items())
    layers, after = {}, 0
    for number, one in found.items():
        layer = plan.layer(number)
        name, pairs = layer["format"], layer["pairs"]
        costs = [float(f"{one.relative(name, (i, j)):.5g}") for i, j in pairs] if name else []
        layers[str(number)] = layer | {"damage": costs}
        after += len(layer["alone"]) * one.expert_bytes + (len(pairs) * one.pair_bytes[name] if name else 0)
    before = sum(one.count * one.expert_bytes for one in found.values())
    return replace(plan, layers=layers, budget={"before": before, "after": after})


@stage("pair.planned")
def pair_planned(layer: Layer, plan: MergePlan) -> Groups:
    """The pairs that a plan has for a layer, to be merged for the format that it names."""
    return plan.groups(layer.number)


VERSION = max(codec.version for codec in CODECS.values())
"""Of a stage whose results any of the codecs makes: the largest of theirs, which grow."""


@stage("pack.planned", version=VERSION, keep="until read")
def pack_planned(layer: Layer, merge: Paired, plan: MergePlan, table: LevelTable | None, context: Context) -> Packed:
    """Pack merged pairs in the format that a plan names for their layer."""
    name = plan.layer(layer.number)["format"] or layout.EXPONENT
    codec = CODECS[name]()
    return (codec if table is None else codec.with_levels(table)).packed(merge.to(context.device))


@stage("unpack.planned", keep="never")
def unpack_planned(packed: Packed, layer: Layer, context: Context) -> Unpacked:
    """Decode a packed layer, whatever its format."""
    if packed.format not in CODECS:
        raise FormatError(f"unpack.planned knows {', '.join(CODECS)}; for {packed.format} use unpack.{packed.format}")
    return CODECS[packed.format]().unpacked(packed, layer, context.device)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [plan_read, pair_planned, pack_planned, unpack_planned]
