"""What a report says of a compressed model's method: which steps it consists of, on what it calibrated, of what model.

Told from what the steps make and read, so that a stage of a plugin is counted like a built-in one.
"""

from __future__ import annotations

from collections.abc import Iterator

from moefold import fused
from moefold.artifact import Json
from moefold.artifacts import Activity, Baseline, Experts, Groups, Metrics, Paired, Routed, Similarity, Text
from moefold.checkpoint import Checkpoint
from moefold.merge_plan import MergePlan, PairDamage
from moefold.pipeline import MODEL, Pipeline, Step
from moefold.plan import Plan
from moefold.replacements import Replacement, Unpacked
from moefold.saved import Saved

_CALIBRATION = (Text, Routed, Activity)
_METHOD = (Similarity, PairDamage, MergePlan, Groups, Paired, Experts, Replacement)


def model(plan: Plan) -> dict[str, Json]:
    """Name and fingerprint of the source, and how many weights its routed experts have (None: nothing was saved)."""
    task = next((task for task in plan.tasks.values() if task.provenance), None)
    if task is None or task.provenance is None:
        return {"name": plan.pipeline.model, "fingerprint": None, "expert_weights": None}
    name, fingerprint = task.provenance.model, task.provenance.fingerprint
    return {"name": name, "fingerprint": fingerprint, "expert_weights": _expert_weights(task.checkpoint)}


def _expert_weights(checkpoint: Checkpoint) -> int:
    """Entries of the weight matrices of all routed experts, however few bits the files take for each."""
    modules = [checkpoint.skeleton.module(path) for path in checkpoint.skeleton.experts.values()]
    return sum(getattr(module, name).numel() for module in modules for name in fused.parameters(module)[:2])


def methods(pipeline: Pipeline) -> dict[str, Json]:
    """By the id of each step that saves a checkpoint: its method's steps, its calibration, and what evaluates it.

    `steps`: the method's own in order, with the options that are not the defaults; `through`: the compressed experts
    through which later layers were calibrated; `own`, `calibration`, `texts` (calibrated on), `metrics`, `baselines`:
    ids of steps. `own` holds the saving too.
    """
    return {s.id: _method(pipeline, s) for s in pipeline.steps.values() if issubclass(s.stage.produces, Saved)}


def _method(pipeline: Pipeline, saving: Step) -> dict[str, Json]:
    upstream = list(_upstream(pipeline, saving, set()))
    calibration = [step for step in upstream if _calibrates(step, pipeline)]
    own = [step for step in upstream if step not in calibration]
    through = [i for step in calibration for i in _through(step) if i != MODEL]
    metrics = [s for s in pipeline.steps.values() if issubclass(s.stage.produces, Metrics) and saving.id in _needs(s)]
    evaluated = [i for step in metrics for i in _needs(step)]
    return {
        "steps": [
            {"id": s.id, "uses": s.stage.name, "with": s.options.model_dump(mode="json", exclude_defaults=True)}
            for s in own[:-1]
            if not (issubclass(s.stage.produces, Unpacked) and s.id in through)
        ],
        "through": through,
        "own": [step.id for step in own],
        "calibration": [step.id for step in calibration],
        "texts": [s.id for s in calibration if issubclass(s.stage.produces, Text) and _read(s, calibration)],
        "metrics": [step.id for step in metrics],
        "baselines": [i for i in evaluated if issubclass(pipeline.steps[i].stage.produces, Baseline)],
    }


def _upstream(pipeline: Pipeline, step: Step, seen: set[str]) -> Iterator[Step]:
    """All that a step reads, itself or through others, each after what it reads, the step itself last."""
    seen.add(step.id)
    for identity in _needs(step):
        if identity != MODEL and identity not in seen:
            yield from _upstream(pipeline, pipeline.steps[identity], seen)
    yield step


def _needs(step: Step) -> list[str]:
    return [identity for ids in step.needs.values() for identity in ids]


def _calibrates(step: Step, pipeline: Pipeline) -> bool:
    """Whether a step looks at calibration text rather than at a method's choices; told from what it makes.

    Of a kind that core does not know: whether it reads the tokens, and nothing that a method made of them.
    """
    made = step.stage.produces
    if issubclass(made, (*_CALIBRATION, *_METHOD, Saved)):
        return issubclass(made, _CALIBRATION)
    read = [pipeline.steps[i].stage.produces for i in _needs(step) if i != MODEL]
    return any(issubclass(kind, Routed) for kind in read) and not any(issubclass(kind, _METHOD) for kind in read)


def _through(step: Step) -> list[str]:
    """The steps whose compressed experts the layer before was left with when this layer's figures were taken."""
    ports = step.stage.ports
    return [
        identity
        for name, ids in step.needs.items()
        if ports[name].kind == "previous" and issubclass(ports[name].type, Experts)
        for identity in ids
    ]


def _read(text: Step, calibration: list[Step]) -> bool:
    """Whether a text is calibrated on as it is, rather than mixed into another."""
    return any(text.id in _needs(step) for step in calibration if not issubclass(step.stage.produces, Text))
