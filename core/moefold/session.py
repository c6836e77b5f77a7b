"""What the commands share: from names on a command line to a plan, a run, a report."""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moefold import executors, pipeline, report, shipped
from moefold.artifact import Json
from moefold.artifacts import Baseline
from moefold.errors import InputError, StageError, suggest
from moefold.hooks import Registry
from moefold.html import write_report
from moefold.ledger import Ledger
from moefold.model_card import write_losses, write_records
from moefold.models import locate
from moefold.overrides import Overrides
from moefold.pipeline import Pipeline
from moefold.plan import Plan, plan
from moefold.progress import Bars
from moefold.run import Event, Reporter, run
from moefold.store import Store


def choose_device(name: str) -> str:
    """`cuda` or `cpu`; auto takes the GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"no device {name}; write auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available to torch; use --device cpu, or see `moefold doctor`")
    return "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"


@dataclass(frozen=True)
class Session:
    """One pipeline, planned over one checkpoint, with the store that it uses."""

    plan: Plan
    store: Store
    device: str
    registry: Registry

    @staticmethod
    def read(
        name: str,
        model: str | None = None,
        text: Sequence[str] | None = None,
        to: str | None = None,
        settings: Sequence[str] | None = None,
    ) -> Pipeline:
        """Read and check a pipeline with what the command line puts in place of its own values."""
        path = shipped.find(name)
        overrides = Overrides(model, tuple(text or ()), to, tuple(settings or ()))
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        return pipeline.load(content, str(path), Registry.installed(), overrides)

    @classmethod
    def open(
        cls,
        name: str,
        model: str | None,
        text: Sequence[str] | None,
        to: str | None,
        settings: Sequence[str] | None,
        work: Path,
        device: str,
        strict: bool = False,
    ) -> Session:
        """Read, check and plan a pipeline; reads headers only."""
        return cls._plan(cls.read(name, model, text, to, settings), work, device, strict)

    @classmethod
    def _plan(cls, read: Pipeline, work: Path, device: str, strict: bool) -> Session:
        registry = Registry.installed()
        chosen = choose_device(device)
        checkpoint = locate(read.model, registry, read.revision)
        return cls(plan(read, checkpoint, device=chosen, strict=strict), Store(work), chosen, registry)

    def run(self, executor: str, workers: int, console: Console, keep: Sequence[str] | None = None) -> dict[str, Json]:
        """Do what is missing, and write the report beside the results; what `keep` names makes stays for other runs."""
        for name in keep or ():
            if name not in self.plan.pipeline.steps:
                known = suggest(name, self.plan.pipeline.steps)
                raise InputError(f"--keep {name}: no stage of {self.plan.pipeline.source} has this id{known}")
        times = report.Times()
        logging.getLogger("transformers").setLevel(logging.ERROR)  # its notes are about its own callers
        with executors.make(executor, workers, self.device, self.registry) as pool, Bars(console) as bars:

            def hear(event: Event) -> None:
                times(event)
                bars(event)

            ledger = Ledger(self.store.root)
            with ledger.run(self.plan, Counter(task.step for task in self.plan.missing(self.store).values())):
                found = self._run(pool, hear, workers, keep or ())
        made = report.build(self.plan, found, times, self.device, self.store, ledger.events(self.plan))
        write_report(made, self.store.root)
        write_losses(made, self.plan.pipeline)
        write_records(made)
        return made

    def _run(self, pool: Executor, hear: Reporter, workers: int, keep: Sequence[str]) -> dict[str, Json]:
        settings: dict[str, Any] = {"device": self.device, "registry": self.registry, "workers": workers, "keep": keep}
        try:
            return run(self.plan, self.store, pool, hear, **settings)
        except StageError as error:  # the stage's author wants more than the message
            place = self.store.root / "traceback.txt"
            place.write_text("".join(traceback.format_exception(error)))
            error.args = (f"{error}\n(traceback: {place}; what is finished is kept, and the same command goes on)",)
            raise

    def outlook(self) -> list[dict[str, Json]]:
        """For each step, how many tasks it has, how many are stored and how many would run."""
        missing = Counter(task.step for task in self.plan.missing(self.store).values())
        every = Counter(task.step for task in self.plan.tasks.values())
        rows: list[dict[str, Json]] = []
        for step in self.plan.pipeline.steps.values():
            needs = ", ".join(i for ids in step.needs.values() for i in ids)
            row: dict[str, Json] = {"step": step.id, "uses": step.stage.name, "reads": needs, "tasks": every[step.id]}
            if step.stage.keep == "never":
                row |= {"stored": "never", "to_run": "-"}
            elif step.stage.keep == "until read":
                row |= {"stored": "until read", "to_run": missing[step.id]}
            else:
                row |= {"stored": every[step.id] - missing[step.id], "to_run": missing[step.id]}
            rows.append(row)
        return rows

    @classmethod
    def evaluate(
        cls,
        checkpoint: str,
        text: Sequence[str] | None,
        samples: int,
        length: int,
        work: Path,
        device: str,
        console: Console,
    ) -> list[dict[str, Json]]:
        """Loss, perplexity and bits per byte of a checkpoint on files, or on the shipped texts."""
        cut = {"samples": samples, "length": length}
        stages: list[Json] = [
            {"id": "unseen", "uses": "text.stdlib", "with": {"part": "evaluate", **cut}},
            {"id": "prose", "uses": "text.prose", "with": cut},
        ]
        if text:
            stages = [
                {"id": f"text{i}", "uses": "text.files", "with": {"files": [t], **cut}} for i, t in enumerate(text)
            ]
        needs = {"texts": [stage["id"] for stage in stages]}
        document = {"model": checkpoint, "stages": [*stages, {"uses": "evaluate.baseline", "needs": needs}]}
        read = pipeline.load(json.dumps(document), "evaluate", Registry.installed())  # JSON is YAML
        session = cls._plan(read, work, device, strict=False)
        session.run("inline", 1, console)
        baseline = session.store.get(session.plan.ends[0], Baseline)
        return [_row(name, baseline) for name in baseline.losses]


def _row(name: str, baseline: Baseline) -> dict[str, Json]:
    loss = baseline.losses[name]
    return {
        "text": name,
        "tokens": baseline.texts[name].numel(),
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,  # beyond what a float holds
        "bits_per_byte": baseline.bits_per_byte(name, loss),
    }
