"""Results by key, whole or not at all.

A value is written beside its place and renamed, so that a killed run leaves nothing half-written. What is kept until
read lives on disk as well, so that a killed run goes on. Beside each value lies a note (seconds, peak memory, facts for
the report), which outlives a dropped value.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from moefold.artifact import Artifact, Json
from moefold.errors import StoreError

T = TypeVar("T", bound=Artifact)


class Store:
    """A directory of results; safe to share between processes (every write is a rename)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._memory: dict[str, Artifact] = {}

    def __getstate__(self) -> Path:
        return self.root  # a worker process starts with an empty memory

    def __setstate__(self, root: Path) -> None:
        self.root, self._memory = root, {}

    def _place(self, key: str) -> Path:
        return self.root / "results" / key[:2] / key

    def has(self, key: str, kind: type[Artifact]) -> bool:
        """Whether the value is stored, and what it points to outside the store is intact."""
        if self.note(key) is None or not (self._place(key) / "value.safetensors").is_file():
            return False
        return kind.intact is Artifact.intact or self.get(key, kind).intact()

    def note(self, key: str) -> dict[str, Json] | None:
        """What was noted when the value was stored: stage, layer, seconds, peak memory, facts; None if it never was."""
        try:
            note: dict[str, Json] = json.loads((self._place(key) / "note.json").read_text())
        except (OSError, ValueError):
            return None
        return note

    def put(self, key: str, value: Artifact, note: dict[str, Json], *, remember: bool = False) -> None:
        """Store a value and its note; a second writer of the same key changes nothing."""
        try:
            self._write(key, value, note)
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or error
            raise StoreError(
                f"{self.root} cannot be written: {why}; make room or give another --work; what is finished is kept, "
                "and the same command goes on"
            ) from error
        if remember:
            self._memory[key] = value

    def _write(self, key: str, value: Artifact, note: dict[str, Json]) -> None:
        place = self._place(key)
        beside = self.root / "writing" / f"{key}-{uuid.uuid4().hex[:8]}"
        beside.mkdir(parents=True)
        value.save(beside / "value.safetensors")
        (beside / "note.json").write_text(json.dumps(note | {"type": type(value).__name__}))
        _sync(beside)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():  # the note of a dropped value, or a value that is no longer intact
            shutil.rmtree(place)
        beside.replace(place)
        _sync_directory(place.parent)

    def get(self, key: str, kind: type[T]) -> T:
        """Read a value; from memory when this process wrote it."""
        remembered = self._memory.get(key)
        if isinstance(remembered, kind):
            return remembered
        path = self._place(key) / "value.safetensors"
        try:
            return kind.load(path)
        except FileNotFoundError:
            raise StoreError(f"no result {key} in {self.root}; run the pipeline again and it is computed") from None
        except Exception as error:
            raise StoreError(f"{path} cannot be read ({error}); delete its directory and run again") from error

    def drop(self, key: str) -> None:
        """Remove a value that all its readers have read; its note stays."""
        self._memory.pop(key, None)
        (self._place(key) / "value.safetensors").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed writers left behind; only for the one who holds the store's lock."""
        shutil.rmtree(self.root / "writing", ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
