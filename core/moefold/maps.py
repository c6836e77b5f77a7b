"""Every two experts of a layer as a picture: how alike they are, or what it would cost to put them together."""

from __future__ import annotations

from torch import Tensor

from moefold import shades
from moefold.artifact import Artifact, Json
from moefold.artifacts import Groups, Similarity
from moefold.merge_plan import MergePlan, PairDamage
from moefold.plan import Plan
from moefold.store import Store

_KINDS = (Similarity, Groups, PairDamage)


def maps(plan: Plan, store: Store) -> dict[str, Json]:
    """What pairs or groups were chosen by, of every step that stored it, by step and layer: shades for a picture."""
    formats = _formats(plan, store)
    found: dict[str, Json] = {}
    for key, task in plan.tasks.items():
        kind = plan.kind(task)
        if task.layer and issubclass(kind, _KINDS) and store.has(key, kind):
            number = str(task.layer.number)
            told = _map(store.get(key, kind), formats.get(number))
            if told:
                found.setdefault(task.step, {})[number] = told
    return found


def _map(value: Artifact, format: str | None) -> dict[str, Json] | None:
    """None where two experts were put together for another reason than what they are like."""
    if isinstance(value, Similarity):
        return {"metric": value.metric, "better": "more", **shades.encode(value.matrix)}
    if isinstance(value, PairDamage):
        name = format or next(iter(value.damage))
        return {"metric": f"predicted error of merging two, {name}", **_costs(value.damage[name])}
    if isinstance(value, Groups) and value.costs is not None:
        return {"metric": "predicted error of merging two", **_costs(value.costs)}
    return None


def _costs(matrix: Tensor) -> dict[str, Json]:
    """Errors span orders of magnitude, so their logarithm is drawn."""
    positive = matrix[matrix > 0]
    least = float(positive.min()) if len(positive) else 1.0
    return {"scale": "log10", "better": "less", **shades.encode(matrix.double().clamp(min=least).log10())}


def _formats(plan: Plan, store: Store) -> dict[str, str]:
    """The format that a plan chose for each layer."""
    found: dict[str, str] = {}
    for key, task in plan.tasks.items():
        if issubclass(plan.kind(task), MergePlan) and store.has(key, MergePlan):
            layers = store.get(key, MergePlan).layers
            found |= {number: one["format"] for number, one in layers.items() if one["format"]}
    return found
