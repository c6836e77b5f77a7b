"""Writes what was measured in pytest-benchmark's JSON, with the device and the versions, without needing pytest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import moefold_kernels
from moefold_kernels.bench import kernel
from moefold_kernels.bench.measure import Prepared

PACKAGE = Path(moefold_kernels.__file__).parent
_LIBRARIES = ("moefold", "torch", "triton", "transformers")


def machine(device: torch.device) -> dict[str, Any]:
    """Our part of `machine_info`: the device's name, the versions, and the kernels' digest.

    It is published, so no name of the host.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
    name += ", Triton interpreted" if kernel.interpreted() else ""
    versions = {"python": platform.python_version()} | _versions()
    return {"node": "", "release": "", "device": name, "versions": versions, "kernels": digest()}


def digest() -> str:
    """Of the package's files, which says of a run whether it was of the kernels that somebody has before them."""
    files = sorted(file for file in PACKAGE.rglob("*") if file.suffix in {".py", ".json"})
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(PACKAGE).as_posix()}\n".encode() + file.read_bytes())
    return found.hexdigest()[:12]


def _versions() -> dict[str, str]:
    found: dict[str, str] = {"torch": str(torch.__version__)}
    for name in _LIBRARIES:
        try:
            found.setdefault(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def measure(prepared: Prepared, rounds: int) -> dict[str, Any]:
    """Time it; one benchmark, as pytest-benchmark writes it."""
    seconds = [prepared.rounds() for _ in range(rounds)]
    case, contender = prepared.info["case"], prepared.info["contender"]
    return {
        "group": prepared.group,
        "name": f"test_layer[{prepared.name}]",
        "fullname": f"tests/bench/test_layer.py::test_layer[{prepared.name}]",
        "params": {"case": case, "contender": contender},
        "param": prepared.name,
        "extra_info": prepared.info,
        "options": {},
        "stats": statistics_of(seconds),
    }


def statistics_of(seconds: Sequence[float]) -> dict[str, Any]:
    """pytest-benchmark's fields; quartiles by inclusive interpolation, where it has a rule of its own."""
    data = sorted(seconds)
    mean = statistics.mean(data)
    deviation = statistics.stdev(data) if len(data) > 1 else 0.0
    q1, median, q3 = statistics.quantiles(data, n=4, method="inclusive") if len(data) > 1 else data * 3
    inside = [x for x in data if q1 - 1.5 * (q3 - q1) <= x <= q3 + 1.5 * (q3 - q1)]
    strays = sum(abs(x - mean) > deviation for x in data)
    return {
        "min": data[0],
        "max": data[-1],
        "mean": mean,
        "stddev": deviation,
        "rounds": len(data),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": len(data) - len(inside),
        "stddev_outliers": strays,
        "outliers": f"{strays};{len(data) - len(inside)}",
        "ld15iqr": inside[0],
        "hd15iqr": inside[-1],
        "ops": 1 / mean,
        "total": sum(data),
        "iterations": 1,
    }


def write(path: Path, device: torch.device, entries: Iterable[dict[str, Any]]) -> None:
    """Write one run."""
    system = {"machine": platform.machine(), "system": platform.system(), "python_version": platform.python_version()}
    run = {
        "machine_info": system | machine(device),
        "commit_info": {},
        "benchmarks": list(entries),
        "datetime": datetime.now(UTC).isoformat(),
        "version": "moefold",  # of the writer
    }
    path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
