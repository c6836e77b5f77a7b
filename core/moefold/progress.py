"""Progress bars per stage with the layer and the time left; nothing when the output is no terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moefold.run import Event

LOG = logging.getLogger("moefold.progress")
"""Stages that run once and loop over layers say `LOG.info("layer %d of %d", layer, count)` here."""


class Bars:
    """A reporter that draws one bar per stage."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]:<9}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.bars: dict[str, TaskID] = {}
        self.now: TaskID | None = None
        self.inner = _Inner(self)

    def __enter__(self) -> Bars:
        LOG.setLevel(logging.INFO)
        LOG.propagate = False
        LOG.addHandler(self.inner)
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        LOG.removeHandler(self.inner)

    def within(self, layer: int, count: int) -> None:
        """Show how far the running task is in a loop over layers of its own."""
        if self.now is not None and self.progress.tasks[self.now].total in (1, count):
            self.progress.update(self.now, total=count, completed=layer, now=f"layer {layer}")

    def __call__(self, event: Event) -> None:
        if event.kind == "planned":
            for step, (todo, _) in event.totals.items():
                if todo:
                    self.bars[step] = self.progress.add_task(step, total=todo, start=False, now="")
            return
        bar = self.bars[event.step]
        now = "" if event.layer is None else f"layer {event.layer}"
        if event.kind == "started":
            self.now = bar
            self.progress.start_task(bar)
            self.progress.update(bar, now=now)
        else:
            once = event.layer is None and event.kind == "finished"
            if once:
                self.progress.update(bar, completed=self.progress.tasks[bar].total)
            else:
                self.progress.update(bar, advance=1 if event.kind == "finished" else 0, now=now)
            if self.progress.tasks[bar].finished:
                self.progress.stop_task(bar)


class _Inner(logging.Handler):
    """Hands what a stage logs of its own loop to the bars; ignores anything else."""

    def __init__(self, bars: Bars) -> None:
        super().__init__()
        self.bars = bars

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 2:
            layer, count = record.args
            if isinstance(layer, int) and isinstance(count, int):
                self.bars.within(layer, count)


@contextmanager
def one_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """One bar for what is going on now (what, how much of it is done, and of how much), for commands without stages.

    Where there is no terminal, a line for each thing that begins.
    """
    columns = (TextColumn("{task.description:<44}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    last = ""
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(what: str, done: int, of: int) -> None:
            nonlocal last
            progress.update(task, description=what, completed=done, total=of)
            if what != last and not console.is_terminal:
                console.print(f"{what} ({of})" if of > 1 else what, highlight=False, markup=False, soft_wrap=True)
            last = what

        yield show
