"""Running a pipeline inside a test, with plugins that need not be installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moefold.artifact import Json
from moefold.executors import InlineExecutor
from moefold.hooks import Registry
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
    registry = Registry.installed_and(plugins)
    pipeline = load(text, "pipeline", registry)
    planned = plan(pipeline, locate(pipeline.model, registry, pipeline.revision), device=device)
    return run(planned, Store(folder / "store"), InlineExecutor(), _silent, device=device, registry=registry)


def _silent(event: Event) -> None:
    """Nobody looks at a bar in a test."""
