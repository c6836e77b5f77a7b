"""Pipeline x layers -> tasks with keys.

A step runs per layer if anything it takes is per layer: the `Layer` itself, the layer before, or another per-layer
step. A task's key is a digest of all that its result depends on, so that caching and resuming are one sentence: do
what the store lacks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moefold.artifact import Artifact, Json
from moefold.checkpoint import Checkpoint
from moefold.errors import InputError
from moefold.layer import Layer
from moefold.pipeline import Pipeline, Step
from moefold.stage import Keep, Port, Provenance
from moefold.store import Store

Keys = str | tuple[str, ...] | Mapping[int, str] | None
"""The keys behind one port: of one value, of several, of all layers by number, or nothing."""


@dataclass(frozen=True)
class Task:
    """One call of a stage, as plain data: it carries keys, not tensors."""

    key: str
    step: str
    stage: str
    layer: Layer | None
    inputs: Mapping[str, Keys]
    options: Mapping[str, Json]
    keep: Keep
    checkpoint: Checkpoint
    provenance: Provenance | None = None

    def input_keys(self) -> Iterator[str]:
        """The keys of everything the task reads."""
        for keys in self.inputs.values():
            if isinstance(keys, str):
                yield keys
            elif isinstance(keys, tuple):
                yield from keys
            elif keys is not None:
                yield from keys.values()

    @property
    def name(self) -> str:
        """What people call the task: the step, and the layer."""
        return self.step if self.layer is None else f"{self.step}, layer {self.layer.number}"


@dataclass(frozen=True)
class Plan:
    """Every task of a run by key, in an order in which they can be done, and those that the run works towards."""

    pipeline: Pipeline
    tasks: Mapping[str, Task]
    ends: tuple[str, ...]
    order: Mapping[str, int] = field(default_factory=dict)

    def missing(self, store: Store) -> dict[str, Task]:
        """Work back from the ends: the tasks to run because the store lacks their results.

        What points outside the store counts as an end: a checkpoint that was deleted is written again, also when
        everything that reads it is stored.
        """
        found: dict[str, Task] = {}
        outside = [key for key, task in self.tasks.items() if self.kind(task).intact is not Artifact.intact]
        waiting = [*self.ends, *outside]
        seen: set[str] = set()
        while waiting:
            key = waiting.pop()
            if key in seen:
                continue
            seen.add(key)
            task = self.tasks[key]
            if task.keep != "never":
                if store.has(key, self.kind(task)):
                    continue
                found[key] = task
            waiting.extend(task.input_keys())
        return {key: found[key] for key in self.tasks if key in found}

    def kind(self, task: Task) -> Any:
        """The artifact class that a task makes."""
        return self.pipeline.steps[task.step].stage.produces

    def closure(self, task: Task) -> dict[str, Task]:
        """The tasks that are computed on the spot when this one runs (`keep="never"`)."""
        found: dict[str, Task] = {}
        waiting = list(task.input_keys())
        while waiting:
            key = waiting.pop()
            if key not in found and self.tasks[key].keep == "never":
                found[key] = self.tasks[key]
                waiting.extend(self.tasks[key].input_keys())
        return found

    def reads(self, task: Task) -> set[str]:
        """The stored values that running a task reads, also through what is computed on the spot."""
        inner = self.closure(task)
        keys = {k for t in (task, *inner.values()) for k in t.input_keys()}
        return keys - inner.keys()


def plan(pipeline: Pipeline, checkpoint: Checkpoint, *, device: str, strict: bool = False) -> Plan:
    """Lay a pipeline out over a checkpoint's layers; reads headers only."""
    return _Planner(pipeline, checkpoint, device, strict).plan()


class _Planner:
    def __init__(self, pipeline: Pipeline, checkpoint: Checkpoint, device: str, strict: bool) -> None:
        self.pipeline = pipeline
        self.checkpoint = checkpoint
        self.fingerprint = checkpoint.fingerprint(strict)
        self.device = device
        self.layers = checkpoint.layers()
        self.per_layer = self._per_layer()
        self.tasks: dict[tuple[str, int | None], Task] = {}
        self.opened: set[tuple[str, int | None]] = set()

    def plan(self) -> Plan:
        ends = [task.key for step in self.pipeline.ends() for task in self._all(step)]
        tasks = {task.key: task for task in self.tasks.values()}
        return Plan(self.pipeline, tasks, tuple(ends), {key: i for i, key in enumerate(tasks)})

    def _per_layer(self) -> set[str]:
        """The steps that run once a layer, found by going over the edges until nothing changes."""
        steps = self.pipeline.steps
        found: set[str] = set()
        while True:
            more = {s.id for s in steps.values() if self._is_per_layer(s, found)} - found
            if not more:
                return found
            found |= more

    def _is_per_layer(self, step: Step, known: set[str]) -> bool:
        if Layer in step.stage.injected.values():
            return True
        kinds = {name: step.stage.ports[name].kind for name in step.needs}
        return any(
            kind == "previous" or ("layers" not in kind and known.intersection(step.needs[name]))
            for name, kind in kinds.items()
        )

    def _all(self, step: str) -> list[Task]:
        if step in self.per_layer:
            return [self._task(step, layer) for layer in self.layers]
        return [self._task(step, None)]

    def _task(self, step_id: str, layer: Layer | None) -> Task:
        """The task of a step at a layer (None for a step that runs once), with all that it needs before it."""
        place = (step_id, layer.position if layer and step_id in self.per_layer else None)
        if place in self.tasks:
            return self.tasks[place]
        if place in self.opened:
            raise InputError(
                f"{self.pipeline.source}: stage {step_id} at one layer depends on itself through a stage that reads "
                "all layers; let the input that closes this circle read another stage"
            )
        self.opened.add(place)
        step = self.pipeline.steps[step_id]
        here = layer if step_id in self.per_layer else None
        inputs = {name: self._inputs(step, port, here) for name, port in step.stage.ports.items()}
        provenance = self._provenance(step_id) if Provenance in step.stage.injected.values() else None
        reads = step.stage.reads(**step.options.model_dump()) if step.stage.reads else None
        options = step.option_values()
        key = self._key(step, options, inputs, here, provenance, reads)
        task = Task(key, step_id, step.stage.name, here, inputs, options, step.stage.keep, self.checkpoint, provenance)
        self.tasks[place] = task
        return task

    def _inputs(self, step: Step, port: Port, layer: Layer | None) -> Keys:
        ids = step.needs.get(port.name, ())
        if not ids:
            return None
        if port.kind == "many":
            return tuple(self._task(i, layer).key for i in ids)
        if "layers" in port.kind:
            return {t.layer.number: t.key for t in self._all(ids[0]) if t.layer is not None}
        if port.kind == "previous":
            return self._task(ids[0], self.layers[layer.position - 1]).key if layer and layer.position else None
        return self._task(ids[0], layer).key

    def _provenance(self, step_id: str) -> Provenance:
        """Every step upstream, the first ones first."""
        upstream: dict[str, Step] = {}
        waiting = [step_id]
        while waiting:
            step = self.pipeline.steps[waiting.pop()]
            if step.id not in upstream:
                upstream[step.id] = step
                waiting.extend(i for ids in step.needs.values() for i in ids)
        steps = [s for s in self.pipeline.steps.values() if s.id in upstream]
        return Provenance(
            self.pipeline.model,
            self.fingerprint,
            tuple(
                {
                    "id": s.id,
                    "uses": s.stage.name,
                    "version": s.stage.version,
                    "with": s.option_values(),
                    "needs": {name: list(ids) for name, ids in s.needs.items()},
                }
                for s in steps
            ),
        )

    def _key(
        self,
        step: Step,
        options: Mapping[str, Json],
        inputs: Mapping[str, Keys],
        layer: Layer | None,
        provenance: Provenance | None,
        reads: Json,
    ) -> str:
        takes_model = {Layer, Checkpoint} & set(step.stage.injected.values())
        parts: dict[str, Json] = {
            "stage": step.stage.name,
            "version": step.stage.version,
            "options": dict(options),
            "inputs": {name: dict(k) if isinstance(k, Mapping) else k for name, k in inputs.items()},
            "layer": layer.number if layer else None,
            "checkpoint": self.fingerprint if takes_model else None,
            "model": provenance.model if provenance else None,
            "device": self.device,
            "reads": reads,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
