"""A checkpoint directory that a stage wrote, and how to tell whether it still is what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from moefold.artifact import Artifact, Json


@dataclass(frozen=True)
class Saved(Artifact):
    """A checkpoint directory that a stage wrote: its files with sizes, and what was saved."""

    RECORD: ClassVar[str] = "moefold.json"
    """What was saved, and after the run its whole report: tells that moefold wrote the directory, serves `compare`."""
    path: str
    files: dict[str, list[int]]
    """Size in bytes and modification time in nanoseconds by file name.

    The model card and the record are not among them (what comes later writes into them). The time matters: a run with
    another threshold into the same directory leaves files of the same sizes.
    """
    figures: dict[str, Json]

    @classmethod
    def of(cls, root: Path, path: str, figures: dict[str, Json], leave_out: tuple[str, ...]) -> Self:
        """What stands in the directory `root` now, to be known as `path`; the files `leave_out` aside."""
        found = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name not in leave_out)
        return cls(path, {str(p.relative_to(root)): _stamp(p) for p in found}, figures)

    def intact(self) -> bool:
        """Whether the directory still holds every file as it was written."""
        root = Path(self.path)
        return all((root / name).is_file() and _stamp(root / name) == stamp for name, stamp in self.files.items())

    def facts(self) -> dict[str, Json]:
        return {"path": self.path, "files": {name: size for name, (size, _) in self.files.items()}, **self.figures}


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]
