"""Runs that others wrote, as records: pytest-benchmark's JSON, and directories that `moefold run` saved."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moefold.errors import InputError
from moefold.history import SEPARATOR, Figure, Record, check
from moefold.measuring import BYTES_MARGIN, LOSS_MARGIN, LOSS_SLACK
from moefold_kernels.bench import comparison, results
from moefold_kernels.errors import BenchmarkError

_HOW = (
    "give one benchmark of a group extra_info['baseline'] = True (the others' speed is told against it), "
    "or put figures into extra_info['figures'] = {'error': {'value': 0.1, 'better': 'less'}}"
)


def record(path: Path, commit: str | None = None) -> Record:
    """The figures of a file or a saved directory; raises InputError that says where it has none.

    `commit` counts where the file does not name its own.
    """
    if path.is_dir() or path.name == "report.json":
        return _saved(path, commit)
    content = _content(path)
    if content is None or _is_of_the_layer(content):
        return _layer(path, content or {}, commit)
    figures = check(dict(_figures(path, content["benchmarks"])), str(path))
    if not figures:
        raise InputError(f"{path}: none of its {len(content['benchmarks'])} benchmarks has a figure to keep; {_HOW}")
    date = str(content.get("datetime", ""))[:10]
    return Record(date, _commit(content) or commit, _machine(content), _versions(content), path.name, figures)


def is_of_the_layer(path: Path) -> bool:
    """Whether a file is a run of the kernels' layer (or no JSON of a run: its reader says best what is wrong)."""
    content = None if path.is_dir() else _content(path)
    return path.suffix == ".json" and (content is None or _is_of_the_layer(content))


def _content(path: Path) -> dict[str, Any] | None:
    """pytest-benchmark's JSON; None for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    usable = isinstance(found, dict) and isinstance(found.get("machine_info"), dict) and found.get("benchmarks")
    return found if usable and all(isinstance(one, dict) for one in found["benchmarks"]) else None


def _info(one: Mapping[str, Any]) -> Mapping[str, Any]:
    info = one.get("extra_info")
    return info if isinstance(info, dict) else {}


def _is_of_the_layer(content: Mapping[str, Any]) -> bool:
    return any("contender" in _info(one) for one in content["benchmarks"])


def _layer(path: Path, content: Mapping[str, Any], commit: str | None) -> Record:
    """Speed against what was measured beside it in the same run."""
    try:
        run = results.read(path)
    except BenchmarkError as error:
        raise InputError(str(error)) from error
    ratios = {SEPARATOR.join(key): Figure(value, "more", comparison.MARGIN) for key, value in run.ratios().items()}
    return Record(run.date, _commit(content) or commit, run.device, run.versions, run.source, ratios)


def _figures(path: Path, benchmarks: list[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """What authors put in, and the speed within each group that has a baseline: times alone are not kept."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for at, one in enumerate(benchmarks):
        groups.setdefault(str(one.get("group")), []).append(one)
        for name, content in (_info(one).get("figures") or {}).items():
            try:
                yield f"{one['name']}{SEPARATOR}{name}", Figure(**content)
            except (TypeError, KeyError) as error:
                raise InputError(f"{path}: benchmarks[{at}].extra_info.figures.{name}: {error}; {_HOW}") from error
    for group, members in groups.items():
        baselines = [one for one in members if _info(one).get("baseline") is True]
        if len(baselines) > 1:
            raise InputError(f"{path}: group {group} has {len(baselines)} baselines; mark one of them")
        for one in members:
            if baselines and one is not baselines[0]:
                name = f"{group}{SEPARATOR}{one['name']} against {baselines[0]['name']}"
                margin = _info(one).get("margin", comparison.MARGIN)
                yield name, Figure(_median(path, baselines[0]) / _median(path, one), "more", margin)


def _median(path: Path, one: Mapping[str, Any]) -> float:
    stats = one.get("stats")
    value = stats.get("median") if isinstance(stats, dict) else None
    if not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{path}: {one.get('name')}: stats.median is {value!r}, not a positive number; run it again")
    return float(value)


def _commit(content: Mapping[str, Any]) -> str | None:
    info = content.get("commit_info") or {}
    return f"{info['id'][:9]}{'+' if info.get('dirty') else ''}" if info.get("id") else None


def _machine(content: Mapping[str, Any]) -> str:
    info = content["machine_info"]
    cpu = info.get("cpu") or {}
    return str(info.get("device") or cpu.get("brand_raw") or info.get("machine") or platform.machine())


def _versions(content: Mapping[str, Any]) -> dict[str, str]:
    info = content["machine_info"]
    python = {"python": str(info["python_version"])} if "python_version" in info else {}
    return {str(name): str(value) for name, value in (info.get("versions") or python).items()}


def _saved(path: Path, commit: str | None) -> Record:
    """Expert bytes and loss increases of the one checkpoint that a run saved."""
    from moefold.comparison import compare
    from moefold.runs import read

    report, row = read([path])[0].report, compare([path]).rows[0]
    figures = {f"{row.run}{SEPARATOR}expert bytes": Figure(row.ratio, "less", BYTES_MARGIN)} | {
        f"{row.run}{SEPARATOR}loss increase on {text}": Figure(loss.increase, "less", LOSS_MARGIN, LOSS_SLACK)
        for text, loss in row.losses.items()
        if loss.increase is not None
    }
    python = ".".join(report["versions"]["python"].split(".")[:2])
    where = f"moefold run on {report['device']}, Python {python}"  # a report does not name the chip
    date = datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
    return Record(date, commit, where, report["versions"], row.run, check(figures, str(path)))


def joined(records: Iterable[Record]) -> list[Record]:
    """One record a kind of machine; raises InputError where two have a figure of one name."""
    found: dict[str, Record] = {}
    for one in records:
        before = found.get(one.machine)
        if before is None:
            found[one.machine] = one
            continue
        if twice := sorted(set(before.figures) & set(one.figures)):
            raise InputError(f"{twice[0]} is in {before.source} and in {one.source}; record them one after the other")
        found[one.machine] = replace(
            before,
            date=max(before.date, one.date),
            source=f"{before.source}, {one.source}",
            figures={**before.figures, **one.figures},
        )
    return list(found.values())
