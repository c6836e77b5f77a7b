"""One run as a picture: times over tokens above, speeds below, a column for each shape.

Speeds are of the 16-bit format against the baselines, and of few-bit formats against it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefold_kernels.bench import published
from moefold_kernels.bench.contenders import BASELINES
from moefold_kernels.bench.results import Row, Run
from moefold_kernels.errors import BenchmarkError
from moefold_kernels.layout_pairs import MAGNITUDE_BITS

COLOURS: Mapping[str, str] = {
    "packed": "#0072b2",
    "dense": "#d55e00",
    "grouped_mm": "#009e73",
    "reference": "#cc79a7",
    "vLLM": "#7f7f7f",
    "pair8": "#e69f00",
    "pair6": "#56b4e9",
    "pair5": "#cc79a7",
    "pair4": "#009e73",
}
"""Okabe and Ito's colours, which the colour-blind can tell apart."""


def digest(run: Run) -> str:
    """What a picture was made from; it is written into the picture, so that a stale one is found without drawing."""
    shown = [[row.case, row.contender, row.seconds, row.floor] for row in run.rows]
    return hashlib.sha256(json.dumps([run.device, shown]).encode()).hexdigest()


def draw(run: Run, to: Path) -> None:
    """Write an SVG; the same run gives the same file with the same matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise BenchmarkError("plots are drawn by matplotlib: pip install 'moefold[bench]'") from None
    shapes = list(dict.fromkeys(row.shape for row in run.rows))
    with matplotlib.rc_context({"svg.hashsalt": "moefold", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.2 * len(shapes), 6.4), layout="constrained")
        panels = figure.subplots(2, len(shapes), squeeze=False, sharex="col", height_ratios=[3, 2])
        for column, shape in enumerate(shapes):
            rows = [row for row in run.rows if row.shape == shape and row.routing == "balanced"]
            _times(panels[0, column], shape, rows, run.device)
            _speed(panels[1, column], rows)
        panels[0, 0].set_ylabel("time of the layer, µs")
        panels[1, 0].set_ylabel("speed, times")
        to.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(to, format="svg", metadata={"Date": None, "Description": digest(run)})


def _times(panel: Any, shape: str, rows: list[Row], device: str) -> None:
    for contender in dict.fromkeys(row.contender for row in rows):
        series = {row.tokens: row.seconds * 1e6 for row in rows if row.contender == contender}
        _line(panel, series, contender, marker="o")
    floor = {row.tokens: row.floor * 1e6 for row in rows if row.contender == "packed"}
    _line(panel, floor, "packed", label="floor of packed", linestyle=":")
    if device == published.DEVICE:
        series = {tokens: found.microseconds for tokens, found in published.VLLM.get(shape, {}).items()}
        _line(panel, series, "vLLM", label="vLLM (elsewhere)", linestyle="--")
    panel.set_title(shape)
    panel.set_yscale("log", subs=[2, 5])
    panel.yaxis.set_major_formatter(_plain)
    panel.yaxis.set_minor_formatter(_plain)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def _speed(panel: Any, rows: list[Row]) -> None:
    packed = {row.tokens: row.seconds for row in rows if row.contender == "packed"}
    for name in BASELINES:
        times = {row.tokens: row.seconds for row in rows if row.contender == name}
        series = {tokens: times[tokens] / packed[tokens] for tokens in times if tokens in packed}
        _line(panel, series, name, label=f"packed against {name}", marker="o")
    for name in dict.fromkeys(row.contender for row in rows if row.contender in MAGNITUDE_BITS):
        times = {row.tokens: row.seconds for row in rows if row.contender == name}
        series = {tokens: packed[tokens] / times[tokens] for tokens in times if tokens in packed}
        _line(panel, series, name, label=f"{name} against packed", marker="o")
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(_plain)
    panel.set_xlabel("tokens")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def _line(panel: Any, series: dict[int, float], colour: str, label: str = "", **style: Any) -> None:
    if series:
        tokens = sorted(series)
        values = [series[at] for at in tokens]
        panel.plot(tokens, values, color=COLOURS.get(colour), label=label or colour, markersize=4, **style)
