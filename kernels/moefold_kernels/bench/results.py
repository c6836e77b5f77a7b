"""Results read back: one run's rows from pytest-benchmark's JSON, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moefold_kernels.bench.contenders import BASELINES
from moefold_kernels.errors import BenchmarkError

FLOOR = "floor"


@dataclass(frozen=True)
class Row:
    """One contender on one case; times are seconds per call."""

    case: str
    contender: str
    shape: str
    tokens: int
    routing: str
    experts_hit: float
    pairs_hit: float
    bytes: float
    flops: float
    read_bandwidth: float
    matmul_rate: float
    floor: float
    bound: str
    error: float
    seconds: float

    @property
    def bandwidth_share(self) -> float:
        """Bytes of weights that must be read, over the time, as a part of the measured read bandwidth."""
        return self.bytes / self.seconds / self.read_bandwidth

    @property
    def floor_share(self) -> float:
        """The floor over the time: 1 cannot be passed."""
        return self.floor / self.seconds


@dataclass(frozen=True)
class Run:
    """One file: where, with what, when, and what was measured."""

    source: str
    date: str
    device: str
    versions: Mapping[str, str]
    rows: tuple[Row, ...]
    others: int
    """Benchmarks in the file that are not of the layer."""

    def times(self) -> dict[str, dict[str, Row]]:
        """case -> contender -> its row."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault(row.case, {})[row.contender] = row
        return found

    def ratios(self) -> dict[tuple[str, str, str], float]:
        """(case, contender, against) -> how many times faster it is; against the floor at most 1."""
        found: dict[tuple[str, str, str], float] = {}
        for case, rows in self.times().items():
            for name, row in rows.items():
                if name in BASELINES:
                    continue
                found |= {(case, name, b): rows[b].seconds / row.seconds for b in BASELINES if b in rows}
                found[case, name, FLOOR] = row.floor_share
        return found


def read(path: Path) -> Run:
    """The run in a file; BenchmarkError says where it is not one."""
    content = _content(path)
    machine, listed = content.get("machine_info"), content.get("benchmarks")
    if not isinstance(machine, dict) or not isinstance(listed, list):
        raise BenchmarkError(f"{path}: not pytest-benchmark's JSON (no machine_info, no benchmarks); {_HOW}")
    for key, kind in (("device", str), ("versions", dict)):
        if not isinstance(machine.get(key), kind):
            raise BenchmarkError(f"{path}: machine_info.{key} is missing: not a run of moefold's benchmarks; {_HOW}")
    ours = {at: one for at, one in enumerate(listed) if isinstance(_path(one, "extra_info", "contender"), str)}
    rows = tuple(_row(f"{path}: benchmarks[{at}]", one) for at, one in ours.items())
    if not rows:
        raise BenchmarkError(f"{path}: none of its {len(listed)} benchmarks is of the layer; {_HOW}")
    _check_once(path, rows)
    date = str(content.get("datetime", ""))[:10]
    return Run(path.name, date, machine["device"], machine["versions"], rows, len(listed) - len(rows))


_HOW = "write one with `moefold bench run --json FILE` or `pytest tests/bench --benchmark-only --benchmark-json FILE`"


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror}; {_HOW}") from error
    except UnicodeDecodeError:
        raise BenchmarkError(f"{path}: not JSON (not even text); {_HOW}") from None
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}; {_HOW}") from error
    if not isinstance(content, dict):
        raise BenchmarkError(f"{path}: a JSON {type(content).__name__}, not an object; {_HOW}")
    return content


def _path(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _row(where: str, one: Any) -> Row:
    info = one["extra_info"]
    values = {}
    for field in fields(Row)[:-1]:
        value = values[field.name] = info.get(field.name)
        right = isinstance(value, str) if field.type == "str" else _is_number(value, zero=field.name == "error")
        if not right:
            raise BenchmarkError(f"{where}.extra_info.{field.name} is {value!r}; run the benchmark again")
    seconds = _path(one, "stats", "median")
    if not _is_number(seconds):
        raise BenchmarkError(f"{where}.stats.median is {seconds!r}, not a positive number; run the benchmark again")
    return Row(**values, seconds=seconds)


def _is_number(value: object, zero: bool = False) -> bool:
    """A finite positive number, or zero where that is possible."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < float("inf") or (zero and value == 0)


def _check_once(path: Path, rows: tuple[Row, ...]) -> None:
    seen = set()
    for row in rows:
        key = (row.case, row.contender)
        if key in seen:
            raise BenchmarkError(f"{path}: {row.contender} on {row.case} is there twice; keep one run a file")
        seen.add(key)
