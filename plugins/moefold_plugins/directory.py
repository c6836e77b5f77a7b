"""The directory that `save` writes: only where nothing of others is lost, and whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moefold import Checkpoint, Saved
from moefold.errors import InputError, StageError
from moefold_kernels.checkpoint import METHOD
from moefold_plugins.shards import flush


def refuse(target: Path, checkpoint: Checkpoint | None = None) -> None:
    """Raise InputError unless `target` is free, or holds what moefold wrote and is not the source (None: not known)."""
    if not target.exists() and not target.is_symlink():
        _check_parent(target)
        return
    if checkpoint is not None and target.exists() and target.resolve() == checkpoint.path.resolve():
        raise InputError(f"{target} is the source checkpoint itself; choose another directory (save: with: to:)")
    if not target.is_dir() or target.is_symlink():
        raise InputError(f"{target} exists and is no directory of its own; choose another path (save: with: to:)")
    if any(target.iterdir()) and not _ours(target):
        raise InputError(
            f"{target} exists and moefold did not write it; choose another directory (save: with: to:), or remove it"
        )


def _check_parent(target: Path) -> None:
    """Raise InputError where nobody could make the directory."""
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "cannot be written" if parent.is_dir() else "is no directory"
        raise InputError(f"{target} cannot be made: {parent} {why}; choose another directory (save: with: to:)")


def _ours(target: Path) -> bool:
    if (target / Saved.RECORD).is_file():
        return True
    try:  # written before there were records
        entry = json.loads((target / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A directory to write to, which takes `target`'s place when the block ends well, and is removed otherwise."""
    fresh, old = (target.with_name(f".{target.name}.moefold-{kind}") for kind in ("partial", "old"))
    try:
        yield from _replacing(target, fresh, old)
    except (OSError, SafetensorError) as error:
        raise StageError(
            f"{target} was not written ({error}); make room where that is what it wants, or choose another directory "
            "(save: with: to:)"
        ) from error


def _replacing(target: Path, fresh: Path, old: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in (fresh, old) if target.exists() else (fresh,):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    if old.exists():
        old.rename(target)  # killed between the two renames below
    fresh.mkdir()
    try:
        yield fresh
        flush(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)
