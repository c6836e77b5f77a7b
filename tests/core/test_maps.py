"""The picture of every two experts of a layer: similarities, costs of pairs, a plan's damage."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import torch

from moefold import Groups, MergePlan, PairDamage, Similarity
from moefold.artifact import Artifact
from moefold.maps import maps

COSTS = torch.tensor([[0.0, 1.0, 100.0], [1.0, 0.0, 0.0], [100.0, 0.0, 0.0]])


class Made:
    """A plan and its store as `maps` sees them: one task a value."""

    def __init__(self, **values: Artifact) -> None:
        layer = type("Layer", (), {"number": 3})()
        self.values = values
        self.tasks = {n: type("Task", (), {"step": n, "layer": None if n == "plan" else layer})() for n in values}

    def kind(self, task: Any) -> type:
        return type(self.values[task.step])

    def has(self, key: str, kind: type) -> bool:
        return isinstance(self.values[key], kind)

    def get(self, key: str, kind: type) -> Artifact:
        return self.values[key]


def told(**values: Artifact) -> dict[str, Any]:
    made: Any = Made(**values)
    return {step: layers["3"] for step, layers in maps(made, made).items()}


def damage() -> PairDamage:
    formats = {"exponent": COSTS, "pair6": COSTS * 10}
    sizes = {"exponent": 20, "pair6": 6}
    return PairDamage(formats, torch.ones(3, dtype=torch.int64), torch.ones(3), 1.0, 10, 20, sizes)


def test_similarities_are_shades_of_their_values() -> None:
    found = told(alike=Similarity(COSTS, "cosine"))["alike"]
    assert (found["metric"], found["better"], found["low"], found["high"]) == ("cosine", "more", 0.0, 100.0)


def test_costs_are_shades_of_their_logarithms_and_none_is_minus_infinity() -> None:
    found = told(pairs=Groups([[0, 1]], [2], costs=COSTS))["pairs"]
    assert (found["better"], found["scale"], found["low"], found["high"]) == ("less", "log10", 0.0, 2.0)
    assert list(base64.b64decode(found["levels"])) == [255, 0, 255, 0, 255, 0, 255, 0, 255]


def test_damage_is_that_of_the_format_that_the_plan_chose() -> None:
    layers = {"3": {"format": "pair6", "pairs": [[0, 1]], "alone": [2], "damage": [10.0]}}
    found = told(damage=damage(), plan=MergePlan(layers, {"3": [3, 10]}))["damage"]
    assert (found["metric"], found["high"]) == ("predicted error of merging two, pair6", 3.0)
    assert told(damage=damage())["damage"]["metric"].endswith(", exponent")


def test_choices_made_by_nothing_have_no_picture() -> None:
    assert told(random=Groups([[0, 1]], [2])) == {}


def test_costs_come_back_from_the_store(tmp_path: Path) -> None:
    for costs in (None, COSTS):
        Groups([[0, 1]], [2], costs=costs).save(tmp_path / "value.safetensors")
        again = Groups.load(tmp_path / "value.safetensors")
        assert again == Groups([[0, 1]], [2])
        assert again.costs is None if costs is None else torch.equal(again.costs, COSTS)
