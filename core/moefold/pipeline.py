"""The YAML of a pipeline: read, checked, wired; every problem with line and column, all at once.

model: demo
stages:
  - uses: puzzlemoe            # the stage
    id: merge                  # its name in this file (default: what it uses)
    with: {threshold: 0.4}     # options
    needs: {pairs: by_usage}   # inputs that several stages could provide
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from moefold.artifact import Json
from moefold.document import Document, Path
from moefold.errors import MoefoldError, suggest
from moefold.hooks import Registry
from moefold.models import check
from moefold.overrides import Overrides
from moefold.stage import Stage
from moefold.wiring import Draft, Wiring

MODEL = "model"
"""The id of the stage that is always there: the model's own experts."""


@dataclass(frozen=True)
class Step:
    """One stage as a pipeline uses it."""

    id: str
    stage: Stage[Any, Any]
    options: BaseModel
    needs: Mapping[str, tuple[str, ...]]
    """The ids of the steps behind each wired port (one, or several for a port that takes many)."""

    def option_values(self) -> dict[str, Json]:
        """The options as plain JSON."""
        return self.options.model_dump(mode="json")


@dataclass(frozen=True)
class Pipeline:
    """A checked and wired pipeline."""

    source: str
    model: str
    revision: str | None
    steps: Mapping[str, Step]

    def readers(self, step: str) -> list[str]:
        """The ids of the steps that read this one."""
        return [s.id for s in self.steps.values() if any(step in ids for ids in s.needs.values())]

    def ends(self) -> list[str]:
        """The steps that nothing reads: what a run works towards."""
        return [step for step in self.steps if step != MODEL and not self.readers(step)]

    def resolved(self) -> dict[str, Json]:
        """The pipeline with nothing left to defaults: as a document that loads to the same pipeline."""
        stages = [
            {"id": s.id, "uses": s.stage.name, "with": s.option_values(), "needs": _plain_needs(s)}
            for s in self.steps.values()
            if s.id != MODEL
        ]
        model: Json = self.model if self.revision is None else {"name": self.model, "revision": self.revision}
        return {"model": model, "stages": stages}


def _plain_needs(step: Step) -> dict[str, Json]:
    return {p: ids[0] if step.stage.ports[p].kind != "many" else list(ids) for p, ids in step.needs.items()}


def load(text: str, source: str, registry: Registry, overrides: Overrides | None = None) -> Pipeline:
    """Read, check and wire a pipeline; raises PipelineError with every problem of the file."""
    document = Document.parse(text, source)
    if overrides:
        overrides.apply(document, registry)
    return _Reader(document, registry).pipeline()


class _Reader:
    """Reads one document into a pipeline, noting every problem on the way."""

    def __init__(self, document: Document, registry: Registry) -> None:
        self.document = document
        self.registry = registry
        self.drafts: dict[str, Draft] = {}
        self.unread: set[str] = set()
        self.lost = False
        """True when a stage could not be read, so that a missing provider may only be its consequence."""

    def pipeline(self) -> Pipeline:
        self._keys((), self.document.value, ("model", "stages"))
        name, revision = self._model()
        model_stage = self.registry.stage(MODEL)
        self.drafts[MODEL] = Draft(-1, MODEL, model_stage, model_stage.options(), {})
        self._stages()
        Wiring(self.document, self.registry, self.drafts, self.unread, self.lost).wire()
        self.document.raise_problems()
        steps = {d.id: Step(d.id, d.stage, d.options, d.wired) for d in self.drafts.values() if d.options is not None}
        return Pipeline(self.document.source, name, revision, steps)

    def _keys(self, path: Path, mapping: Mapping[str, Json], known: tuple[str, ...]) -> None:
        for key in mapping:
            if key not in known:
                self.document.problem((*path, key), f"unknown key{suggest(key, known)}")

    def _model(self) -> tuple[str, str | None]:
        model = self.document.value.get("model")
        if isinstance(model, dict):
            self._keys(("model",), model, ("name", "revision"))
            name, revision = model.get("name"), model.get("revision")
        else:
            name, revision = model, None
        if not isinstance(name, str) or not name:
            self.document.problem(
                ("model",), "no model; write `model: demo`, a hub id such as Qwen/Qwen3-30B-A3B, or a directory"
            )
            return "", None
        try:
            check(name, self.registry)
        except MoefoldError as error:
            self.document.problem(("model",), str(error))
        return name, None if revision is None else str(revision)

    def _stages(self) -> None:
        stages = self.document.value.get("stages")
        if not isinstance(stages, list) or not stages:
            self.document.problem(("stages",), "no stages; write a list of them, each with `- uses: NAME`")
            self.lost = True
            return
        for index, entry in enumerate(stages):
            self._stage(index, entry)

    def _stage(self, index: int, entry: Json) -> None:
        path: Path = ("stages", index)
        if entry is None and path in self.document.origins:
            return None  # an option of the command line put another stage in its place
        if not isinstance(entry, dict):
            self.document.problem(path, "a stage is a mapping; write `- uses: NAME`")
            self.lost = True
            return None
        self._keys(path, entry, ("uses", "id", "with", "needs"))
        uses = entry.get("uses")
        identity = str(entry.get("id") or uses)
        if isinstance(entry.get("id"), dict | list):
            self.document.problem((*path, "id"), "an id is one word, such as `id: calibration`")
        if not isinstance(uses, str) or uses not in self.registry.stages or uses == MODEL:
            self.lost = True
            self.unread.add(identity)
            return self._unknown_stage(path, uses)
        if identity in self.drafts:
            first = "the model itself" if identity == MODEL else f"stages[{self.drafts[identity].index}]"
            self.document.problem(
                (*path, "id" if "id" in entry else "uses"),
                f"the id {identity} is taken by {first}; give this one another: `id: {identity}_2`",
            )
            return None
        stage = self.registry.stage(uses)
        options = self._options(path, stage, entry.get("with"))
        needs = entry.get("needs") or {}
        if not isinstance(needs, dict):
            self.document.problem((*path, "needs"), "write a mapping from inputs to stage ids: `needs: {pairs: ID}`")
            needs = {}
        self.drafts[identity] = Draft(index, identity, stage, options, needs)
        return None

    def _unknown_stage(self, path: Path, uses: Json) -> None:
        if uses is None:
            self.document.problem(path, "no stage is named; write `uses: NAME` (`moefold list` shows all)")
        elif uses == MODEL:
            self.document.problem((*path, "uses"), "the model is always there; name it at the top: `model: NAME`")
        else:
            self.document.problem((*path, "uses"), f"unknown stage {uses}{suggest(str(uses), self.registry.stages)}")

    def _options(self, path: Path, stage: Stage[Any, Any], given: Json) -> BaseModel | None:
        here = (*path, "with")
        given = {} if given is None else given
        if not isinstance(given, dict):
            self.document.problem(here, "write options as a mapping: `with: {NAME: VALUE}`")
            return None
        try:
            return stage.options.model_validate(given)
        except ValidationError as error:
            for item in error.errors():
                self.document.problem((*here, *item["loc"]), _say(item, stage))
            return None


def _say(item: Any, stage: Stage[Any, Any]) -> str:
    """A pydantic error in our words: what is wrong, and what to write instead."""
    last = item["loc"][-1] if item["loc"] else ""
    if item["type"] == "extra_forbidden":
        fields = list(stage.options.model_fields)
        return f"unknown option{suggest(str(last), fields)}" if fields else f"{stage.name} has no options"
    if item["type"] == "missing":
        return f"{stage.name} needs this option; write `with: {{{last}: VALUE}}`"
    given = item.get("input")
    return f"{item['msg'][0].lower()}{item['msg'][1:]}, not {given!r}"
