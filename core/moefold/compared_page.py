"""Several runs as a page: loss against bytes, a table, and the error of their layers in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from moefold import pictures
from moefold.comparison import Comparison, Cost, Loss, Row
from moefold.html import Page, badge, paragraph, raw, table
from moefold.inside import Inside
from moefold.report import size
from moefold.runs import read


def page(found: Comparison, places: Sequence[Path]) -> Page:
    """The page of a comparison; `places` are where its runs were read from."""
    made = Page(f"moefold: methods on {found.model}")
    if found.warnings:
        lines = "".join(f"<li>{escape(line)}</li>" for line in found.warnings)
        made.head = f'<ul class="warnings">{lines}</ul>'
    pictured = [_against_bytes(made, found, text, number) for number, text in enumerate(found.texts)]
    made.add("bytes", "Loss against bytes", "".join(pictured))
    made.add("methods", "Methods", _table(found))
    _layers(made, places)
    return made


def _against_bytes(made: Page, found: Comparison, text: str, number: int) -> str:
    points = [
        {
            "name": row.run,
            "method": row.method,
            "bytes": row.expert_bytes,
            "loss": row.losses[text].loss,
            "span": _half(row.losses[text]),
            "random": row.random,
        }
        for row in found.rows
    ]
    figure = pictures.against_bytes(points, found.uncompressed.losses[text].loss, text)
    told = (
        f"Loss on {text} ({found.texts[text]:,} tokens) against the bytes of the routed experts; lower left is better. "
        "Bars: the 95 % interval of the increase over the uncompressed model, where it is known."
    )
    return made.figure(f"bytes-plot-{number}", figure, told)


def _table(found: Comparison) -> str:
    columns = ["run", "experts", "expert bytes", "ratio", "bits / weight"]
    for text in found.texts:
        columns += [f"loss on {text}", "increase", "perplexity", "recovery"]
    gated = any(row.passed is not None for row in found.rows)
    columns += ["gate"] if gated else []
    columns += ["own seconds", "own peak", "calibration seconds", "calibration peak", "method"]
    rows = [_row(found, row, gated) for row in (found.uncompressed, *found.rows)]
    told = (
        "Rows of equal expert bytes (within 1 %) stand together, the least loss first. Loss in nats per token, "
        "below the increase its 95 % interval over samples; recovery: perplexity before / after; seconds and peak "
        "memory whenever they were spent."
    )
    return table(columns, rows, {len(columns) - 1: "longest"}) + paragraph(told)


def _half(loss: Loss) -> float | None:
    """Half of the interval of the increase."""
    known = loss.increase_low is not None and loss.increase_high is not None
    return (loss.increase_high - loss.increase_low) / 2 if known else None  # type: ignore[operator]  # known


_GATE = {True: ("pass", "good"), False: ("fail", "bad"), None: ("–", "none")}


def _row(found: Comparison, row: Row, gated: bool) -> list[str]:
    cells = [
        f"{row.run} (random)" if row.random else row.run,
        row.per_layer,
        size(row.expert_bytes),
        f"{row.ratio:.3f}×",
        f"{row.bits_per_weight:.2f}",
    ]
    for text in found.texts:
        loss = row.losses[text]
        span = None if loss.increase_low is None else f"{loss.increase_low:+.4f} … {loss.increase_high:+.4f}"
        increase = "–" if loss.increase is None else f"{loss.increase:+.4f}"
        recovery = "–" if loss.recovery is None else f"{loss.recovery:.1%}"
        cells += [f"{loss.loss:.4f}", raw(increase + (f"<small>{span}</small>" if span else ""))]
        cells += [f"{loss.perplexity:.3f}", recovery]
    if gated:
        cells.append(badge(*_GATE[row.passed]))
    return [*cells, *_cost(row.own), *_cost(row.calibration), row.method]


def _cost(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["–", "–"]
    device = f" + {size(cost.peak_device_bytes)}" if cost.peak_device_bytes else ""
    return [f"{cost.seconds:.1f}", size(cost.peak_bytes) + device if cost.peak_bytes else "–"]


def _layers(made: Page, places: Sequence[Path]) -> None:
    """Of the runs that measured it."""
    parts = []
    for key, title, told in (
        ("output_error", "error of each layer", "Error of each compressed layer on what enters the original's."),
        ("cumulative_error", "error so far", "Error accumulated along the compressed model."),
        ("routing_overlap", "choices kept", "Share of the original's top-k choices that are made too."),
    ):
        series = {}
        for run in read(places):
            rows = Inside(run.report, run.step).measured.values()
            points = [(row["layer"], row[key]) for row in rows if row[key] is not None]
            if points:
                series[run.name] = points
        if series:
            figure = pictures.lines(series, title, tickformat=".1%")
            parts.append(made.figure(f"{key.replace('_', '-')}-plot", figure, told))
    if parts:
        made.add("layers", "Per layer", "".join(parts))
