"""Figures as plotly's JSON; the page adds the colours of its theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moefold.artifact import Json

PALETTE = ("#4c8fd6", "#e08a1e", "#2a9d76", "#c2558f", "#8d7ad1", "#b0a020", "#5aa7b0", "#d2691e")
_BASELINE = "#999999"
SYMBOLS = ("circle", "diamond", "square", "triangle-up")
_MARGIN = {"l": 56, "r": 12, "t": 12, "b": 44}
_LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def _figure(data: list[Json], height: int = 300, **layout: Json) -> dict[str, Json]:
    legend = {"showlegend": len(data) > 1, "legend": _LEGEND}
    return {"data": data, "layout": {"height": height, "margin": _MARGIN, **legend, **layout}}


def _layer_axis(layers: Sequence[Json]) -> Json:
    """Whole numbers only, about a dozen of them."""
    span = int(max(layers, default=0)) - int(min(layers, default=0))
    return {"title": {"text": "decoder layer"}, "tickformat": "d", "tick0": 0, "dtick": max(1, -(-span // 12))}


def increases(rows: Sequence[Mapping[str, Json]], names: Sequence[str]) -> dict[str, Json]:
    """Loss increase of each text with its interval, one line a checkpoint and text."""
    values = [row["loss_increase"] for row in rows]
    spans = [row["loss_increase_interval"] or [row["loss_increase"]] * 2 for row in rows]
    error = {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in zip(values, spans, strict=True)],
        "arrayminus": [value - low for value, (low, _) in zip(values, spans, strict=True)],
    }
    points = {
        "type": "scatter", "mode": "markers", "x": values, "y": list(names), "error_x": error, "name": "increase",
        "marker": {"size": 10, "color": PALETTE[0]}, "hovertemplate": "%{y}: %{x:+.4f}<extra></extra>",
    }  # fmt: skip
    data: list[Json] = [points]
    gates = [(row["gate"], name) for row, name in zip(rows, names, strict=True) if row["gate"] is not None]
    if gates:
        marker = {"symbol": "line-ns-open", "size": 22, "color": "#d23b2f", "line": {"width": 3}}
        data.append({
            "type": "scatter", "mode": "markers", "x": [g for g, _ in gates], "y": [n for _, n in gates],
            "marker": marker, "name": "gate", "hovertemplate": "gate of %{y}: %{x:+.4f}<extra></extra>",
        })  # fmt: skip
    return _figure(
        data,
        110 + 40 * len(rows),
        xaxis={"title": {"text": "loss increase (nats)"}, "zeroline": True, "rangemode": "tozero"},
        yaxis={"type": "category", "autorange": "reversed"},
    )


def lines(series: Mapping[str, Sequence[tuple[Json, Json]]], title: str, **axis: Json) -> dict[str, Json]:
    """Curves over decoder layers: name -> (layer, value)."""
    data = [
        {
            "type": "scatter", "mode": "lines+markers", "name": name, "x": [x for x, _ in points],
            "y": [y for _, y in points], "line": {"color": PALETTE[i % len(PALETTE)]}, "marker": {"size": 5},
            "hovertemplate": f"layer %{{x}}: %{{y:{axis.get('tickformat', '.4g')}}}",
        }
        for i, (name, points) in enumerate(series.items())
    ]  # fmt: skip
    return _figure(
        data,
        xaxis=_layer_axis([x for points in series.values() for x, _ in points]),
        yaxis={"title": {"text": title}, **axis},
        hovermode="x unified",
    )


def over_runs(series: Mapping[str, Sequence[tuple[str, float]]], title: str) -> dict[str, Json]:
    """Curves over recorded runs: name -> (run, value); many names are told by pointing at a curve."""
    data: list[Json] = [
        {
            "type": "scatter", "mode": "lines+markers", "name": name, "x": [x for x, _ in points],
            "y": [y for _, y in points], "line": {"color": PALETTE[i % len(PALETTE)]}, "marker": {"size": 7},
            "hovertemplate": "%{fullData.name}, %{x}: %{y:.4g}<extra></extra>",
        }
        for i, (name, points) in enumerate(series.items())
    ]  # fmt: skip
    runs = list(dict.fromkeys(x for points in series.values() for x, _ in points))
    return _figure(
        data,
        320,
        showlegend=1 < len(data) <= 8,
        xaxis={"type": "category", "categoryorder": "array", "categoryarray": runs},
        yaxis={"title": {"text": title}},
    )


def stacked(
    layers: Sequence[int], parts: Mapping[str, Sequence[Json]], title: str, marks: Sequence[float] = (), **axis: Json
) -> dict[str, Json]:
    """Stacked bars, one a layer; `marks` are heights at which a dashed line is drawn."""
    data = [
        {
            "type": "bar", "name": name, "x": list(layers), "y": list(values),
            "marker": {"color": PALETTE[i % len(PALETTE)]},
            "hovertemplate": f"{name}, layer %{{x}}: %{{y:{axis.get('tickformat', '.3g')}}}<extra></extra>",
        }
        for i, (name, values) in enumerate(parts.items())
    ]  # fmt: skip
    shapes = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y,
         "line": {"dash": "dash", "width": 2, "color": "#d23b2f"}}
        for y in marks
    ]  # fmt: skip
    return _figure(
        data,
        barmode="stack",
        shapes=shapes,
        xaxis=_layer_axis(layers),
        yaxis={"title": {"text": title}, **axis},
    )


def against_bytes(points: Sequence[Mapping[str, Json]], uncompressed: float, text: str) -> dict[str, Json]:
    """Loss against expert bytes; `points` have name, bytes, loss, span (half of its interval), random, method.

    Names stand in the legend: in the picture those of equal bytes would lie on each other.
    """
    unit, name = (1e9, "GB") if any(p["bytes"] >= 1e8 for p in points) else (1e6, "MB")
    data: list[Json] = []
    for number, point in enumerate(points):
        colour = _BASELINE if point["random"] else PALETTE[number % len(PALETTE)]
        symbol = "x" if point["random"] else SYMBOLS[number // len(PALETTE) % len(SYMBOLS)]
        data.append({
            "type": "scatter", "mode": "markers", "name": point["name"] + (" (random)" if point["random"] else ""),
            "x": [point["bytes"] / unit], "y": [point["loss"]], "customdata": [point["method"]], "cliponaxis": False,
            "error_y": {"type": "data", "array": [point["span"]], "visible": point["span"] is not None, "width": 6},
            "marker": {"size": 11, "color": colour, "symbol": symbol},
            "hovertemplate": f"{point['name']}: %{{y:.4f}}<br>%{{customdata}}<extra></extra>",
        })  # fmt: skip
    front = best(points)
    data.append({
        "type": "scatter", "mode": "lines", "name": "best at its bytes", "x": [p["bytes"] / unit for p in front],
        "y": [p["loss"] for p in front], "line": {"color": _BASELINE, "width": 1, "dash": "dot"}, "hoverinfo": "skip",
    })  # fmt: skip
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": uncompressed, "y1": uncompressed,
            "line": {"dash": "dash", "width": 1, "color": PALETTE[2]}}  # fmt: skip
    note = {"xref": "paper", "x": 1, "xanchor": "right", "y": uncompressed, "yanchor": "top", "showarrow": False,
            "text": "uncompressed"}  # fmt: skip
    return _figure(
        data,
        400 + 20 * len(data),  # on a phone the legend takes a line a name
        shapes=[line],
        annotations=[note],
        xaxis={"title": {"text": f"expert bytes, {name}"}, "rangemode": "tozero"},
        yaxis={"title": {"text": f"loss on {text}, nats per token"}},
    )


def best(points: Sequence[Mapping[str, Json]]) -> list[Mapping[str, Json]]:
    """Those that no other beats in both bytes and loss, the smallest first."""
    front: list[Mapping[str, Json]] = []
    for point in sorted(points, key=lambda p: (p["bytes"], p["loss"])):
        if point["loss"] is not None and (not front or point["loss"] < front[-1]["loss"]):
            front.append(point)
    return front
