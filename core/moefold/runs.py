"""Finished runs, read from the reports that they left in what they saved and in their work directories."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from moefold.artifact import Json
from moefold.errors import InputError
from moefold.report_schema import VERSION, problems
from moefold.saved import Saved

_NUMBERS = (
    "loss_before", "loss_after", "loss_increase", "perplexity_before", "perplexity_after", "recovery"
)  # fmt: skip
_GIVE = "give a directory that moefold saved, a work directory (its last run counts), or a report.json"


@dataclass(frozen=True)
class Run:
    """One saved checkpoint and the report of the run that saved it."""

    name: str
    place: Path
    report: dict[str, Json]
    step: str
    """The id of the step that saved it."""

    @property
    def method(self) -> dict[str, Json]:
        """Which steps are the method's own, which calibrate, and so on: as in `moefold.methods`."""
        found: dict[str, Json] = self.report["methods"][self.step]
        return found

    @property
    def saved(self) -> dict[str, Json]:
        """The figures of what was saved."""
        found: dict[str, Json] = self.report["saved"][self.step]["all"]
        return found

    @property
    def calibration(self) -> dict[str, str]:
        """Digest of each text that it calibrated on -> what people call it."""
        facts = [self.report["texts"][step]["all"] for step in self.method["texts"]]
        return {f["digest"]: f"{f['name']} ({f['samples']} x {f['length']} tokens)" for f in facts}

    @cached_property
    def losses(self) -> dict[str, dict[str, Json]]:
        """By the name of an evaluation text: tokens, digest, loss and perplexity before and after."""
        digests = {n: d for b in self.method["baselines"] for n, d in self._baseline(b)["digests"].items()}
        rows = [row for step in self.method["metrics"] for row in self.report["metrics"][step]["all"]["rows"]]
        return {row["text"]: row | {"digest": digests.get(row["text"])} for row in rows if "loss_after" in row}

    def _baseline(self, step: str) -> dict[str, Json]:
        found: dict[str, Json] = self.report["baselines"][step]["all"]
        return found


def read(places: Sequence[Path]) -> list[Run]:
    """The runs behind paths, with names that differ; raises InputError for what is no report of a finished run."""
    return _named([run for place in places for run in _read(place)])


def read_report(place: Path) -> tuple[Path, dict[str, Json]]:
    """The report of a finished run and the file that it is in; raises InputError for what is none."""
    file = _file(place)
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{file} cannot be read as a report ({error}); {_GIVE}") from error
    if file.name == Saved.RECORD and isinstance(report, dict) and "pipeline" not in report and "saved" in report:
        raise InputError(
            f"{file}: that run did not come to its end; give its command again: what is finished is kept, and the "
            "report is written"
        )
    if not isinstance(report, dict) or "version" not in report or "pipeline" not in report:
        raise InputError(f"{file} is no report of a run; {_GIVE}")
    if report["version"] != VERSION:
        raise InputError(
            f"{file} is a report of version {report['version']}, and this moefold reads version {VERSION}; run its "
            "pipeline again with this moefold: what is stored is not computed again"
        )
    if wrong := problems(report):
        told = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise InputError(
            f"{file} does not follow the schema of reports ({told}); run its pipeline again, or see what "
            "`moefold schema report` asks for"
        )
    _restore(report)
    return file, report


def _restore(report: dict[str, Json]) -> None:
    """Losses that are not a number, which JSON has as null, as numbers again."""
    rows = [row for layers in report["metrics"].values() for facts in layers.values() for row in facts["rows"]]
    rows = [row for row in rows if "loss_after" in row]
    for row in [*rows, *(row for verdict in report["verdicts"].values() for row in verdict["texts"])]:
        for name, value in row.items():
            if value is None and name in _NUMBERS:
                row[name] = math.nan


def _read(place: Path) -> Iterator[Run]:
    """The runs behind one argument: one, unless a report without a directory tells of several saved checkpoints."""
    file, report = read_report(place)
    found = [Run(_name(place, report, step), place, report, step) for step in report["methods"]]
    if not found:
        raise InputError(f"{file}: that run saved no checkpoint (an evaluation?); {_GIVE}")
    here = [run for run in found if file.name == Saved.RECORD and Path(run.saved["path"]).name == place.resolve().name]
    for run in here if len(here) == 1 else found:
        if not run.report["model"]["expert_weights"] or not {"experts", "expert_bytes"} <= run.saved.keys():
            raise InputError(f"{file}: the stage {run.step} does not tell experts and bytes as `save` does")
        if not run.losses:
            raise InputError(
                f"{file}: that run measured no loss; add evaluate.baseline and evaluate.perplexity to its pipeline "
                "(with the texts of the others) and run it again"
            )
        yield run


def _file(place: Path) -> Path:
    if place.is_file():
        return place
    for name in (Saved.RECORD, "report.json"):
        if (place / name).is_file():
            return place / name
    if not place.exists():
        raise InputError(f"no file or directory {place}; {_GIVE}")
    if (place / "config.json").is_file():
        raise InputError(
            f"{place} is a checkpoint without {Saved.RECORD}, so moefold did not make it in this form; {_GIVE} (the "
            "uncompressed model is in the table anyway)"
        )
    raise InputError(f"{place} holds neither {Saved.RECORD} nor report.json; {_GIVE}")


def _name(place: Path, report: dict[str, Json], step: str) -> str:
    """The path of the saved directory, as given, or as the report of a work directory has it."""
    saved = report["saved"][step]["all"]["path"]
    return str(place.absolute() if place.is_dir() and (place / Saved.RECORD).is_file() else Path(saved).absolute())


def _named(runs: list[Run]) -> list[Run]:
    """Names as short as they can be while all differ: the ends of the paths, numbered where one path is there twice."""
    paths = sorted({run.name for run in runs})
    names = {path: Path(path).name for path in paths}
    for depth in range(2, max(len(Path(path).parts) for path in paths) + 1):
        shared = {name for name, count in Counter(names.values()).items() if count > 1}
        names |= {path: "/".join(Path(path).parts[-depth:]) for path, name in names.items() if name in shared}
    seen: Counter[str] = Counter()
    found = []
    for run in runs:
        seen[run.name] += 1
        number = f" #{seen[run.name]}" if seen[run.name] > 1 else ""
        found.append(replace(run, name=names[run.name] + number))
    return found
