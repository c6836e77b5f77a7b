"""What a run adds to the checkpoint that it saved: the losses that it measured in the model card, its report beside it.

`save` writes the card before anything can be evaluated, and writes it anew when the directory was lost. So the section
is put in at the end of every run, from the report, whether its figures were measured now or are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from moefold.artifact import Json
from moefold.pipeline import Pipeline
from moefold.saved import Saved

HEADING = "## What was lost"


def write_losses(report: Mapping[str, Json], pipeline: Pipeline) -> None:
    """Put each evaluation's rows into the card of the checkpoint that it read."""
    for step, layers in report["metrics"].items():
        sources = [i for ids in pipeline.steps[step].needs.values() for i in ids if i in report["saved"]]
        rows = [row for facts in layers.values() for row in facts["rows"] if "loss_after" in row]
        for saved in sources:
            if rows:
                _write(Path(report["saved"][saved]["all"]["path"]) / "README.md", rows)


def write_records(report: Mapping[str, Json]) -> None:
    """Put the whole report into every checkpoint that the run saved, where `moefold compare` finds it."""
    for layers in report["saved"].values():
        for facts in layers.values():
            place = Path(facts["path"])
            if place.is_dir():
                (place / Saved.RECORD).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _write(card: Path, rows: Iterable[Mapping[str, Json]]) -> None:
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
    table = "\n".join(lines)
    section = f"{HEADING}\n\nLoss in nats per token, of the checkpoint as it is read back from disk.\n\n{table}\n"
    kept = text.partition(HEADING)[0].rstrip()
    if not text.endswith(section):
        card.write_text(f"{kept}\n\n{section}", encoding="utf-8")
