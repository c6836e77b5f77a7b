"""Progress bars per stage with the layer and the time left; nothing when the output is no terminal."""

from __future__ import annotations

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

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        if event.kind == "planned":
            for step, (todo, _) in event.totals.items():
                if todo:
                    self.bars[step] = self.progress.add_task(step, total=todo, start=False, now="")
            return
        bar = self.bars[event.step]
        now = "" if event.layer is None else f"layer {event.layer}"
        if event.kind == "started":
            self.progress.start_task(bar)
            self.progress.update(bar, now=now)
        else:
            self.progress.update(bar, advance=1 if event.kind == "finished" else 0, now=now)
            if self.progress.tasks[bar].finished:
                self.progress.stop_task(bar)
