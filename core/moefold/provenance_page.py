"""The provenance section of a run's page: pipeline, digests, seeds, versions, runs, what each stage took, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import yaml

from moefold.artifact import Json
from moefold.html import Page, paragraph, raw, table
from moefold.report import size


def provenance(made: Page, report: Mapping[str, Json]) -> None:
    """How the run came about, for whoever wants to repeat or to doubt it."""
    parts = [_details("The pipeline, with nothing left to defaults", _pre(_yaml(report["pipeline"])))]
    hashes = [("model fingerprint", report["model"]["fingerprint"])]
    for layers_ in report["texts"].values():
        hashes += [(f"text {f['name']} ({f['samples']} × {f['length']} tokens)", f["digest"]) for f in layers_.values()]
    code = [(name, None if value is None else raw(f"<code>{escape(value)}</code>")) for name, value in hashes]
    parts.append("<h3>Hashes</h3>" + table(("of", "digest"), code, {0: "name", 1: "long"}))
    seeds = [
        (stage["id"], name, value)
        for stage in report["pipeline"]["stages"]
        for name, value in stage["with"].items()
        if "seed" in name
    ]
    parts.append("<h3>Seeds</h3>" + (table(("stage", "option", "seed"), seeds) or paragraph("No stage has one.")))
    versions = [("pipeline", report["source"]), ("computed on", report.get("machine") or report["device"])]
    versions += report["versions"].items()
    parts.append("<h3>Versions</h3>" + table(("of", "version"), versions, {1: "long"}))
    stages = report.get("stage_versions", {})
    if stages:
        parts.append(_details("Versions of the stages", table(("stage", "version"), list(stages.items()))))
    parts.append("<h3>Runs that led here</h3>" + _events(report.get("events", [])))
    parts.append("<h3>What each stage took</h3>" + _stages(report["stages"]))
    if report["warnings"]:
        lines = "".join(f"<li>{escape(line)}</li>" for line in report["warnings"])
        parts.append(_details(f"All warnings ({len(report['warnings'])})", f'<ul class="warnings">{lines}</ul>'))
    for layers_ in report["saved"].values():
        for facts in layers_.values():
            files = [(name, f"{count:,}") for name, count in facts["files"].items()]
            parts.append(_details(f"Files in {facts['path']}", table(("file", "bytes"), files)))
    made.add("provenance", "Provenance", "".join(parts))


def _details(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def _pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _yaml(pipeline: Mapping[str, Json]) -> str:
    return yaml.safe_dump(dict(pipeline), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def _events(events: list[Mapping[str, Json]]) -> str:
    if not events:
        return paragraph("Not noted.")
    lines, before = [], None
    for event in events:
        what = event["event"]
        if what == "started":
            to_run = sum(event["to_run"].values())
            what = f"{'resumed' if before in ('started', 'failed') else 'started'}: {to_run:,} tasks to run"
            what += " (the run before was killed)" if before == "started" else ""
        lines.append((moment(event["when"]), what + (f": {event['why']}" if "why" in event else "")))
        before = event["event"]
    return table(("when", "what"), lines, {0: "when", 1: "long"})


def moment(when: str) -> str:
    """An ISO date and time in UTC as people write it."""
    return when.replace("T", " ").replace("+00:00", " UTC")


def _stages(stages: Mapping[str, Json]) -> str:
    lines = [
        (
            step,
            took["tasks"],
            took["to_run"],
            f"{took['stored_seconds']:.1f}",
            size(took["stored_peak_bytes"]) if took["stored_peak_bytes"] else None,
            size(took["stored_peak_device_bytes"]) if took["stored_peak_device_bytes"] else None,
        )
        for step, took in stages.items()
    ]
    columns = ("stage", "tasks", "ran now", "seconds, all runs", "peak memory", "on the device")
    return table(columns, lines) + paragraph(
        "Seconds are added up over workers, whenever the stored results were made."
    )
