"""What each layer was foretold to lose, by a plan and by the merge itself, beside what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moefold.artifact import Json

LEAST = 3
"""Layers of which a rank correlation is told."""


def sensitivity(report: Mapping[str, Json]) -> dict[str, Json]:
    """By the step of each saved checkpoint of which something was foretold: what is known of every layer.

    Errors of the layer's output, relative to its length: `predicted` is a plan's, before anything is merged, the root
    of the sum of its pairs' damages; `expected` what the merge left by its own account, over calibration tokens (the
    length is that over the tokens of evaluate.layers); `measured` the `output_error` of evaluate.layers. None where one
    is not known. `rank_correlation` is that of the first of the two which is known with what was measured.
    """
    found: dict[str, Json] = {}
    for step, method in report["methods"].items():
        own = [step for step in method["own"] if step not in report["reduced"]]
        plans = [facts for step in own for facts in report["plans"].get(step, {}).values()]
        planned = plans[-1]["layers"] if plans else {}
        merged = {number: one for step in own for number, one in report["merged"].get(step, {}).items()}
        if own != method["own"]:
            merged = {}  # what those that were merged before have lost is not in it
        if planned or merged:
            rows = _rows(report, method["metrics"])
            numbers = sorted({*planned, *merged}, key=int)
            layers = {n: _layer(planned.get(n), merged.get(n), rows.get(n, {})) for n in numbers}
            agreement = _agreement(list(layers.values()))
            found[step] = {"planned": bool(planned), "layers": layers, "rank_correlation": agreement}
    return found


def _rows(report: Mapping[str, Json], steps: Sequence[str]) -> dict[str, Mapping[str, Json]]:
    rows = [row for step in steps for facts in report["metrics"].get(step, {}).values() for row in facts["rows"]]
    return {str(row["layer"]): row for row in rows if "output_error" in row}


def _layer(
    planned: Mapping[str, Json] | None, merged: Mapping[str, Json] | None, row: Mapping[str, Json]
) -> dict[str, Json]:
    one = planned or merged or {}
    return {
        "format": one["format"] if one["pairs"] else None,
        "pairs": len(one["pairs"]),
        "alone": len(one["alone"]),
        "predicted": planned and _predicted(planned["damage"]),
        "expected": merged and _expected(merged, row.get("inverse_length")),
        "measured": row.get("output_error"),
    }


def _predicted(damage: Sequence[float | None]) -> float | None:
    known = [part for part in damage if part is not None]
    return math.sqrt(math.fsum(known)) if len(known) == len(damage) else None


def _expected(merged: Mapping[str, Json], inverse_length: float | None) -> float | None:
    lost = merged["figures"].get("lost") if merged["pairs"] else 0.0
    return None if lost is None or inverse_length is None else lost * inverse_length


def _agreement(layers: Sequence[Mapping[str, Json]]) -> float | None:
    """Spearman's rank correlation over layers of which both are known; None for few, or where all are alike."""
    told = "expected" if all(one["predicted"] is None for one in layers) else "predicted"
    both = [(one[told], one["measured"]) for one in layers if None not in (one[told], one["measured"])]
    if len(both) < LEAST:
        return None
    first, second = (_ranks(values) for values in zip(*both, strict=True))
    mean = (len(both) - 1) / 2
    spread = [math.fsum((rank - mean) ** 2 for rank in ranks) for ranks in (first, second)]
    if not all(spread):
        return None
    return math.fsum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True)) / math.sqrt(math.prod(spread))


def _ranks(values: Sequence[float]) -> list[float]:
    """From 0; those of equal values are their mean."""
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in list(values)]
