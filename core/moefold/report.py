"""From the facts of a run to a report: one JSON document, whose fields report_schema.py defines."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moefold.artifact import Artifact, Json
from moefold.artifacts import Activity, Baseline, Groups, Metrics, Text
from moefold.maps import maps
from moefold.merge_plan import MergePlan
from moefold.merged_pairs import MergedPairs
from moefold.methods import methods, model
from moefold.pipeline import Pipeline
from moefold.plan import Plan
from moefold.replacements import Packed, Quantized, Reduced
from moefold.report_schema import VERSION
from moefold.run import Event
from moefold.saved import Saved
from moefold.sensitivity import sensitivity
from moefold.store import Store
from moefold.verdict import verdicts

LARGE = ("similarity",)
"""Fields that the copy in a saved checkpoint does without."""

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


def build(
    plan: Plan,
    facts: Mapping[str, Json],
    times: Times,
    device: str,
    store: Store | None = None,
    events: Sequence[Json] = (),
) -> dict[str, Json]:
    """The report of a finished run: what was saved, what was lost, what it took, and what to be wary of.

    Similarities and costs are read from `store`; `events` are the ledger's.
    """
    pipeline = plan.pipeline
    report: dict[str, Json] = {
        "version": VERSION,
        "pipeline": pipeline.resolved(),
        "source": pipeline.source,
        "model": model(plan),
        "methods": methods(pipeline),
        "device": device,
        "machine": _machine(device),
        "versions": {name: _version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
        "texts": _made(pipeline, facts, Text),
        "activity": _made(pipeline, facts, Activity),
        "merged": _made(pipeline, facts, MergedPairs),
        "packed": _made(pipeline, facts, Packed),
        "reduced": _made(pipeline, facts, Reduced),
        "quantized": _made(pipeline, facts, Quantized),
        "saved": _made(pipeline, facts, Saved),
        "baselines": _made(pipeline, facts, Baseline),
        "metrics": _made(pipeline, facts, Metrics),
        "stages": {step: _took(step, facts, times) for step in pipeline.steps if step in times.totals},
        "stage_versions": {step.stage.name: step.stage.version for step in pipeline.steps.values()},
        "groups": _made(pipeline, facts, Groups),
        "plans": _made(pipeline, facts, MergePlan),
        "similarity": {} if store is None else maps(plan, store),
        "tasks": {step: _tasks(notes) for step, notes in facts.items()},
        "events": list(events),
    }
    report["verdicts"] = verdicts(report)
    report["sensitivity"] = sensitivity(report)
    report["warnings"] = list(_warnings(report, _positions(plan)))
    return report


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine(device: str) -> str:
    """What computed: the GPU's name, or the processor's kind; no name of the host, because reports are published."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def _made(pipeline: Pipeline, facts: Mapping[str, Json], kind: type[Artifact]) -> dict[str, Json]:
    """The facts of every step that makes this kind of artifact, by step and layer."""
    steps = [s.id for s in pipeline.steps.values() if issubclass(s.stage.produces, kind)]
    return {s: {layer: note["facts"] for layer, note in facts[s].items()} for s in steps if s in facts}


def _tasks(notes: Mapping[str, Json]) -> dict[str, Json]:
    """By layer, whenever a task ran: seconds, peak memory of host and device."""
    return {at: [round(n["seconds"], 4), n["peak_bytes"], n["peak_device_bytes"]] for at, n in notes.items()}


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


def _positions(plan: Plan) -> int | None:
    """How many positions of a text the model was made for, where its config says so."""
    config = next(iter(plan.tasks.values())).checkpoint.config
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _warnings(report: Mapping[str, Json], positions: int | None) -> Iterator[str]:
    for step, layers in report["texts"].items():
        for facts in layers.values():
            for source in facts["sources"]:
                if source["samples"] < source["wanted"]:
                    yield f"{step}: the text gave {source['samples']} samples of {source['wanted']} asked for"
            if positions is not None and facts["length"] > positions:
                yield (
                    f"{step}: samples of {facts['length']} tokens are longer than the model's {positions} positions "
                    "(max_position_embeddings), beyond which it was not trained; write a smaller length"
                )
    for step, layers in report["activity"].items():
        for layer, facts in layers.items():
            if facts["starved"]:
                yield (
                    f"{step}: layer {layer}: experts {_short(facts['starved'])} saw fewer than {facts['minimum']} "
                    "calibration tokens; where a stage needs their statistics, the layer's stand for them"
                )
    for step, layers in report["packed"].items():
        clipped = sum(facts["counts"].get("clipped", 0) for facts in layers.values())
        if clipped:
            yield f"{step}: {clipped} values were above the exponent window and clipped; leave `window` to the data"

    for step, layers in (*report["merged"].items(), *report["reduced"].items(), *report["quantized"].items()):
        for layer, facts in layers.items():
            yield from (f"{step}: layer {layer}: {told}" for told in _of_moments(facts.get("figures", {})))

    for step, layers in report["saved"].items():
        for facts in layers.values():
            if facts.get("replaced_layers") == 0:
                yield f"{step}: no layer's experts were replaced: what was saved is the source; see skip and fraction"

    for step, layers in report["reduced"].items():
        for layer, facts in layers.items():
            if thin := facts["figures"].get("thin"):
                yield (
                    f"{step}: layer {layer}: merged experts {_short(thin)} were fitted on fewer calibration tokens "
                    "than they have neurons, and lean on the average of their members; more text helps"
                )
        bits = {facts["figures"].get("bits_per_weight") for facts in layers.values()} - {None}
        if bits:
            yield (
                f"{step}: experts' values are of {', '.join(f'{one:g}' for one in sorted(bits))} bits a weight, scales "
                "counted, and dense weights hold them: bytes, here and in comparisons, are of those"
            )


def _of_moments(figures: Mapping[str, Json]) -> Iterator[str]:
    """What a method that works with moments had to put up with: their damping raised, magnitudes clipped."""
    for matrix, counts in (figures.get("raised") or {}).items():
        if counts:
            experts = _short(sorted(map(int, counts)))
            yield (
                f"moments of experts {experts} ({matrix}) had no Cholesky factor until their damping was raised, up to "
                f"{10 ** max(counts.values()):,} times; more text helps, or a larger damping or blend"
            )
    for matrix, count in (figures.get("clipped") or {}).items():
        if count:
            yield f"{count:,} merged magnitudes ({matrix}) were beyond the format's exponents: its largest number now"


def _short(numbers: Iterable[int], most: int = 12) -> str:
    listed = list(numbers)
    text = ", ".join(map(str, listed[:most]))
    return text if len(listed) <= most else f"{text} and {len(listed) - most} more"


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
