"""From the facts of a run to a report: one JSON document, and a table for the terminal.

The document's schema is at version 2: beside what was saved and lost it holds what `moefold compare` needs, which is
the model's fingerprint and number of expert weights (`model`), which steps are the method's own and which calibrate
(`methods`), the uncompressed model's losses with a digest of each text (`baselines`), and peaks of stored results.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moefold.artifact import Artifact, Json
from moefold.artifacts import Activity, Baseline, Metrics, Text
from moefold.methods import methods, model
from moefold.pipeline import Pipeline
from moefold.plan import Plan
from moefold.replacements import Packed, Reduced
from moefold.run import Event
from moefold.saved import Saved

VERSION = 2
"""Of the report's schema; raised when a field changes its meaning."""

_STOCK = "import transformers"
_LIBRARIES = ("moefold", "torch", "transformers", "safetensors", "triton")


@dataclass
class Times:
    """A reporter that adds up what each step took in this run."""

    steps: dict[str, dict[str, float]] = field(default_factory=dict)
    totals: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        if event.kind == "planned":
            self.totals = dict(event.totals)
        elif event.kind == "finished":
            step = self.steps.setdefault(
                event.step, {"ran": 0, "seconds": 0.0, "peak_bytes": 0, "peak_device_bytes": 0}
            )
            step["ran"] += 1
            step["seconds"] += event.seconds
            step["peak_bytes"] = max(step["peak_bytes"], event.peak_bytes)
            step["peak_device_bytes"] = max(step["peak_device_bytes"], event.peak_device_bytes)


def build(plan: Plan, facts: Mapping[str, Json], times: Times, device: str) -> dict[str, Json]:
    """The report of a finished run: what was saved, what was lost, what it took, and what to be wary of."""
    pipeline = plan.pipeline
    report: dict[str, Json] = {
        "version": VERSION,
        "pipeline": pipeline.resolved(),
        "source": pipeline.source,
        "model": model(plan),
        "methods": methods(pipeline),
        "device": device,
        "versions": {name: _version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
        "texts": _made(pipeline, facts, Text),
        "activity": _made(pipeline, facts, Activity),
        "packed": _made(pipeline, facts, Packed),
        "reduced": _made(pipeline, facts, Reduced),
        "saved": _made(pipeline, facts, Saved),
        "baselines": _made(pipeline, facts, Baseline),
        "metrics": _made(pipeline, facts, Metrics),
        "stages": {step: _took(step, facts, times) for step in pipeline.steps if step in times.totals},
    }
    report["warnings"] = list(_warnings(report))
    return report


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _made(pipeline: Pipeline, facts: Mapping[str, Json], kind: type[Artifact]) -> dict[str, Json]:
    """The facts of every step that makes this kind of artifact, by step and layer."""
    steps = [s.id for s in pipeline.steps.values() if issubclass(s.stage.produces, kind)]
    return {s: {layer: note["facts"] for layer, note in facts[s].items()} for s in steps if s in facts}


def _took(step: str, facts: Mapping[str, Json], times: Times) -> dict[str, Json]:
    """Tasks, seconds and peaks of a step: in this run, and of its results whenever they were made."""
    notes = facts.get(step, {}).values()
    ran, total = times.totals[step]
    now = times.steps.get(step, {"ran": 0, "seconds": 0.0, "peak_bytes": 0, "peak_device_bytes": 0})
    return {
        "tasks": total,
        "to_run": ran,
        **now,
        "stored_seconds": sum(note["seconds"] for note in notes),
        "stored_peak_bytes": max((note["peak_bytes"] for note in notes), default=0),
        "stored_peak_device_bytes": max((note["peak_device_bytes"] for note in notes), default=0),
    }


def _warnings(report: Mapping[str, Json]) -> Iterator[str]:
    for step, layers in report["texts"].items():
        for facts in layers.values():
            for source in facts["sources"]:
                if source["samples"] < source["wanted"]:
                    yield f"{step}: the text gave {source['samples']} samples of {source['wanted']} asked for"
    for step, layers in report["activity"].items():
        for layer, facts in layers.items():
            if facts["starved"]:
                yield (
                    f"{step}: layer {layer}: experts {_short(facts['starved'])} saw fewer than {facts['minimum']} "
                    "calibration tokens; the layer's statistics stand for theirs"
                )
    for step, layers in report["packed"].items():
        clipped = sum(facts["counts"].get("clipped", 0) for facts in layers.values())
        if clipped:
            yield f"{step}: {clipped} values were above the exponent window and clipped; leave `window` to the data"

    for step, layers in report["reduced"].items():
        for layer, facts in layers.items():
            if thin := facts["figures"].get("thin"):
                yield (
                    f"{step}: layer {layer}: merged experts {_short(thin)} were fitted on fewer calibration tokens "
                    "than they have neurons, and lean on the average of their members; more text helps"
                )


def _short(numbers: Iterable[int], most: int = 12) -> str:
    listed = list(numbers)
    text = ", ".join(map(str, listed[:most]))
    return text if len(listed) <= most else f"{text} and {len(listed) - most} more"


def show(report: Mapping[str, Json], console: Console) -> None:
    """Print the report's summary: bytes, losses, masks, exponents, experts, seconds, memory, how to load."""
    for line in report["warnings"]:
        console.print(f"[yellow]warning[/]: {escape(line)}", highlight=False, soft_wrap=True)
    saved = [facts for layers in report["saved"].values() for facts in layers.values()]
    if saved:
        console.print(_size_table(saved[0]))
    for layers in report["metrics"].values():
        for facts in layers.values():
            console.print(_metric_table(facts))
    console.print(_stage_table(report["stages"]))
    for facts in saved:
        console.print(_how_to_load(facts), highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _size_table(facts: Mapping[str, Json]) -> Table:
    table = _table("What was saved", "", "before", "after", "ratio")
    for label, key in (("expert bytes", "expert_bytes"), ("whole checkpoint", "checkpoint_bytes")):
        before, after = facts[key]["before"], facts[key]["after"]
        table.add_row(label, size(before), size(after), f"{after / before:.3f}x")
    table.add_section()
    if "masks" in facts:
        for label, key in (("shared by both", "shared"), ("first expert's", "own"), ("second expert's", "other")):
            table.add_row(f"mask: {label}", "", f"{facts['masks'][key]:.1%}", "")
        table.add_row("exponents clipped / flushed to zero", "", f"{facts['clipped']:,} / {facts['flushed']:,}", "")
    before, after = (sum(counts[i] for counts in facts["experts"].values()) for i in (0, 1))
    if before != after:
        table.add_row("experts", f"{before:,}", f"{after:,}", f"{after / before:.3f}x")
    starved = facts["starved"]
    told = "not calibrated" if starved is None else str(sum(len(experts) for experts in starved.values()))
    table.add_row("experts that saw too few tokens", "", told, "")
    if facts["thin"]:
        thin = sum(len(experts) for experts in facts["thin"].values())
        table.add_row("merged experts fitted on few tokens", "", str(thin), "")
    for kind, count in facts["kinds"].items():
        table.add_row(f"layers {kind}", str(facts["layers"]), str(count), "")
    return table


def _metric_table(facts: Mapping[str, Json]) -> Table:
    rows = facts["rows"]
    if not rows or "loss_before" not in rows[0]:
        columns = list(rows[0]) if rows else []
        table = _table(facts["title"], *columns)
        for row in rows:
            table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
        return table
    table = _table(
        "What was lost (nats per token)",
        "text",
        "tokens",
        "loss",
        "after",
        "increase",
        "perplexity",
        "after",
    )
    for row in rows:
        table.add_row(
            escape(row["text"]),
            f"{row['tokens']:,}",
            f"{row['loss_before']:.4f}",
            f"{row['loss_after']:.4f}",
            f"{row['loss_increase']:+.4f}",
            f"{row['perplexity_before']:.3f}",
            f"{row['perplexity_after']:.3f}",
        )
    return table


def _stage_table(stages: Mapping[str, Json]) -> Table:
    table = _table("What it took", "stage", "ran", "stored", "seconds", "peak memory")
    for step, took in stages.items():
        stored = took["tasks"] - took["to_run"]
        seconds = f"{took['seconds']:.1f}" if took["ran"] else "-"
        peak = size(took["peak_bytes"]) if took["ran"] else "-"
        if took["peak_device_bytes"]:
            peak += f" + {size(took['peak_device_bytes'])} on the device"
        table.add_row(step, str(took["to_run"]), str(stored), seconds, peak)
    ran = [took for took in stages.values() if took["ran"]]
    if ran:
        table.add_section()
        total = sum(took["seconds"] for took in ran)
        table.add_row("all", "", "", f"{total:.1f}", size(max(took["peak_bytes"] for took in ran)))
    return table


def _how_to_load(facts: Mapping[str, Json]) -> str:
    path, imports = escape(facts["path"]), "import moefold, transformers" if facts["needs_moefold"] else _STOCK
    return (
        f"\nsaved in [bold]{path}[/]; load it with\n\n"
        f"  {imports}\n"
        f'  model = transformers.AutoModelForCausalLM.from_pretrained("{path}")\n'
    )


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
