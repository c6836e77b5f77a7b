"""What was measured, run by run: one line of JSON each, in a file that lives in the repository."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from moefold.errors import InputError

SEPARATOR = " / "
"""Between the parts of a figure's name: the case, then what was measured of it."""

_WRITE = "`moefold bench record FILE.jsonl` writes such lines"


@dataclass(frozen=True)
class Figure:
    """One value, which way is better, and how much worse it may become before that is a regression.

    Allowed is `margin` times the value before, plus `slack` in the value's own unit (for values near zero).
    """

    value: Annotated[float, Field(allow_inf_nan=False)]
    better: Literal["more", "less"]
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    slack: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def worse_than(self, before: float) -> float:
        """By how much, in the value's unit; negative where it is better."""
        return before - self.value if self.better == "more" else self.value - before

    def allowed(self, before: float, margin: float | None = None) -> float:
        """How much worse than `before` it may be, in the value's unit."""
        return (self.margin if margin is None else margin) * abs(before) + self.slack


class _Line(BaseModel):
    """The format of a line; `moefold` is its version."""

    model_config = ConfigDict(extra="forbid")
    moefold: Literal[1]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    commit: str | None
    machine: str
    versions: dict[str, str]
    source: str
    figures: Annotated[dict[str, Figure], Field(min_length=1)]


@dataclass(frozen=True)
class Record:
    """One run: when, of which commit, on what kind of machine, with which versions, and its figures by name."""

    date: str
    commit: str | None
    machine: str
    """Figures are compared between runs of one kind of machine."""
    versions: Mapping[str, str]
    source: str
    """Where the figures came from: the benchmarks that were measured, or the files that were read."""
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def line(self) -> str:
        """As it stands in the file."""
        figures = {name: _brief(figure) for name, figure in self.figures.items()}
        content = {"moefold": 1, **asdict(self), "figures": figures}
        return json.dumps(content, ensure_ascii=False, allow_nan=False)

    def cases(self) -> set[str]:
        """The first parts of its figures' names."""
        return {name.partition(SEPARATOR)[0] for name in self.figures}


def _brief(figure: Figure) -> dict[str, object]:
    return {name: value for name, value in asdict(figure).items() if name != "slack" or value}


def check(figures: Mapping[str, Figure], where: str) -> dict[str, Figure]:
    """The figures as they may be recorded; raises InputError that names the one which may not."""
    try:
        return TypeAdapter(dict[str, Figure]).validate_python({n: asdict(f) for n, f in figures.items()})
    except ValidationError as error:
        raise InputError(f"{where}: {_first(error)}") from error


def read(path: Path) -> list[Record]:
    """Every line of a history, the oldest first; InputError says which line is wrong, and how."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; {_WRITE}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty; {_WRITE}")
    return [_read(f"{path}:{number}", line) for number, line in lines]


def _read(where: str, line: str) -> Record:
    try:
        found = _Line.model_validate_json(line)
    except ValidationError as error:
        raise InputError(f"{where}: {_first(error)}; {_WRITE}") from error
    return Record(found.date, found.commit, found.machine, found.versions, found.source, found.figures)


def _first(error: ValidationError) -> str:
    one = error.errors()[0]
    place = ".".join(map(str, one["loc"]))
    return f"{place}: {one['msg']}" if place else one["msg"]


def append(path: Path, record: Record) -> None:
    """Add a line to a history that reads well, or start one; raises InputError where that cannot be."""
    if path.exists():
        read(path)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(record.line() + "\n")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}; name a file in a directory that exists"
        ) from error


def machines(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The runs of each kind of machine."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.machine, []).append(record)
    return found
