"""Which runs used a work directory: when each began, what it found stored, and how it ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moefold.artifact import Json
from moefold.plan import Plan

NAME = "runs.jsonl"


@dataclass(frozen=True)
class Ledger:
    """One line of JSON an event, appended; a run that was killed has a start and no end."""

    root: Path

    @contextmanager
    def run(self, plan: Plan, to_run: Mapping[str, int]) -> Iterator[None]:
        """Note the start of a run with the tasks that it has to do, and how it ended."""
        self._add(plan, {"event": "started", "to_run": dict(to_run), "tasks": len(plan.tasks)})
        try:
            yield
        except BaseException as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            self._add(plan, {"event": "failed", "why": why.splitlines()[0][:300]})
            raise
        self._add(plan, {"event": "finished"})

    def events(self, plan: Plan) -> list[dict[str, Json]]:
        """What happened to this very plan, the first event first; lines that a full disk cut short are left out."""
        wanted = identity(plan)
        try:
            lines = (self.root / NAME).read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        found = (_read(line) for line in lines)
        return [{k: v for k, v in event.items() if k != "plan"} for event in found if event.get("plan") == wanted]

    def _add(self, plan: Plan, event: dict[str, Json]) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"when": when, "plan": identity(plan)} | event) + "\n"
        with suppress(OSError):  # the store says what is wrong with a directory that cannot be written
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / NAME).open("a", encoding="utf-8") as file:
                file.write(line)


def identity(plan: Plan) -> str:
    """What tells one plan from another: the keys of all that it works towards."""
    return hashlib.sha256(json.dumps(sorted(plan.ends)).encode()).hexdigest()[:16]


def _read(line: str) -> dict[str, Json]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
