"""A history as a page with pictures, and as tables for a document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from moefold import pictures
from moefold.errors import InputError
from moefold.history import SEPARATOR, Figure, Record, machines
from moefold.history_change import Change, label, number
from moefold.html import Page, badge, paragraph, table

BEGIN = "<!-- history: made by `moefold bench history` from the recorded runs; edits are lost -->"
END = "<!-- end of history -->"

COLUMNS = ("figure", "better", "first", "before", "last", "worse by", "allowed")


def rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """A line for each figure of one kind of machine, by COLUMNS."""
    return [_row(name, points) for name, points in series(records).items()]


def series(records: Iterable[Record]) -> dict[str, list[tuple[Record, Figure]]]:
    """Each figure's values with the runs that they are of, the oldest first."""
    found: dict[str, list[tuple[Record, Figure]]] = {}
    for record in records:
        for name, figure in record.figures.items():
            found.setdefault(name, []).append((record, figure))
    return found


def _row(name: str, points: Sequence[tuple[Record, Figure]]) -> tuple[str, ...]:
    change, last = _last_change(name, points), points[-1][1]
    if change is None:
        return (name, last.better, number(last.value), "–", number(last.value), "–", "–")
    worse = max(0.0, last.worse_than(change.before.value))
    cells = (points[0][1].value, change.before.value, last.value, worse, change.allowed)
    return (name, last.better, *map(number, cells))


def _last_change(name: str, points: Sequence[tuple[Record, Figure]]) -> Change | None:
    if len(points) < 2:
        return None
    (since, before), (_, after) = points[-2:]
    return Change(name, before, after, since)


def page(records: Sequence[Record]) -> Page:
    """A section for each kind of machine, the latest run's first: how its figures went, and the last change of each."""
    made = Page("moefold: figures over time")
    latest = sorted(machines(records).items(), key=lambda item: item[1][-1].date, reverse=True)
    for at, (machine, own) in enumerate(latest):
        pictured = [
            made.figure(f"history-{at}-{i}", _picture(measure, lines), f"{measure}: {_better(lines)}")
            for i, (measure, lines) in enumerate(_measures(own).items())
        ]
        made.add(f"machine-{at}", machine, _summary(own) + "".join(pictured) + _table(own))
    return made


def _summary(own: Sequence[Record]) -> str:
    last = own[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last.versions.items())
    return paragraph(f"{len(own)} run{'s' if len(own) > 1 else ''}, the last {label(last)} with {versions}.")


def _measures(own: Sequence[Record]) -> dict[str, dict[str, list[tuple[Record, Figure]]]]:
    """What was measured -> case -> its values; the case is the first part of a figure's name."""
    found: dict[str, dict[str, list[tuple[Record, Figure]]]] = {}
    for name, points in series(own).items():
        case, _, measure = name.partition(SEPARATOR)
        found.setdefault(measure or case, {})[case] = points
    return found


def _better(lines: Mapping[str, Sequence[tuple[Record, Figure]]]) -> str:
    kinds = {figure.better for points in lines.values() for _, figure in points}
    return f"{' or '.join(sorted(kinds))} is better; runs from left to right"


def _picture(measure: str, lines: Mapping[str, Sequence[tuple[Record, Figure]]]) -> dict[str, object]:
    values = {case: [(label(record), figure.value) for record, figure in points] for case, points in lines.items()}
    return pictures.over_runs(values, measure)


def _table(own: Sequence[Record]) -> str:
    found = []
    for row, (name, points) in zip(rows(own), series(own).items(), strict=True):
        change = _last_change(name, points)
        held = None if change is None else badge(*(("worse", "bad") if change.failed else ("held", "good")))
        found.append([*row, held])
    return table([*COLUMNS, "verdict"], found, {0: "longest"})


def replaced(document: Path, records: Sequence[Record], source: Path) -> str:
    """A document's text with the part between its markers made anew; raises InputError where they are missing."""
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{document} cannot be read: {error}; name a page that exists") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"{document}: write these two lines where the tables belong, once: {BEGIN} and {END}")
    parts = [_section(machine, own, source) for machine, own in machines(records).items()]
    return "\n\n".join([text.partition(BEGIN)[0] + BEGIN, *parts, END + text.partition(END)[2]])


def _section(machine: str, own: Sequence[Record], source: Path) -> str:
    """A line for each case, a column for each measure: the last value, and the one before where there is one."""
    measures = _measures(own)
    cases = dict.fromkeys(case for lines in measures.values() for case in lines)
    head = ["case", *(f"{measure} ({_better(lines).partition(' is')[0]})" for measure, lines in measures.items())]
    body = [[case, *(_cell(lines.get(case, ())) for lines in measures.values())] for case in cases]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
    told = f"Runs in {source.name}: {'; '.join(map(label, own))}. After the last value stands the one before."
    return "\n\n".join([f"### {escape(machine, quote=False)}", told, "\n".join(lines)])


def _cell(points: Sequence[tuple[Record, Figure]]) -> str:
    if not points:
        return "–"
    change, last = _last_change("", points), number(points[-1][1].value)
    if change is None:
        return last
    return f"{f'**{last}**' if change.failed else last}, before {number(change.before.value)}"
