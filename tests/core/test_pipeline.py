"""The YAML: wiring, and every problem with its place and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import Looked, Number, Seen, State, world

from moefold.document import Document
from moefold.errors import InputError, PipelineError
from moefold.overrides import Overrides
from moefold.pipeline import load
from moefold.stage import Previous, stage


@stage("other")
def other() -> Seen:
    """A second stage that makes Seen."""
    raise AssertionError


@stage("merge")
def merge(number: Number) -> Number:
    """A second stage that makes Number, from Number."""
    raise AssertionError


@stage("average")
def average(looks: tuple[Looked, ...]) -> Looked:
    """Takes several, and is not one of them by itself."""
    raise AssertionError


@stage("circle.a")
def circle_a(number: Number, state: State) -> Looked:
    """One side of a circle."""
    raise AssertionError


@stage("circle.b")
def circle_b(looked: Looked, before: Previous[State]) -> State:
    """The other side."""
    raise AssertionError


@pytest.fixture
def registry(tmp_path: Path):
    return world(tmp_path / "log", extra=(other, merge, average, circle_a, circle_b))


def problems(text: str, registry, **overrides) -> list[str]:
    with pytest.raises(PipelineError) as caught:
        load(text, "p.yaml", registry, Overrides(**overrides))
    return str(caught.value).splitlines()


def stages(*lines: str) -> str:
    return "model: a/b\nstages:\n" + "".join(f"  - {line}\n" for line in lines)


def test_wired_without_being_named(registry):
    pipeline = load(stages("uses: see", "uses: walk", "uses: sum", "uses: start"), "p", registry)
    assert dict(pipeline.steps["see"].needs) == {"state": ("walk",), "number": ("model",)}
    assert dict(pipeline.steps["walk"].needs) == {"start": ("start",), "before": ("walk",), "number": ("model",)}
    assert dict(pipeline.steps["sum"].needs) == {"all_": ("see",)}
    assert pipeline.ends() == ["sum"]


def test_resolved_loads_to_the_same_pipeline(registry):
    import json

    one = load(
        stages("uses: start", "uses: walk", "{uses: see, id: look, with: {factor: 2}}", "uses: sum"), "p", registry
    )
    two = load(json.dumps(one.resolved()), "p", registry)
    assert one.resolved() == two.resolved()
    assert two.steps["look"].option_values() == {"factor": 2.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (stages("uses: strat"), ["p.yaml:3:5: stages[0].uses: unknown stage strat; did you mean start?"]),
        (stages("id: x"), ["p.yaml:3:5: stages[0]: no stage is named; write `uses: NAME` (`moefold list` shows all)"]),
        (
            stages("uses: start\n    with: {valeu: 2}"),
            ["p.yaml:4:12: stages[0].with.valeu: unknown option; did you mean value?"],
        ),
        (
            stages("uses: start\n    with:\n      value: much"),
            [
                "p.yaml:5:7: stages[0].with.value: input should be a valid number, unable to parse string as a number, "
                "not 'much'"
            ],
        ),
        (
            stages("uses: start", "uses: walk", "uses: see\n    with: {factor: 11}"),
            ["p.yaml:6:12: stages[2].with.factor: input should be less than or equal to 10, not 11"],
        ),
        (
            stages("uses: walk"),
            ["p.yaml:3:5: stages[0].needs.start: walk needs Seen, and no stage makes that; add one of start, other"],
        ),
        (
            stages("uses: start", "uses: other", "uses: walk"),
            ["p.yaml:5:5: stages[2].needs.start: Seen is made by start and other; say which: needs: {start: start}"],
        ),
        (
            stages("uses: start", "uses: walk\n    needs: {start: strat}"),
            ["p.yaml:5:13: stages[1].needs.start: no stage has the id strat; did you mean start?"],
        ),
        (
            stages("uses: start", "uses: walk\n    needs: {strat: start}"),
            ["p.yaml:5:13: stages[1].needs.strat: walk has no input strat; did you mean start?"],
        ),
        (
            stages("uses: start", "uses: walk\n    needs: {start: walk}"),
            ["p.yaml:5:13: stages[1].needs.start: walk makes State, but Seen is needed; write start"],
        ),
        (
            stages("uses: start", "uses: start"),
            ["p.yaml:4:5: stages[1].uses: the id start is taken by stages[0]; give this one another: `id: start_2`"],
        ),
        (
            stages("uses: start", "{uses: start, id: model}"),
            [
                "p.yaml:4:19: stages[1].id: the id model is taken by the model itself; give this one another: "
                "`id: model_2`"
            ],
        ),
        (
            "model: a/b\nmodel: c/d\nstages:\n  - uses: start\n",
            ["p.yaml:2:1: model: this key stands twice; keep one of the two"],
        ),
        (
            "model: a/b\nstages:\n  - uses: start\nstage: 1\n",
            ["p.yaml:4:1: stage: unknown key; did you mean stages?"],
        ),
        (
            "stages:\n  - uses: start\n",
            ["p.yaml:1:1: model: no model; write `model: demo`, a hub id such as Qwen/Qwen3-30B-A3B, or a directory"],
        ),
        ("model: a/b\n", ["p.yaml:1:1: stages: no stages; write a list of them, each with `- uses: NAME`"]),
        (
            "- uses: start\n",
            ["p.yaml:1:1: a pipeline is a mapping with the keys model and stages; start with `model: demo`"],
        ),
    ],
)
def test_one_problem(registry, text, expected):
    assert problems(text, registry) == expected


def test_not_yaml(registry):
    (line,) = problems("model: a/b\nstages:\n  - uses: [start\n  - uses: walk\n", registry)
    assert line.startswith("p.yaml:4:9: not YAML: ")


def test_circle(registry):
    text = stages("uses: circle.a", "uses: circle.b")
    (line,) = problems(text, registry)
    assert "circle.a -> circle.b -> circle.a" in line or "circle.b -> circle.a -> circle.b" in line
    assert line.startswith(("p.yaml:3:5: stages[0].needs", "p.yaml:4:5: stages[1].needs"))


def test_all_problems_at_once(registry):
    text = "modle: a/b\n" + stages(
        "uses: strat", "uses: see\n    with: {factor: -1, fator: 2}\n    needs: {state: nobody}"
    )
    text = text.replace("model: a/b\n", "")
    lines = problems(text, registry)
    assert [line.split(": ")[1] for line in lines] == [
        "modle",
        "model",
        "stages[0].uses",
        "stages[1].with.factor",
        "stages[1].with.fator",
        "stages[1].needs.state",
    ]


def test_merged_experts_must_be_named(registry):
    (line,) = problems(stages("uses: start", "uses: walk", "uses: merge"), registry)
    assert "stages[1].needs.number: Number is made by model and merge; say which: needs: {number: model}" in line
    wired = load(stages("uses: start", "uses: walk\n    needs: {number: merge}", "uses: merge"), "p", registry)
    assert wired.steps["walk"].needs["number"] == ("merge",)
    assert wired.steps["merge"].needs["number"] == ("model",)


def test_an_input_of_several(registry):
    text = stages(
        "uses: start",
        "uses: walk",
        "uses: see",
        "{uses: see, id: second}",
        "uses: average\n    needs: {looks: [see, second]}",
    )
    assert load(text, "p", registry).steps["average"].needs["looks"] == ("see", "second")
    (line,) = problems(text.replace("\n    needs: {looks: [see, second]}", ""), registry)
    assert "say which: needs: {looks: [see, second]}" in line


def test_model_that_is_nowhere(registry):
    (line,) = problems("model: ./no/such\nstages:\n  - uses: start\n", registry)
    assert line.startswith("p.yaml:1:1: model: ./no/such is no directory")


def test_overrides_replace_and_are_named_in_problems(registry):
    text = stages("uses: start", "uses: walk", "uses: see", "uses: sum")
    read = load(text, "p", registry, Overrides(model="c/d", settings=("see.factor=3", "start.value=2.5")))
    assert read.model == "c/d"
    assert read.steps["see"].option_values() == {"factor": 3.0}
    (line,) = problems(text, registry, settings=("see.factor=30",))
    assert "--set see.factor=30: stages[2].with.factor: input should be less than or equal to 10" in line
    for wrong, message in [
        ("factor=3", "write STAGE.OPTION=VALUE"),
        ("se.factor=3", "has no stage se; did you mean see"),
        ("see.factor=[", "is not YAML"),
    ]:
        with pytest.raises(InputError, match=message):
            load(text, "p", registry, Overrides(settings=(wrong,)))


@pytest.mark.parametrize("text", ["stages: &s\n  - with: *s\n", "&a\nstages: [*a]\n", "stages: " + "[" * 2000])
def test_anchors_in_a_circle_and_bottomless_nesting(registry, text):
    with pytest.raises(PipelineError, match=r"p.yaml:\d:\d+: (this anchor stands for something|not YAML: )"):
        load(text, "p.yaml", registry)


def test_an_anchor_used_twice_is_fine():
    assert Document.parse("a: &x {b: 1}\nc: *x\n", "p.yaml").value == {"a": {"b": 1}, "c": {"b": 1}}


def test_positions_of_nested_values():
    document = Document.parse("a:\n  - b: 1\n    c: {d: 2}\n", "x")
    assert document.positions[("a", 0, "c", "d")] == (3, 9)
    assert document.value == {"a": [{"b": 1, "c": {"d": 2}}]}


def test_dates_and_other_yaml_types_become_text():
    assert Document.parse("a: 2024-01-01\nb: !!binary aGk=\n", "x").value["a"] == "2024-01-01"


def test_unsafe_yaml_is_a_problem():
    document = Document.parse("a: !!python/object/apply:os.system ['true']\nb: !!python/name:os.system\n", "x")
    assert any("cannot be read" in p.message for p in document.problems)
