"""The report of a run as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moefold.artifact import Json
from moefold.report import size
from moefold.verdict import differences, interval

_STOCK = "import transformers"
_ERRORS = ("predicted", "expected", "measured")
"""Of a layer that was merged (report_schema.PredictedLayer)."""

GATE_MISSED = 3
"""The exit code of a run that came to its end, and whose loss rose further than its gate allows."""


def judge(report: Mapping[str, Json], console: Console) -> None:
    """Say which gates were missed, and leave with an exit code of its own; nothing where all were passed."""
    missed = [row for one in report["verdicts"].values() for row in one["texts"] if row["passed"] is False]
    for row in missed:
        console.print(
            f"gate missed: loss on {row['text']} rose by {row['loss_increase']:.4f}, and {row['gate']:.4f} was allowed",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    if missed:
        raise typer.Exit(GATE_MISSED)


def show(report: Mapping[str, Json], console: Console, page: Path | None = None) -> None:
    """Print the report's summary: bytes, losses, masks, exponents, experts, seconds, memory, how to load."""
    for line in report["warnings"]:
        console.print(f"[yellow]warning[/]: {escape(line)}", highlight=False, soft_wrap=True)
    saved = [facts for layers in report["saved"].values() for facts in layers.values()]
    if saved:
        console.print(_size_table(saved[0]))
    for layers in report["metrics"].values():
        for facts in layers.values():
            console.print(_metrics(facts), highlight=False)
            if spans := _spans(facts["rows"]):
                console.print(spans, highlight=False, markup=False, soft_wrap=True)
    for step, told in report.get("sensitivity", {}).items():
        if told.get("planned", True):  # the errors of others were just shown
            console.print(_plan_table(step, told), highlight=False)
            for line in _formats(report, step):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_stage_table(report["stages"]))
    for facts in saved:
        console.print(_how_to_load(facts), highlight=False)
    if page is not None:
        console.print(f"the whole report: {page}", highlight=False, markup=False, soft_wrap=True)


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


def _metrics(facts: Mapping[str, Json]) -> Table | str:
    """Loss and layers as tables of their own, samples of text as a line; a plugin's figures as they are."""
    rows = facts["rows"]
    if rows and "loss_before" in rows[0]:
        return _loss_table(rows)
    if rows and "output_error" in rows[0]:
        return _layer_table(facts["title"], rows)
    if rows and "same_tokens" in rows[0]:
        same, new = (sum(row[key] for row in rows) for key in ("same_tokens", "new_tokens"))
        return f"{facts['title']}: of {new:,} tokens, the first {same:,} are the same as before; see report.html"
    table = _table(facts["title"], *(rows[0] if rows else ()))
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else escape(str(v)) for v in row.values()))
    return table


def _loss_table(rows: list[Mapping[str, Json]]) -> Table:
    table = _table(
        "What was lost (nats per token)", "text", "tokens", "loss", "after", "increase", "perplexity", "after"
    )
    if any("gate" in row for row in rows):
        table.add_column("gate", justify="right")
    for row in rows:
        gate = ["pass" if row["passed"] else "FAIL"] if "gate" in row else []
        table.add_row(
            escape(row["text"]),
            f"{row['tokens']:,}",
            f"{row['loss_before']:.4f}",
            f"{row['loss_after']:.4f}",
            f"{row['loss_increase']:+.4f}",
            f"{row['perplexity_before']:.3f}",
            f"{row['perplexity_after']:.3f}",
            *gate,
        )
    return table


def _spans(rows: list[Mapping[str, Json]]) -> str:
    """How far each increase may be off; nothing where no samples are known."""
    found = {row["text"]: interval(differences(row)) for row in rows if "loss_after" in row}
    halves = [f"{text} ±{(span[1] - span[0]) / 2:.4f}" for text, span in found.items() if span]
    return f"increase, 95 % interval over samples: {', '.join(halves)}" if halves else ""


def _layer_table(title: str, rows: list[Mapping[str, Json]], most: int = 5) -> Table:
    """The layers of the largest error; the report has them all."""
    worst = sorted(rows, key=lambda row: -row["output_error"])[:most]
    named = title if len(rows) <= most else f"{title}: the {most} worst of {len(rows)} (all: report.html)"
    table = _table(named, "layer", "output error", "cumulative", "routing kept")
    for row in worst:
        kept = row["routing_overlap"]
        routing = "-" if kept is None else f"{kept:.1%}"
        table.add_row(str(row["layer"]), f"{row['output_error']:.2%}", f"{row['cumulative_error']:.2%}", routing)
    return table


def _plan_table(step: str, told: Mapping[str, Json], most: int = 8) -> Table:
    """What was planned for the layers of the largest errors, measured or else foretold; the report has them all."""
    layers, agreement = told["layers"], told["rank_correlation"]
    known = any(one.get("expected") is not None for one in layers.values())
    names = [name for name in _ERRORS if name != "expected" or known]
    worst = sorted(layers, key=lambda n: -next((layers[n][name] for name in reversed(names) if layers[n][name]), 0))
    worst = worst[:most]
    shown = "" if len(layers) <= most else f", the {most} of most error of {len(layers)} (all: report.html)"
    found = "" if agreement is None else f"; rank correlation of errors {agreement:+.2f}"
    table = _table(f"Merged by plan, {step}{shown}{found}", "layer", "format", "pairs", "alone", *names)
    for number in worst:
        one = layers[number]
        errors = ["-" if one[name] is None else f"{one[name]:.2%}" for name in names]
        table.add_row(number, one["format"] or "-", str(one["pairs"]), str(one["alone"]), *errors)
    return table


def _formats(report: Mapping[str, Json], step: str) -> Iterator[str]:
    """What a plan that had not all formats to choose from gave away by that."""
    for own in report.get("methods", {}).get(step, {"own": []})["own"]:
        for facts in report["plans"].get(own, {}).values():
            budget = facts["budget"]
            least = budget.get("damage_with_all_formats")
            if least is not None and least < budget["damage"]:
                yield (
                    f"{own}: chosen from {', '.join(budget['formats'])} alone; with all formats, which have fast "
                    f"kernels on Hopper, the predicted squared error is {least / budget['damage']:.2f}x at the same "
                    f"bytes: --set {own}.formats=[exponent,pair8,pair6,pair5,pair4]"
                )


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
