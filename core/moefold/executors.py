"""Where tasks run: in this process, in several, or where a plugin says (any `concurrent.futures.Executor`)."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, ParamSpec, TypeVar

import torch

from moefold.errors import InputError
from moefold.hooks import Registry

P = ParamSpec("P")
T = TypeVar("T")


class InlineExecutor(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def make(name: str, workers: int, device: str, registry: Registry) -> Executor:
    """The executor of this name: `inline`, `process`, or a plugin's."""
    if name == "inline":
        if workers != 1:
            raise InputError(f"inline runs one task at a time; for {workers} workers add --executor process")
        return InlineExecutor()
    if name == "process":
        return _processes(workers, device)
    return registry.executor(name, workers)


def _processes(workers: int, device: str) -> ProcessPoolExecutor:
    """Fresh processes (a CUDA context does not survive a fork), on CUDA each with a GPU of its own in turn."""
    context: Any = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(numbers, workers, gpus))


def _start(numbers: Any, workers: int, gpus: int) -> None:
    number = numbers.get()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
