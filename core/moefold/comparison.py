"""Runs side by side: what each kept, lost and took, in groups of equal bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from moefold.artifact import Json
from moefold.comparable import check
from moefold.runs import Run, read
from moefold.verdict import is_random

EQUAL = 0.01
"""Runs whose expert bytes differ by no more than this part of them are of equal bytes."""


@dataclass(frozen=True)
class Loss:
    """How well a model predicts one text: nats per token, and how many more than the uncompressed model takes."""

    loss: float
    increase: float | None
    perplexity: float
    increase_low: float | None = None
    """Ends of the 95 % interval of the increase over samples; None where it is not known."""
    increase_high: float | None = None
    recovery: float | None = None
    """Perplexity before / after."""


@dataclass(frozen=True)
class Cost:
    """What stages took, whenever they ran: what was stored was paid for once, and would be by the next user."""

    seconds: float
    """Added up over workers."""
    peak_bytes: int
    peak_device_bytes: int


@dataclass(frozen=True)
class Row:
    """What a method kept, lost and took; None where it does not apply to the uncompressed model."""

    run: str
    method: str
    random: bool
    """A random baseline: what chance gives, for the others to be held against."""
    experts: tuple[int, int]
    """Routed experts of all layers together, before and after."""
    per_layer: str
    expert_bytes: int
    ratio: float
    bits_per_weight: float
    losses: dict[str, Loss]
    group: int = 0
    """Rows of one number have equal bytes."""
    own: Cost | None = None
    """Of the method's own stages and saving."""
    calibration: Cost | None = None
    passed: bool | None = None
    """Whether it met the gate that its pipeline states; None: it states none."""

    @property
    def increase(self) -> float:
        """Mean over the texts; what rows are ordered by."""
        return fmean(loss.increase or 0.0 for loss in self.losses.values())


@dataclass(frozen=True)
class Comparison:
    """Methods on one model and the same texts; rows by bytes, then by loss."""

    model: str
    texts: dict[str, int]
    """Tokens by text."""
    uncompressed: Row
    rows: list[Row]
    warnings: list[str]

    def to_json(self) -> dict[str, Json]:
        """All of it as plain JSON."""
        return asdict(self)


def compare(places: Sequence[Path]) -> Comparison:
    """Read runs and lay them side by side; raises InputError where they are not of one model and the same texts."""
    runs = read(places)
    warnings = list(check(runs))
    first = runs[0]
    texts = {name: int(row["tokens"]) for name, row in first.losses.items()}
    rows = _grouped([_row(run) for run in runs])
    return Comparison(first.report["model"]["name"], texts, _uncompressed(first), rows, warnings)


def _grouped(rows: list[Row]) -> list[Row]:
    """The largest first; among equal bytes (of the group's largest), what lost least first."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -row.expert_bytes):
        if groups and row.expert_bytes >= groups[-1][0].expert_bytes * (1 - EQUAL):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [
        replace(row, group=number)
        for number, group in enumerate(groups, 1)
        for row in sorted(group, key=lambda row: (math.isnan(row.increase), row.increase))
    ]


def _row(run: Run) -> Row:
    size = run.saved["expert_bytes"]
    verdict = run.report["verdicts"].get(run.step, {})
    rows = {row["text"]: row for row in verdict.get("texts", ())}
    losses = {text: _loss(row, rows.get(text, {})) for text, row in run.losses.items()}
    return Row(
        run.name,
        method(run.method),
        is_random(run.method),
        *_experts(run.saved["experts"]),
        expert_bytes=size["after"],
        ratio=size["after"] / size["before"],
        bits_per_weight=size["after"] * 8 / run.report["model"]["expert_weights"],
        losses=losses,
        own=_cost(run, "own"),
        calibration=_cost(run, "calibration"),
        passed=verdict.get("passed"),
    )


def _loss(row: Mapping[str, Json], judged: Mapping[str, Json]) -> Loss:
    low, high = judged.get("loss_increase_interval") or (None, None)
    return Loss(row["loss_after"], row["loss_increase"], row["perplexity_after"], low, high, judged.get("recovery"))


def _uncompressed(run: Run) -> Row:
    size = run.saved["expert_bytes"]["before"]
    before = {number: [count, count] for number, (count, _) in run.saved["experts"].items()}
    losses = {text: Loss(row["loss_before"], None, row["perplexity_before"]) for text, row in run.losses.items()}
    bits = size * 8 / run.report["model"]["expert_weights"]
    return Row("uncompressed", "", False, *_experts(before), size, 1.0, bits, losses)


def _cost(run: Run, part: str) -> Cost:
    took = [run.report["stages"][step] for step in run.method[part] if step in run.report["stages"]]
    return Cost(
        math.fsum(one["stored_seconds"] for one in took),
        max((one["stored_peak_bytes"] for one in took), default=0),
        max((one["stored_peak_device_bytes"] for one in took), default=0),
    )


def _experts(layers: Mapping[str, Sequence[int]]) -> tuple[tuple[int, int], str]:
    """All layers' experts before and after, and the same of a layer, for people."""
    before, after = (sorted({counts[i] for counts in layers.values()}) for i in (0, 1))
    told = _range(before) if before == after else f"{_range(before)} -> {_range(after)}"
    return (sum(b for b, _ in layers.values()), sum(a for _, a in layers.values())), told


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"


def method(found: Mapping[str, Json]) -> str:
    """A method in short: its steps in order, with the options that are not the defaults."""
    steps = " -> ".join(_step(step) for step in found["steps"]) or "as it was"
    through = f", calibrated through {', '.join(found['through'])}" if found["through"] else ""
    return steps + through


def _step(step: Mapping[str, Json]) -> str:
    options = ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in step["with"].items()
    )
    return f"{step['uses']}({options})" if options else step["uses"]
