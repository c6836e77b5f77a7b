"""The sections of a run's page that look inside a saved checkpoint: per layer, per expert, what is alike."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from moefold import pictures
from moefold.artifact import Json
from moefold.html import Page, badge, html, paragraph, place, raw, table
from moefold.inside import Inside
from moefold.report import size
from moefold.verdict import expected_shares

_PERCENT = {"tickformat": ".1%"}
_PUBLISHED = 0.4
"""PuzzleMoE's threshold."""
_MASKS = {"shared": "shared by both", "own": "first expert's", "other": "second expert's"}

_ERRORS = {
    "predicted": "as the plan predicted it, before errors are made up for",
    "expected": "as the merge left it by its own account, on calibration tokens",
    "measured": "as evaluate.layers measured it",
}
_SHARES = "Both, it alone, partner alone: whose weights the positions of an expert's pair hold."


def layers(made: Page, inside: Inside) -> None:
    """Errors, routing, masks, seconds and peaks by layer."""
    if not inside.layers:
        return
    parts = _errors(made, inside) + _planned(made, inside) + _masks(made, inside) + _seconds(made, inside)
    made.add("layers", "Per layer", "".join([*parts, _layer_table(inside)]))


def _errors(made: Page, inside: Inside) -> list[str]:
    rows = list(inside.measured.values())
    if not rows:
        return [paragraph("Error by layer was not measured; add the stage evaluate.layers to the pipeline.")]
    named = {"this layer alone": "output_error", "all layers so far": "cumulative_error"}
    series = {name: [(row["layer"], row[key]) for row in rows] for name, key in named.items()}
    told = (
        "Error of a decoder layer's output relative to the original's, mean over tokens: of the compressed layer on "
        "what enters the original's, and accumulated along the compressed model."
    )
    parts = [made.figure("errors-plot", pictures.lines(series, "relative error", rangemode="tozero", **_PERCENT), told)]
    kept = [(row["layer"], row["routing_overlap"]) for row in rows if row["routing_overlap"] is not None]
    if kept:
        told = "Share of the original's top-k choices that the compressed model, on its own inputs, makes too."
        figure = pictures.lines({"routing kept": kept}, "choices kept", **_PERCENT)
        parts.append(made.figure("routing-plot", figure, told))
    return parts


def _planned(made: Page, inside: Inside) -> list[str]:
    """Foretold and measured errors side by side, where a plan decided what merges, or a merge says what it left."""
    known = {
        name: [(int(n), one[name]) for n, one in inside.planned.items() if one.get(name) is not None]
        for name in _ERRORS
    }
    series = {name: points for name, points in known.items() if points}
    if "measured" not in series or len(series) == 1:
        return []
    agreement = inside.report["sensitivity"][inside.step]["rank_correlation"]
    told = (
        "Error of each layer's output: "
        + "; ".join(text for name, text in _ERRORS.items() if name in series)
        + ("." if agreement is None else f". Rank correlation over layers: {agreement:+.2f}.")
    )
    figure = pictures.lines(series, "relative error", rangemode="tozero", **_PERCENT)
    return [made.figure("sensitivity-plot", figure, told)]


def _shares(facts: Mapping[str, Json]) -> dict[str, float] | None:
    counts = facts.get("counts") or {}
    total = counts.get("weights", 0)
    return {name: counts[name] / total for name in _MASKS} if total else None


def _masks(made: Page, inside: Inside) -> list[str]:
    found = {layer: shares for layer, facts in inside.packed.items() if (shares := _shares(facts))}
    if not found:
        return []
    threshold = inside.threshold()
    want = expected_shares(_PUBLISHED if threshold is None else threshold)
    marks = [want["shared"], want["shared"] + want["own"]]
    told = f"What the positions of merged matrices hold; dashed: as expected. {_expected(threshold)}"
    parts = {title: [shares[name] for shares in found.values()] for name, title in _MASKS.items()}
    figure = pictures.stacked([int(n) for n in found], parts, "positions", marks, range=[0, 1], **_PERCENT)
    return [made.figure("masks-plot", figure, told)]


def _expected(threshold: float | None) -> str:
    """What mask shares to hold the found ones against."""
    want = expected_shares(_PUBLISHED if threshold is None else threshold)
    shares = f"{want['shared']:.1%} / {want['own']:.1%} / {want['other']:.1%}"
    if threshold is not None:
        return f"Independent Gaussian weights at threshold {threshold:g} give {shares}."
    return (
        f"PuzzleMoE's rule, at its threshold of {_PUBLISHED:g}, gives {shares} on independent Gaussian weights; this "
        "method decides by the error that each choice costs, so its shares may differ."
    )


def _seconds(made: Page, inside: Inside) -> list[str]:
    parts = inside.seconds()
    if not parts:
        return []
    figure = pictures.stacked([int(n) for n in inside.layers], parts, "seconds")
    return [made.figure("seconds-plot", figure, "Seconds by layer and stage, whenever the stored results were made.")]


def _layer_table(inside: Inside) -> str:
    """The columns that this run has something for."""
    rows = [_layer(inside, layer) for layer in inside.layers]
    columns = ["layer", *(c for c in rows[0] if c != "layer" and any(row[c] is not None for row in rows))]
    return table(columns, [[row[column] for column in columns] for row in rows])


def _layer(inside: Inside, layer: str) -> dict[str, Json]:
    saved = inside.report["saved"][inside.step]["all"].get("experts", {}).get(layer)
    row, planned = inside.measured.get(layer, {}), inside.planned.get(layer, {})
    facts = inside.packed.get(layer, {})
    counts, shares = facts.get("counts") or {}, _shares(facts)
    seen = inside.activity.get(layer)
    seconds, peak, device = inside.spent(layer)
    dead = sum(count == 0 for count in seen["tokens"]) if seen else None
    few = sum(seen["tokens"][expert] > 0 for expert in seen["starved"]) if seen else None
    return {
        "layer": layer,
        "experts": f"{saved[0]} → {saved[1]}" if saved and saved[0] != saved[1] else saved and saved[0],
        "format": inside.format(layer) or planned.get("format"),
        "pairs": planned.get("pairs"),
        "predicted error": _percent(planned.get("predicted"), 2),
        "expected error": _percent(planned.get("expected"), 2),
        "output error": _percent(row.get("output_error"), 2),
        "of what the layer adds": _percent(row.get("update_error"), 2),
        "cumulative": _percent(row.get("cumulative_error"), 2),
        "routing kept": _percent(row.get("routing_overlap")),
        "% shared / first / second": " / ".join(f"{100 * s:.1f}" for s in shares.values()) if shares else None,
        "clipped / flushed": _both(counts.get("clipped"), counts.get("flushed"), "bad", "") if counts else None,
        "dead / few tokens": _both(dead, few, "bad", "warn"),
        "seconds": f"{seconds:.1f}" if seconds else None,
        "peak": size(peak) if peak else None,
        "device peak": size(device) if device else None,
    }


def _percent(value: float | None, digits: int = 1) -> str | None:
    return None if value is None else f"{value:.{digits}%}"


def _both(first: int | None, second: int | None, kind: str, other: str) -> Json:
    """Two counts, with a colour where there is something to look at."""
    if first is None and second is None:
        return None
    return raw(" / ".join(html(_flagged(count, colour)) for count, colour in ((first, kind), (second, other))))


def _flagged(count: int | None, kind: str) -> Json:
    return count if count is None else badge(f"{count:,}", kind) if count and kind else f"{count:,}"


def experts(made: Page, inside: Inside) -> None:
    """Tokens, saliency, partner and kept share of each expert: all as a picture, one layer at a time as a table."""
    found = list(inside.experts())
    if not found:
        return
    salient = any("saliency" in f.get("figures", {}) for f in inside.reduced.values())
    title = "saliency" if salient else "activation (RMS length)"
    known = {
        name: any(v is not None for layer in found for v in layer.get(name, ()))
        for name in ("tokens", "saliency", "kept", "masks", "clipped", "flushed")
    }
    measures = [
        *([{"name": "share", "title": "tokens (1: equal share)", "format": ".2f"}] if known["tokens"] else []),
        *([{"name": "saliency", "title": title, "format": ".3g"}] if known["saliency"] else []),
        *([{"name": "kept", "title": "share of weights kept", "format": ".1%"}] if known["kept"] else []),
    ]
    columns = [
        *([{"name": "tokens", "title": "tokens seen", "format": "count"}] if known["tokens"] else []),
        *([{"name": "share", "title": "of an equal share", "format": "percent"}] if known["tokens"] else []),
        *([{"name": "saliency", "title": title.split(" (")[0], "format": "number"}] if known["saliency"] else []),
        *([{"name": "kept", "title": "weights kept", "format": "percent"}] if known["kept"] else []),
        {"name": "group", "title": "partner or group", "format": "text"},
        *(
            [{"name": "masks", "title": "% both / it alone / partner alone", "format": "shares"}]
            if known["masks"]
            else []
        ),
        *([{"name": n, "title": n, "format": "count"} for n in ("clipped", "flushed") if known[n]]),
    ]
    made.experts = {"layers": found, "measures": measures, "columns": columns}
    made.add("experts", "Per expert", _expert_section(found, measures, columns, inside))


def _expert_section(found: list[Json], measures: list[Json], columns: list[Json], inside: Inside) -> str:
    parts = [_flags(found)]
    if measures:
        options = "".join(f'<option value="{m["name"]}">{escape(m["title"])}</option>' for m in measures)
        parts.append(f'<div class="controls"><label>Colour <select id="measure">{options}</select></label></div>')
        parts.append(place("experts-plot", "Every expert of every layer; a click on one shows its layer below."))
    options = "".join(f'<option value="{i}">{layer["number"]}</option>' for i, layer in enumerate(found))
    head = "".join(
        f"<th{' class=left' if c['format'] == 'text' else ''}>{escape(c['title'])}</th>"
        for c in [{"title": "expert", "format": ""}, *columns, {"title": "flags", "format": "text"}]
    )
    if any(column["name"] == "masks" for column in columns):
        parts.append(paragraph(f"{_SHARES} {_expected(inside.threshold())}"))
    parts.append(
        f'<div class="controls"><label>Layer <select id="layer">{options}</select></label></div>'
        '<p class="soft" id="experts-note"></p>'
        f'<div class="wide tall"><table><thead><tr>{head}</tr></thead><tbody id="experts-rows"></tbody></table></div>'
    )
    return "".join(parts)


def _flags(found: list[Json]) -> str:
    """Dead and under-sampled experts of all layers, named."""
    lines: list[tuple[Json, ...]] = []
    for layer in found:
        named = {f: [str(e) for e, told in layer["flags"].items() if f in told] for f in ("dead", "few tokens")}
        if any(named.values()):
            lines.append((layer["number"], *(", ".join(who) or None for who in named.values())))
    if not lines:
        seen = any(layer["tokens"][0] is not None for layer in found)
        return (
            f"<p>{badge('every expert saw enough tokens', 'good')}</p>"
            if seen
            else paragraph("Tokens were not counted; the stage observe does.")
        )
    counts = [sum(len(str(line[i]).split(", ")) for line in lines if line[i]) for i in (1, 2)]
    marks = raw(
        f"{badge(f'{counts[0]} dead', 'bad' if counts[0] else 'good')} {badge(f'{counts[1]} under-sampled', 'warn')}"
    )
    listed = table(("layer", "dead", "few tokens"), lines, {1: "long", 2: "long"})
    return f"<details{' open' if len(lines) <= 8 else ''}><summary>{marks}, by layer</summary>{listed}</details>"


def similarity(made: Page, inside: Inside) -> None:
    """The map of the chosen layer, with the pairs or groups that were chosen."""
    if not inside.similarity:
        return
    made.experts["maps"] = dict(inside.similarity)
    told = (
        "Every two experts of the layer that is chosen above, by what the method chose by; framed: those that were put "
        "together. Brighter speaks for putting two together."
    )
    note = '<p class="soft" id="similarity-note"></p>'
    made.add("similarity", "Similarity", paragraph(told) + note + place("similarity-plot", "", "square"))
