"""What a run comes to: for each saved checkpoint its bytes, its losses with intervals, and whether it passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev

from moefold.artifact import Json

LEVEL = 0.95


def verdicts(report: Mapping[str, Json]) -> dict[str, Json]:
    """By the id of each step that saved a checkpoint: bytes, rows by text, pass or fail (None: no gate was stated)."""
    found = {step: _verdict(report, step) for step in report["methods"] if step in report["saved"]}
    chance = {step: one for step, one in found.items() if one["random"]}
    for step, one in found.items():
        if step not in chance:
            _against(one, chance)
    return found


def _verdict(report: Mapping[str, Json], step: str) -> dict[str, Json]:
    method, saved = report["methods"][step], report["saved"][step]["all"]
    rows = [_row(row) for i in method["metrics"] for row in _rows(report, i) if "loss_after" in row]
    judged = [row["passed"] for row in rows if row["passed"] is not None]
    return {
        "path": saved["path"],
        "random": is_random(method),
        "expert_bytes": saved.get("expert_bytes"),
        "checkpoint_bytes": saved.get("checkpoint_bytes"),
        "passed": all(judged) if judged else None,
        "texts": rows,
    }


def _rows(report: Mapping[str, Json], step: str) -> Iterator[Mapping[str, Json]]:
    for facts in report["metrics"].get(step, {}).values():
        yield from facts["rows"]


def _row(row: Mapping[str, Json]) -> dict[str, Json]:
    before, after, paired = row.get("samples_before") or [], row.get("samples_after") or [], differences(row)
    return {
        "text": row["text"],
        "tokens": row["tokens"],
        "samples": len(paired) or None,
        **{name: row[name] for name in ("loss_before", "loss_after", "loss_increase")},
        **{name: row[name] for name in ("perplexity_before", "perplexity_after")},
        "loss_before_interval": interval(before),
        "loss_after_interval": interval(after),
        "loss_increase_interval": interval(paired),
        "recovery": recovery(row["loss_increase"]),
        "gate": row.get("gate"),
        "passed": row.get("passed"),
        "random_increase": None,
        "beyond_random": None,
    }


def differences(row: Mapping[str, Json]) -> list[float]:
    """How much the loss of each sample rose; empty where the row does not tell."""
    before, after = row.get("samples_before") or [], row.get("samples_after") or []
    return [a - b for a, b in zip(after, before, strict=True)] if len(after) == len(before) else []


def interval(samples: Sequence[float]) -> list[float] | None:
    """The 95 % confidence interval of the mean over samples, by Student's t; None for fewer than two, or for NaN.

    Of differences on the same samples it is far narrower than the two intervals would suggest.
    """
    if len(samples) < 2 or not all(map(math.isfinite, samples)):
        return None
    from scipy.special import stdtrit  # scipy is slow to import, and most commands do not need it

    mean, error = fmean(samples), stdev(samples) / math.sqrt(len(samples))
    half = float(stdtrit(len(samples) - 1, (1 + LEVEL) / 2)) * error
    return [mean - half, mean + half]


def recovery(increase: float) -> float:
    """How much of the original's probability for a token is left, in the geometric mean: perplexity before / after."""
    return math.exp(-increase) if increase > -700 else math.inf


def _against(one: dict[str, Json], chance: Mapping[str, Json]) -> None:
    """Put beside each text what chance lost at about the same bytes, and the share of that which the method avoids."""
    for other in chance.values():
        if not _as_large(one, other):
            continue
        random = {row["text"]: row["loss_increase"] for row in other["texts"]}
        for row in one["texts"]:
            if row["text"] in random and row["random_increase"] is None:
                row["random_increase"] = random[row["text"]]
                if random[row["text"]] > 0:
                    row["beyond_random"] = 1 - row["loss_increase"] / random[row["text"]]


def _as_large(one: Mapping[str, Json], other: Mapping[str, Json]) -> bool:
    a, b = one["expert_bytes"], other["expert_bytes"]
    return bool(a and b and abs(a["after"] - b["after"]) <= 0.01 * max(a["after"], b["after"]))


def is_random(method: Mapping[str, Json]) -> bool:
    """Whether chance chose the experts that remain; PuzzleMoE's pairs are random as published, which is no baseline."""
    return any(s["uses"].endswith(".random") and not s["uses"].startswith("pair.") for s in method["steps"])


def expected_shares(threshold: float) -> dict[str, float]:
    """Mask shares of independent Gaussian weights under PuzzleMoE's rule: 48.4 / 25.8 / 25.8 % at threshold 0.4.

    |a| / |b| is half-Cauchy, so that P(| |a| - |b| | <= t (|a| + |b|)) = 4 / pi atan(t).
    """
    shared = 4 / math.pi * math.atan(threshold)
    return {"shared": shared, "own": (1 - shared) / 2, "other": (1 - shared) / 2}
