"""Benchmarks that plugins give: `@benchmark` above one function that returns figures."""

from __future__ import annotations

import fnmatch
import inspect
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moefold.errors import InputError, PluginError, suggest
from moefold.history import SEPARATOR, Figure, check

if TYPE_CHECKING:
    from moefold.artifact import Json
    from moefold.hooks import Registry
    from moefold.run import Event

LOSS_MARGIN = 0.06
LOSS_SLACK = 0.001
"""Of a loss increase: a part of it, and nats per token beside; docs/regressions.md has what they were set by."""

BYTES_MARGIN = 0.001
"""Of the ratio of bytes, which is exact but for what describes a layer."""


@dataclass(frozen=True)
class Workbench:
    """Where benchmarks measure: a folder whose store they share, and a device."""

    folder: Path
    device: str = "cpu"
    plugins: Sequence[object] = ()
    """Modules with `@hookimpl` functions beside those that are installed, as in a plugin's tests."""

    def quality(self, pipeline: str, *settings: str) -> dict[str, Figure]:
        """What a pipeline saves and loses: expert bytes after / before, and the loss increase on each text in nats.

        `pipeline` is YAML, or the name of one that ships; `settings` are STAGE.OPTION=VALUE. Raises InputError unless
        one stage saves and one evaluates what was saved.
        """
        rows, size = self._run(pipeline, settings)
        figures = {
            f"loss increase on {row['text']}": Figure(row["loss_increase"], "less", LOSS_MARGIN, LOSS_SLACK)
            for row in rows
        }
        return {"expert bytes": Figure(size["after"] / size["before"], "less", BYTES_MARGIN), **figures}

    def _run(self, pipeline: str, settings: Sequence[str]) -> tuple[list[Mapping[str, Json]], Mapping[str, Json]]:
        from moefold import shipped
        from moefold.executors import InlineExecutor
        from moefold.models import locate
        from moefold.overrides import Overrides
        from moefold.pipeline import load
        from moefold.plan import plan
        from moefold.run import run
        from moefold.store import Store

        registry = self._registry()
        text = pipeline if "\n" in pipeline else shipped.find(pipeline).read_text(encoding="utf-8")
        name = "the benchmark's pipeline" if "\n" in pipeline else pipeline
        read = load(text, name, registry, Overrides(to=str(self.folder / "saved"), settings=tuple(settings)))
        planned = plan(read, locate(read.model, registry, read.revision), device=self.device)
        keep = ["forward"] if "forward" in read.steps else []  # benchmarks share one calibration
        store = Store(self.folder / "store")
        found = run(planned, store, InlineExecutor(), _silent, device=self.device, registry=registry, keep=keep)
        facts = [note["facts"] for notes in found.values() for note in notes.values()]
        rows = [row for one in facts for row in one.get("rows", ()) if "loss_increase" in row]
        sizes = [one["expert_bytes"] for one in facts if isinstance(one.get("expert_bytes"), Mapping)]  # before, after
        if len(sizes) != 1 or not rows:
            raise InputError(
                f"{name}: {len(sizes)} stages save, and {len(rows)} texts were evaluated; quality is of one "
                "checkpoint: write one `save`, `evaluate.baseline` and `evaluate.perplexity`"
            )
        return rows, sizes[0]

    def _registry(self) -> Registry:
        from moefold.hooks import Registry

        return Registry.installed_and(self.plugins) if self.plugins else Registry.installed()


def _silent(event: Event) -> None:
    """Nobody looks at a bar in a benchmark."""


Measure = Callable[[Workbench], Mapping[str, Figure]]


@dataclass(frozen=True)
class Benchmark:
    """A function that measures, and the name of its case."""

    name: str
    measure: Measure
    summary: str = field(default="")

    def figures(self, workbench: Workbench) -> dict[str, Figure]:
        """What it measured, by `case / what`; raises InputError for what is no figure."""
        try:
            found = self.measure(workbench)
        except Exception as error:
            error.add_note(f"(benchmark {self.name})")
            raise
        if not isinstance(found, Mapping) or not found or not all(isinstance(f, Figure) for f in found.values()):
            raise InputError(f"benchmark {self.name}: it must return figures by name: {{'error': Figure(0.1, 'less')}}")
        return check({f"{self.name}{SEPARATOR}{what}": figure for what, figure in found.items()}, self.name)


def benchmark(name: str) -> Callable[[Measure], Benchmark]:
    """Make a benchmark of a function that takes a Workbench and returns figures by what they measure."""
    if not name or "/" in name:
        raise PluginError(f"benchmark {name!r}: a name without / is wanted; what is measured is put after one")

    def wrap(function: Measure) -> Benchmark:
        return Benchmark(name, function, (inspect.getdoc(function) or "").partition("\n")[0])

    return wrap


def chosen(patterns: Iterable[str], known: Mapping[str, Benchmark]) -> list[Benchmark]:
    """Those whose names fit (`quality.*`), all for no pattern; raises InputError for a pattern that none fits."""
    wanted = list(patterns)
    for pattern in wanted:
        if not fnmatch.filter(known, pattern):
            raise InputError(f"no benchmark is called {pattern}{suggest(pattern, known)}")
    if not known:
        raise InputError("no installed plugin gives a benchmark; docs/plugins.md shows how one is written")
    return [one for name, one in known.items() if not wanted or any(fnmatch.fnmatch(name, p) for p in wanted)]


def machine(device: str) -> str:
    """The kind of machine, for figures of benchmarks: the texts that ship are this Python's own."""
    from moefold_kernels.bench.record import machine as of_device

    python = ".".join(platform.python_version_tuple()[:2])
    return f"{of_device(torch.device(device))['device']}, Python {python}"


def measured(benchmarks: Iterable[Benchmark], device: str, hear: Callable[[str], None]) -> dict[str, Figure]:
    """Measure all in one folder, which goes afterwards; `hear` is told each name before it starts."""
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory(prefix="moefold-bench-") as folder:
        workbench = Workbench(Path(folder), device)
        for one in benchmarks:
            hear(one.name)
            figures |= one.figures(workbench)
    return figures
