"""What a plan predicted that each layer would lose, beside what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moefold.artifact import Json

LEAST = 3
"""Layers of which a rank correlation is told."""


def sensitivity(report: Mapping[str, Json]) -> dict[str, Json]:
    """By the step of each saved checkpoint that a plan decided: what it says of every layer.

    `predicted` is the root of the predicted damage, the error of the layer's output relative to its length before
    errors are made up for; `measured` the `output_error` of evaluate.layers. None where one is not known.
    """
    found: dict[str, Json] = {}
    for step, method in report["methods"].items():
        plans = [facts for i in method["own"] for facts in report["plans"].get(i, {}).values()]
        if plans:
            measured = _measured(report, method["metrics"])
            layers = {number: _layer(one, measured.get(number)) for number, one in plans[-1]["layers"].items()}
            found[step] = {"layers": layers, "rank_correlation": _agreement(list(layers.values()))}
    return found


def _measured(report: Mapping[str, Json], steps: Sequence[str]) -> dict[str, float]:
    rows = [row for step in steps for facts in report["metrics"].get(step, {}).values() for row in facts["rows"]]
    return {str(row["layer"]): row["output_error"] for row in rows if "output_error" in row}


def _layer(planned: Mapping[str, Json], measured: float | None) -> dict[str, Json]:
    known = all(cost is not None for cost in planned["damage"])
    predicted = math.sqrt(math.fsum(planned["damage"])) if known else None
    return {
        "format": planned["format"],
        "pairs": len(planned["pairs"]),
        "alone": len(planned["alone"]),
        "predicted": predicted,
        "measured": measured,
    }


def _agreement(layers: Sequence[Mapping[str, Json]]) -> float | None:
    """Spearman's rank correlation over layers of which both are known; None for few, or where all are alike."""
    both = [(one["predicted"], one["measured"]) for one in layers if None not in (one["predicted"], one["measured"])]
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
