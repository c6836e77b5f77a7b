"""From the name in `model:` to a checkpoint: a model that ships with a plugin, a directory, or a hub id."""

from __future__ import annotations

from pathlib import Path

from moefold.checkpoint import Checkpoint
from moefold.errors import CheckpointError, suggest
from moefold.hooks import Registry


def locate(name: str, registry: Registry, revision: str | None = None) -> Checkpoint:
    """Open the checkpoint that a pipeline names; a hub id is downloaded (or taken from the cache)."""
    checkpoint = Checkpoint.open(str(registry.models.get(name, name)), revision=revision)
    if not checkpoint.layers():
        raise CheckpointError(f"{name} has no layer with routed experts; moefold compresses Mixture-of-Experts models")
    return checkpoint


def check(name: str, registry: Registry) -> None:
    """Open the model if that needs no network; raises CheckpointError when it cannot be used."""
    if name in registry.models or Path(name).expanduser().exists():
        locate(name, registry)
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name} is no directory, no hub id (OWNER/NAME), and no model that a plugin ships"
            f"{suggest(name, registry.models)}"
        )
