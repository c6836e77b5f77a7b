"""Reports as runs leave them, of any size, without a run."""

from __future__ import annotations

import random
from typing import Any

import torch

from moefold import shades
from moefold.report_schema import VERSION
from moefold.verdict import verdicts


def synthetic(layers: int = 3, experts: int = 8, **changes: Any) -> dict[str, Any]:
    """A packed model: pairs by similarity, every figure that a report can hold; the first expert saw nothing."""
    dice = random.Random(0)
    numbers = [str(n) for n in range(layers)]
    tokens = {n: [0, 3, *(dice.randrange(40, 4000) for _ in range(experts - 2))] for n in numbers}
    order = {n: dice.sample(range(experts), experts) for n in numbers}
    pairs = {n: [sorted(one) for one in zip(order[n][::2], order[n][1::2], strict=True)] for n in numbers}
    before = [round(2 + dice.gauss(0, 0.2), 7) for _ in range(16)]
    given = {
        "rows": [loss_row("prose", before, [b + 0.1 + dice.gauss(0, 0.02) for b in before], gate=0.2)],
        "warnings": ["the text gave <few> samples"],
    } | changes
    report: dict[str, Any] = {
        "version": VERSION,
        "pipeline": {
            "model": "org/model",
            "stages": [
                {"id": "pair.similar", "uses": "pair.similar", "with": {}, "needs": {}},
                {"id": "puzzlemoe", "uses": "puzzlemoe", "with": {"threshold": 0.4, "seed": 5}, "needs": {}},
            ],
        },
        "source": "p.yaml",
        "model": {"name": "org/model", "fingerprint": "f" * 64, "expert_weights": 1000},
        "device": "cpu",
        "methods": {
            "save": {
                "steps": [{"id": "pair.similar", "uses": "pair.similar", "with": {}}],
                "through": [],
                "own": ["similarity", "pair.similar", "puzzlemoe", "pack", "save"],
                "calibration": ["text", "forward", "observe"],
                "texts": ["text"],
                "metrics": ["evaluate", "layers", "samples"],
                "baselines": ["baseline"],
            }
        },
        "versions": {"moefold": "0.1.0", "triton": None},
        "texts": {"text": {"all": {"name": "book", "samples": 4, "length": 8, "digest": "d" * 16, "sources": []}}},
        "activity": {
            "observe": {
                n: {
                    "tokens": tokens[n],
                    "activation": [dice.random() for _ in range(experts)],
                    "total": 5000,
                    "minimum": 32,
                    "starved": [0, 1],
                }
                for n in numbers
            }
        },
        "packed": {
            "pack": {
                n: {
                    "pairs": pairs[n],
                    "dense": [],
                    "format": "exponent",
                    "counts": {"weights": 1000, "shared": 480, "own": 260, "other": 260, "clipped": 2, "flushed": 1},
                    "pair_counts": pair_counts(experts // 2),
                }
                for n in numbers
            }
        },
        "reduced": {},
        "saved": {
            "save": {
                "all": {
                    "path": "out/packed",
                    "files": {"config.json": 900},
                    "experts": {n: [experts, experts] for n in numbers},
                    "expert_bytes": {"before": 2000, "after": 1000},
                    "checkpoint_bytes": {"before": 3000, "after": 2000},
                    "needs_moefold": True,
                }
            }
        },
        "baselines": {"baseline": {"all": {"losses": {"prose": 2.0}, "digests": {"prose": "e" * 16}}}},
        "metrics": {
            "evaluate": {"all": {"title": "loss and perplexity", "rows": given["rows"]}},
            "layers": {"all": {"title": "layers", "rows": [layer_row(n, experts, dice) for n in range(layers)]}},
            "samples": {"all": {"title": "samples", "rows": [sample_row()]}},
        },
        "stages": {"forward": took(layers), "save": took(1)},
        "tasks": {step: {n: [1.5, 2 * 10**9, 0] for n in numbers} for step in ("forward", "observe", "pack")},
        "similarity": {
            "similarity": {n: {"metric": "cosine", **shades.encode(alike(experts, int(n)))} for n in numbers}
        },
        "events": [
            {"when": "2026-01-01T00:00:00+00:00", "event": "started", "to_run": {"forward": layers}},
            {"when": "2026-01-01T01:00:00+00:00", "event": "started", "to_run": {"forward": 1}},
            {"when": "2026-01-01T02:00:00+00:00", "event": "finished"},
        ],
        "warnings": given["warnings"],
    }
    return report | {"verdicts": verdicts(report)}


def pair_counts(pairs: int) -> dict[str, list[int]]:
    """Of each pair; the first clips."""
    each = {"weights": 100, "shared": 48, "own": 30, "other": 22, "flushed": 0}
    return {name: [count] * pairs for name, count in each.items()} | {"clipped": [2] + [0] * (pairs - 1)}


def loss_row(text: str, before: list[float], after: list[float], **more: Any) -> dict[str, Any]:
    a, b = sum(before) / len(before), sum(after) / len(after)
    judged = {"passed": b - a <= more["gate"]} if "gate" in more else {}
    return {
        "text": text, "tokens": 512, "loss_before": a, "loss_after": b, "loss_increase": b - a,
        "perplexity_before": 2.718281828**a, "perplexity_after": 2.718281828**b,
        "samples_before": before, "samples_after": after, **more, **judged,
    }  # fmt: skip


def layer_row(number: int, experts: int, dice: random.Random) -> dict[str, Any]:
    kept = [round(0.7 + dice.random() / 10, 5) for _ in range(experts)]
    return {
        "layer": number, "output_error": 0.1, "update_error": 0.2, "cumulative_error": 0.1 + number / 100,
        "routing_overlap": 0.9, "kept": kept,
    }  # fmt: skip


def sample_row() -> dict[str, Any]:
    return {
        "text": "prose", "prompt": "</script><b>a prompt", "before": "x", "after": "y", "same_tokens": 3,
        "new_tokens": 8,
    }  # fmt: skip


def took(tasks: int) -> dict[str, Any]:
    return {
        "tasks": tasks, "to_run": tasks, "ran": tasks, "seconds": 1.0, "peak_bytes": 10, "peak_device_bytes": 0,
        "stored_seconds": 1.0, "stored_peak_bytes": 10, "stored_peak_device_bytes": 0,
    }  # fmt: skip


def alike(experts: int, seed: int) -> torch.Tensor:
    values = torch.randn(experts, experts, generator=torch.Generator().manual_seed(seed))
    return (values + values.T) / 2
