"""Doing one task: load what it reads, call the stage, store what it gives."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moefold.artifact import Artifact, Json
from moefold.checkpoint import Checkpoint
from moefold.errors import MoefoldError, StageError
from moefold.hooks import Registry
from moefold.layer import Layer
from moefold.plan import Keys, Task
from moefold.stage import Context, Layers, Port, Provenance
from moefold.store import Store


@dataclass(frozen=True)
class Done:
    """What is known of a task that has run."""

    key: str
    seconds: float
    peak_bytes: int
    """Peak resident memory of the process while the task ran."""
    peak_device_bytes: int
    facts: Mapping[str, Json]


def execute(
    task: Task,
    closure: Mapping[str, Task],
    store: Store,
    device: str,
    registry: Registry | None = None,
    remember: bool = False,
) -> Done:
    """Run one task and store its result (and `remember` it in memory); what is never kept is computed on the spot.

    Raises StageError that names the stage and the layer.
    """
    registry = registry or Registry.installed()
    _reset_peaks(device)
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            value = _Caller(closure, store, device, registry).call(task)
    except MoefoldError as error:
        if not str(error).startswith(f"{task.name}: "):
            error.args = (f"{task.name}: {error}",)
        raise
    except Exception as error:
        raise StageError(f"{task.name}: {type(error).__name__}: {error}") from error
    seconds = time.perf_counter() - start
    done = Done(task.key, seconds, _peak(), _peak_device(device), value.facts())
    note = {
        "step": task.step,
        "stage": task.stage,
        "layer": task.layer.number if task.layer else None,
        "seconds": seconds,
        "peak_bytes": done.peak_bytes,
        "peak_device_bytes": done.peak_device_bytes,
        "facts": done.facts,
        "torch": torch.__version__,
    }
    store.put(task.key, value, note, remember=remember)
    return done


class _Caller:
    """Calls a task's stage with its inputs; values computed on the spot are computed once."""

    def __init__(self, closure: Mapping[str, Task], store: Store, device: str, registry: Registry) -> None:
        self.closure = closure
        self.store = store
        self.device = device
        self.registry = registry
        self.made: dict[str, Artifact] = {}

    def call(self, task: Task) -> Artifact:
        stage = self.registry.stage(task.stage)
        values: dict[str, Any] = {n: self._input(p, task.inputs[n]) for n, p in stage.ports.items()}
        values |= {name: self._injected(kind, task) for name, kind in stage.injected.items()}
        options = stage.options.model_validate(task.options)
        given = {name: getattr(options, name) for name in stage.options.model_fields}
        value = stage(**values, **given)
        if not isinstance(value, Artifact) or not isinstance(value, stage.produces):
            raise StageError(
                f"{task.name}: the stage returned {type(value).__name__}; its signature promises "
                f"{stage.produces.__name__}"
            )
        return value

    def _input(self, port: Port, keys: Keys) -> Any:
        if keys is None:
            return None
        if isinstance(keys, str):
            return self._value(keys, port.type)
        if isinstance(keys, tuple):
            return tuple(self._value(key, port.type) for key in keys)
        return Layers({number: partial(self._value, key, port.type) for number, key in keys.items()})

    def _value(self, key: str, kind: type[Artifact]) -> Artifact:
        if key not in self.closure:
            return self.store.get(key, kind)
        if key not in self.made:
            self.made[key] = self.call(self.closure[key])
        return self.made[key]

    def _injected(self, kind: type, task: Task) -> Layer | Checkpoint | Context | Provenance | None:
        if kind is Layer:
            return task.layer
        if kind is Checkpoint:
            return task.checkpoint
        if kind is Provenance:
            return task.provenance
        generator = torch.Generator().manual_seed(int(task.key[:15], 16))
        return Context(torch.device(self.device), generator)


def _reset_peaks(device: str) -> None:
    with suppress(OSError):  # Linux only; elsewhere the peak is the process's own
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _peak_device(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
