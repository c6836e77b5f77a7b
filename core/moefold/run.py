"""The loop: what is missing, what is ready, lowest layer first, at most `window` layers ahead."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Literal

from filelock import FileLock, Timeout

from moefold.artifact import Json
from moefold.errors import StageError, StoreError
from moefold.executors import InlineExecutor
from moefold.hooks import Registry
from moefold.plan import Plan, Task
from moefold.store import Store
from moefold.task import Done, execute


@dataclass(frozen=True)
class Event:
    """Something that a reporter hears of."""

    kind: Literal["planned", "started", "finished", "failed"]
    step: str = ""
    layer: int | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    peak_device_bytes: int = 0
    totals: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """With `planned`: per step, the tasks to run and all tasks."""
    message: str = ""


Reporter = Callable[[Event], None]


def run(
    plan: Plan,
    store: Store,
    executor: Executor,
    reporter: Reporter,
    *,
    device: str,
    registry: Registry,
    workers: int = 1,
    window: int = 2,
    keep: Collection[str] = (),
) -> dict[str, Json]:
    """Do what the store lacks; returns the facts of every stored result by step and layer.

    What steps in `keep` make stays in the store for other runs, also where it would live until it is read only.

    Raises StageError (or the error that a stage raised) after what was in flight is stored; StoreError when another
    run uses the same store.
    """
    lock = FileLock(store.root / "lock")
    try:
        store.root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreError(f"another run uses {store.root}; wait for it, or give this one its own --work") from None
    except OSError as error:
        raise StoreError(f"{store.root} cannot be written: {error.strerror or error}; give another --work") from error
    try:
        store.sweep()
        _Loop(plan, store, executor, reporter, device, registry, workers, window, keep).run()
        return facts(plan, store)
    finally:
        lock.release()


def facts(plan: Plan, store: Store) -> dict[str, Json]:
    """What the results of a plan say of themselves, also those dropped since: `{step: {layer or "all": note}}`."""
    found: dict[str, Json] = {}
    for task in plan.tasks.values():
        note = store.note(task.key)
        if note is not None:
            layer = str(task.layer.number) if task.layer else "all"
            found.setdefault(task.step, {})[layer] = note
    return found


class _Loop:
    def __init__(
        self,
        plan: Plan,
        store: Store,
        executor: Executor,
        reporter: Reporter,
        device: str,
        registry: Registry,
        workers: int,
        window: int,
        keep: Collection[str],
    ) -> None:
        self.plan, self.store, self.executor, self.reporter = plan, store, executor, reporter
        self.device, self.workers, self.window = device, workers, window
        self.keep = keep
        # Another process reads the installed plugins itself; a registry does not travel.
        self.registry = registry if isinstance(executor, InlineExecutor) else None
        self.missing = plan.missing(store)
        self.reads = {key: plan.reads(task) for key, task in self.missing.items()}
        self.readers = Counter(k for keys in self.reads.values() for k in keys)
        self.blocked = {key: len(keys & self.missing.keys()) for key, keys in self.reads.items()}
        self.unfinished = Counter(t.layer.position for t in self.missing.values() if t.layer)
        self.ready: list[tuple[int, int, str]] = []
        self.flying: dict[Future[Done], Task] = {}

    def run(self) -> None:
        self.reporter(Event("planned", totals=self._totals()))
        for key, count in self.blocked.items():
            if count == 0:
                self._push(key)
        try:
            while self.ready or self.flying:
                self._submit()
                done, _ = wait(self.flying, return_when=FIRST_COMPLETED)
                for future in done:
                    self._finish(self.flying.pop(future), future)
        except BaseException:
            self._land()
            raise
        self._drop_unread()

    def _totals(self) -> dict[str, tuple[int, int]]:
        every = Counter(t.step for t in self.plan.tasks.values() if t.keep != "never")
        todo = Counter(t.step for t in self.missing.values())
        return {step: (todo[step], every[step]) for step in self.plan.pipeline.steps if step in every}

    def _soon_read(self, task: Task) -> bool:
        """Whether to remember a result: this process reads it, and not only once all layers are there."""
        if self.registry is None or not self._passes(task):
            return False
        return all(self.missing[key].layer for key, reads in self.reads.items() if task.key in reads)

    def _passes(self, task: Task) -> bool:
        """Whether a result is dropped when its readers have read it."""
        return task.keep == "until read" and task.step not in self.keep

    def _push(self, key: str) -> None:
        layer = self.missing[key].layer
        heapq.heappush(self.ready, (layer.position if layer else -1, self.plan.order[key], key))

    def _submit(self) -> None:
        """Start what may start: the lowest layers, no further than the window, as many as there are workers."""
        while self.ready and len(self.flying) < self.workers:
            position, _, key = self.ready[0]
            lowest = min((p for p, n in self.unfinished.items() if n), default=0)
            if self.flying and position > lowest + self.window:
                return
            heapq.heappop(self.ready)
            task = self.missing[key]
            self.reporter(Event("started", task.step, task.layer.number if task.layer else None))
            future = self.executor.submit(
                execute, task, self.plan.closure(task), self.store, self.device, self.registry, self._soon_read(task)
            )
            self.flying[future] = task

    def _finish(self, task: Task, future: Future[Done]) -> None:
        layer = task.layer.number if task.layer else None
        error = future.exception()
        if error is not None:
            self.reporter(Event("failed", task.step, layer, message=str(error)))
            if isinstance(error, BrokenExecutor):
                raise StageError(
                    f"{task.name}: a worker process died ({error}); if memory ran out, use fewer --workers"
                ) from error
            raise error
        done = future.result()
        if task.layer:
            self.unfinished[task.layer.position] -= 1
        self._release(task.key)
        for key, reads in self.reads.items():
            if task.key in reads:
                self.blocked[key] -= 1
                if self.blocked[key] == 0:
                    self._push(key)
        self.reporter(Event("finished", task.step, layer, done.seconds, done.peak_bytes, done.peak_device_bytes))

    def _release(self, key: str) -> None:
        """One reader less for all that this task read; drop what was kept until read and now is."""
        for read in self.reads[key]:
            self.readers[read] -= 1
            if self.readers[read] == 0 and self._passes(self.plan.tasks[read]):
                self.store.drop(read)

    def _land(self) -> None:
        """Let what is in flight finish, so that its results are stored and need not be computed again."""
        for future in self.flying:
            future.cancel()
        wait([f for f in self.flying if not f.cancelled()])

    def _drop_unread(self) -> None:
        """Drop what an earlier, killed run kept until read and nobody needs any more."""
        for task in self.plan.tasks.values():
            if self._passes(task):
                self.store.drop(task.key)
