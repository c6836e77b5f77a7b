"""A made-up run for tests of what reads runs: the figures are invented, and the device's name says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEVICE = "invented device"
HIDDEN_INNER = {"mixtral-8x7b": (4096, 14336), "qwen3-30b-a3b": (2048, 768)}
TIMES = {
    ("mixtral-8x7b", 1, 2, 2): {"packed": 200e-6, "dense": 210e-6, "grouped_mm": 260e-6},
    ("mixtral-8x7b", 16, 8, 4): {"packed": 400e-6, "dense": 700e-6, "grouped_mm": 1000e-6},
    ("qwen3-30b-a3b", 16, 84.5, 61.25): {"packed": 180e-6, "dense": 250e-6, "grouped_mm": 300e-6},
}


def content(device: str = DEVICE) -> dict[str, Any]:
    """pytest-benchmark's JSON, as little of it as is read."""
    benchmarks = []
    for (shape, tokens, experts, pairs), times in TIMES.items():
        for contender, seconds in times.items():
            hidden, inner = HIDDEN_INNER[shape]
            read = (pairs if contender == "packed" else experts) * 6 * hidden * inner
            info = {
                "case": f"{shape}-{tokens}-balanced",
                "contender": contender,
                "shape": shape,
                "tokens": tokens,
                "routing": "balanced",
                "experts_hit": experts,
                "pairs_hit": pairs,
                "bytes": read,
                "flops": 12 * tokens * hidden * inner,
                "read_bandwidth": 4e12,
                "matmul_rate": 7e14,
                "floor": read / 4e12,
                "bound": "memory",
                "error": 0.003,
            }
            benchmarks.append({"extra_info": info, "stats": {"median": seconds}})
    machine = {"device": device, "versions": {"python": "3.0", "torch": "9.9"}}
    return {"machine_info": machine, "datetime": "2001-02-03T04:05:06+00:00", "benchmarks": benchmarks}


def change(run: dict[str, Any], case: str, contender: str, factor: float) -> None:
    """Multiply one time."""
    (one,) = [
        b for b in run["benchmarks"] if (b["extra_info"]["case"], b["extra_info"]["contender"]) == (case, contender)
    ]
    one["stats"]["median"] *= factor


def write(path: Path, run: dict[str, Any] | None = None) -> Path:
    path.write_text(json.dumps(run or content()))
    return path
