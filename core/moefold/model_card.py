"""What a run adds to the checkpoint that it saved: the losses that it measured in the model card, its report beside it.

`save` writes the card before anything can be evaluated, and writes it anew when the directory was lost. So the section
is put in at the end of every run, from the report, whether its figures were measured now or are stored.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from moefold.artifact import Json, finite
from moefold.inside import Inside
from moefold.pipeline import Pipeline
from moefold.report import LARGE
from moefold.saved import Saved

HEADING = "## What was lost"


def write_losses(report: Mapping[str, Json], pipeline: Pipeline) -> None:
    """Put each evaluation's rows into the card of the checkpoint that it read."""
    for step, layers in report["metrics"].items():
        sources = [i for ids in pipeline.steps[step].needs.values() for i in ids if i in report["saved"]]
        rows = [row for facts in layers.values() for row in facts["rows"] if "loss_after" in row]
        for saved in sources:
            if rows:
                told = _told(report["verdicts"][saved], Inside(report, saved).measured.values())
                _write(Path(report["saved"][saved]["all"]["path"]) / "README.md", rows, told)


def write_records(report: Mapping[str, Json]) -> None:
    """Put the whole report into every checkpoint that the run saved, where `moefold compare` finds it."""
    for layers in report["saved"].values():
        for facts in layers.values():
            place = Path(facts["path"])
            if place.is_dir():
                told = {name: value for name, value in report.items() if name not in LARGE}
                (place / Saved.RECORD).write_text(json.dumps(finite(told), indent=2) + "\n", encoding="utf-8")


def _told(verdict: Mapping[str, Json], measured: Collection[Mapping[str, Json]]) -> str:
    """The report's verdict in a few sentences: intervals, gate, the layers that err most."""
    rows = verdict["texts"]
    spans = [(r["text"], r["loss_increase_interval"]) for r in rows if r["loss_increase_interval"]]
    lines = []
    if spans:
        told = ", ".join(f"{text} {low:+.4f} to {high:+.4f}" for text, (low, high) in spans)
        lines.append(f"Increase of the loss, 95 % interval over samples: {told}.")
    if verdict["passed"] is not None:
        gates = ", ".join(f"{r['text']} {r['gate']:+.4f}" for r in rows if r["gate"] is not None)
        lines.append(f"Gate ({gates}): {'passed' if verdict['passed'] else 'missed'}.")
    if worst := sorted(measured, key=lambda row: -row["output_error"])[:3]:
        told = ", ".join(f"{row['layer']} ({row['output_error']:.1%})" for row in worst)
        last = max(measured, key=lambda row: row["layer"])
        lines.append(f"Layers of the largest error: {told}; after the last, {last['cumulative_error']:.1%}.")
    return "\n\n".join(lines)


def _write(card: Path, rows: Iterable[Mapping[str, Json]], told: str) -> None:
    lines = [
        "| text | tokens | loss before | after | perplexity before | after |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['text']} | {r['tokens']:,} | {r['loss_before']:.4f} | {r['loss_after']:.4f} | "
            f"{r['perplexity_before']:.3f} | {r['perplexity_after']:.3f} |"
            for r in rows
        ),
    ]
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    table = "\n".join(lines) + (f"\n\n{told}" if told else "")
    section = f"{HEADING}\n\nLoss in nats per token, of the checkpoint as it is read back from disk.\n\n{table}\n"
    kept = text.partition(HEADING)[0].rstrip()
    if not text.endswith(section):
        card.write_text(f"{kept}\n\n{section}", encoding="utf-8")
