"""A run held against a history: each figure against the last one of its name on the same kind of machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moefold.errors import InputError
from moefold.history import SEPARATOR, Figure, Record, machines


@dataclass(frozen=True)
class Change:
    """One figure, before and now."""

    name: str
    before: Figure
    after: Figure
    since: Record
    """The run that `before` is of."""
    margin: float | None = None
    """In place of the figure's own."""

    @property
    def allowed(self) -> float:
        """How much worse it may be, in the figure's unit."""
        return self.after.allowed(self.before.value, self.margin)

    @property
    def failed(self) -> bool:
        """Whether it is worse by more than that."""
        return self.after.worse_than(self.before.value) > self.allowed

    def told(self) -> str:
        """From what to what, and what was allowed."""
        before, after = self.before.value, self.after.value
        limit = before - self.allowed if self.after.better == "more" else before + self.allowed
        least = "at least" if self.after.better == "more" else "at most"
        return f"{self.name}: from {number(before)} ({label(self.since)}) to {number(after)}; {least} {number(limit)}"


@dataclass(frozen=True)
class Changes:
    """All figures that both have, those that only one has, and in what else the two differ."""

    found: tuple[Change, ...]
    gone: tuple[str, ...]
    """Names that the last run had for a case that was measured, and that this run lacks."""
    new: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def failed(self) -> tuple[Change, ...]:
        """Those that are worse by more than is allowed."""
        return tuple(change for change in self.found if change.failed)


def against(history: Sequence[Record], run: Record, margin: float | None = None) -> Changes:
    """Hold a run against the last figures of its kind of machine; InputError where there are none.

    `margin` stands in place of every figure's own. The margins of the run count, not those of the history.
    """
    own = machines(history).get(run.machine, [])
    before: dict[str, Record] = {name: record for record in own for name in record.figures}
    common = [name for name in run.figures if name in before]
    if not common:
        kinds = "; ".join(machines(history)) or "none"
        raise InputError(
            f"the history has nothing of {run.source} on {run.machine} (it has runs on: {kinds}); "
            "record a run on this kind of machine first, with `moefold bench record HISTORY`"
        )
    found = tuple(Change(n, before[n].figures[n], run.figures[n], before[n], margin) for n in common)
    last = max((before[name] for name in common), key=own.index)
    return Changes(found, _gone(last, run), tuple(n for n in run.figures if n not in before), _remarks(last, run))


def _gone(last: Record, run: Record) -> tuple[str, ...]:
    cases = run.cases()
    return tuple(n for n in last.figures if n not in run.figures and n.partition(SEPARATOR)[0] in cases)


def _remarks(last: Record, run: Record) -> tuple[str, ...]:
    names = dict.fromkeys((*last.versions, *run.versions))
    pairs = [(name, last.versions.get(name, "unknown"), run.versions.get(name, "unknown")) for name in names]
    return tuple(f"different {name}: {a}, then {b}" for name, a, b in pairs if a != b)


def label(record: Record) -> str:
    """A run in short."""
    return f"{record.date}, {record.commit}" if record.commit else record.date


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"
