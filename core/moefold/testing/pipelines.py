"""Running a pipeline inside a test, with plugins that need not be installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moefold.artifact import Json
from moefold.executors import InlineExecutor
from moefold.hooks import GROUP, Registry
from moefold.models import locate
from moefold.pipeline import load
from moefold.plan import plan
from moefold.run import Event, run
from moefold.store import Store


def run_pipeline(text: str, folder: Path, *, plugins: Sequence[Any] = (), device: str = "cpu") -> dict[str, Json]:
    """Run the YAML of a pipeline over a store in `folder` and give what each step said: {step: {layer: note}}.

    `plugins` are modules (or objects) with `@hookimpl` functions, beside those that are installed. A note has
    `seconds`, `peak_bytes` and `facts`; a stage that runs once stands under "all". Raises what `moefold run` prints.
    """
    registry = registry_with(plugins)
    pipeline = load(text, "pipeline", registry)
    planned = plan(pipeline, locate(pipeline.model, registry, pipeline.revision), device=device)
    return run(planned, Store(folder / "store"), InlineExecutor(), _silent, device=device, registry=registry)


def _silent(event: Event) -> None:
    """Nobody looks at a bar in a test."""


def registry_with(plugins: Sequence[Any]) -> Registry:
    """What is installed and these; a plugin that is both counts once."""
    points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
    installed = [(p.name, p.load(), p.dist.name if p.dist else p.value) for p in points]
    known = {id(module) for _, module, _ in installed}
    more = [(f"test {i}", plugin, "test") for i, plugin in enumerate(plugins) if id(plugin) not in known]
    return Registry([*installed, *more])
