"""Whether runs can be compared: one model, the same texts; and what to be wary of where they can."""

from __future__ import annotations

from collections.abc import Iterator

from moefold.artifact import Json
from moefold.errors import InputError
from moefold.runs import Run

SAME_LOSS = 0.005
"""Nats per token by which losses of one uncompressed model may differ between machines: rounding, and no other text."""


def check(runs: list[Run]) -> Iterator[str]:
    """What to be wary of; raises InputError with everything that forbids to compare."""
    problems = [line for run in runs[1:] for line in (*_other_texts(runs[0], run), *_other_model(runs[0], run))]
    if problems:
        raise InputError("these runs cannot be compared:\n" + "\n".join(f"  {line}" for line in problems))
    yield from (line for run in runs[1:] for line in _doubts(runs[0], run))
    calibrated = [run for run in runs if run.calibration]
    if len({frozenset(run.calibration) for run in calibrated}) > 1:
        told = "; ".join(f"{run.name} on {', '.join(run.calibration.values())}" for run in calibrated)
        yield f"calibrated on different texts, which matters more than most methods: {told}"


def _other_texts(first: Run, other: Run) -> Iterator[str]:
    a, b = first.losses, other.losses
    if set(a) != set(b):
        yield (
            f"{first.name} was evaluated on {', '.join(a)}, and {other.name} on {', '.join(b)}; evaluate both on the "
            "same texts"
        )
    for text in (text for text in a if text in b):
        if a[text]["tokens"] != b[text]["tokens"]:
            yield (
                f"the text {text} has {a[text]['tokens']:,} tokens in {first.name} and {b[text]['tokens']:,} in "
                f"{other.name}; give it the same samples and length in both pipelines"
            )
        elif a[text]["digest"] != b[text]["digest"] and a[text]["digest"] and b[text]["digest"]:
            yield (
                f"the text {text} is another in {first.name} than in {other.name} (as many tokens, but other ones); "
                "give it the same source and options in both pipelines"
            )


def _other_model(first: Run, other: Run) -> Iterator[str]:
    """A changed date alone makes another fingerprint: there, equal sizes and losses tell that it is the same model."""
    one, two = first.report["model"], other.report["model"]
    if one["fingerprint"] == two["fingerprint"] and one["fingerprint"]:
        return
    alike = all(
        first.saved[key]["before"] == other.saved[key]["before"] for key in ("expert_bytes", "checkpoint_bytes")
    )
    gaps = _gaps(first, other)
    if not alike or not gaps or max(gaps.values()) > SAME_LOSS:
        yield (
            f"{first.name} is made from {one['name']}, and {other.name} from {two['name']} (other files: the "
            "fingerprints differ, and sizes or losses of the uncompressed models too); run both on one model"
        )


def _sizes(run: Run) -> list[Json]:
    """What the uncompressed model's files hold: weights, bytes, experts of each layer."""
    experts = {number: before for number, (before, _) in run.saved["experts"].items()}
    return [run.report["model"]["expert_weights"], run.saved["expert_bytes"]["before"], experts]


def _gaps(first: Run, other: Run) -> dict[str, float]:
    """How far the uncompressed model's losses are apart, by text."""
    a, b = first.losses, other.losses
    return {text: abs(a[text]["loss_before"] - b[text]["loss_before"]) for text in a if text in b}


def _doubts(first: Run, other: Run) -> Iterator[str]:
    if first.report["model"]["fingerprint"] != other.report["model"]["fingerprint"]:
        yield (
            f"{first.name} and {other.name} read other files of {first.report['model']['name']} (or the files' dates "
            "changed in between); sizes and losses before are equal, so they are taken for the same model"
        )
    if first.report["device"] != other.report["device"]:
        yield (
            f"{first.name} was made on {first.report['device']}, and {other.name} on {other.report['device']}: compare "
            "neither their seconds nor their memory"
        )
