"""`check_stage`: every built-in passes, and broken ones are told what is wrong."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from moefold import (
    Activity,
    Artifact,
    Checkpoint,
    Context,
    Experts,
    Groups,
    Json,
    Layer,
    Layers,
    MergePlan,
    PairMerge,
    Previous,
    Similarity,
    stage,
)
from moefold.codec import pack
from moefold.errors import InputError
from moefold.hooks import Registry
from moefold.magnitudes import Levels
from moefold.stage import Port
from moefold.testing import CheckError, World, check_stage, run_pipeline, small_model
from moefold_kernels import layout_pairs

REGISTRY = Registry.installed()
NOT_HERE = {"text.dataset": "reads the hub"}


def given(name: str, folder: Path) -> dict[str, Any]:
    """What a built-in stage has to be told."""
    text = {"samples": 2, "length": 8}
    options: dict[str, Any] = {
        "quantize": {"scheme": "int8"},
        "quantize.gptq": {"scheme": "int8"},
        "save": {"to": folder / "out"},
        "text.files": {"files": [str(folder / "text.txt")], **text},
        "text.prose": text,
        "text.stdlib": text,
        "text.mix": {"samples": 2},
        "evaluate.speed": {"length": 4, "new": 1, "rounds": 1},
        "plan.budget": {"budget": 1.0},  # what two experts of one layer can meet whatever their size
    }
    if name == "plan.read":
        return {"options": lambda world: {"path": written_plan(world, folder)}}
    kind, _, format = name.partition(".")
    if kind in ("pack", "unpack") and format in layout_pairs.MAGNITUDE_BITS:
        codec: Any = REGISTRY.codecs[format]
        spread = torch.linspace(0.01, 3, 1000)
        levels = list(Levels.learn(spread, layout_pairs.MAGNITUDE_BITS[format]).values)
        if kind == "pack":
            return {"options": {"levels": levels}}
        return {"inputs": lambda world: {"packed": pack(codec(levels=levels), world.make(PairMerge))}}
    return {"options": options.get(name)}


def written_plan(world: World, folder: Path) -> Path:
    place = folder / "plan.json"
    place.write_text(json.dumps({"layers": world.make(MergePlan).layers}))
    return place


@pytest.mark.parametrize("name", REGISTRY.stages)
def test_every_built_in_passes(name: str, tmp_path: Path) -> None:
    if name in NOT_HERE:
        pytest.skip(NOT_HERE[name])
    (tmp_path / "text.txt").write_text("Some text of a few words. " * 9)
    check_stage(REGISTRY.stages[name], **given(name, tmp_path))


def groups(count: int, shift: int = 0) -> Groups:
    return Groups([[0, 1]], list(range(2, count + shift)))


@stage("broken")
def good(layer: Layer, activity: Activity, before: Previous[Groups], context: Context) -> Groups:
    """What the broken ones are made of."""
    chosen = torch.randperm(layer.expert_count, generator=context.generator)[:2].sort().values.tolist()
    return Groups([chosen], [e for e in range(layer.expert_count) if e not in chosen])


@stage("broken")
def undocumented(layer: Layer) -> Groups:
    return groups(layer.expert_count)


@stage("broken")
def unexplained(layer: Layer, *, strength: int = 1) -> Groups:
    """An option that nobody explains."""
    return groups(layer.expert_count)


@stage("broken")
def explained(layer: Layer, *, strength: Annotated[int, Field(description="how much")] = 1) -> Groups:
    """Fine, until an input has the option's name."""
    return groups(layer.expert_count)


one_name = replace(explained, ports={"strength": Port("strength", Activity, "one")})


@stage("broken")
def in_place(layer: Layer, activity: Activity) -> Groups:
    """Normalises what it was given."""
    activity.input_norm.div_(activity.input_norm.max())
    return groups(layer.expert_count)


@stage("broken")
def in_place_list(grouped: Groups) -> Groups:
    """Sorts what it was given."""
    grouped.members.sort(reverse=True)
    grouped.alone.append(99)
    return Groups([[0, 1]], [])


@stage("broken")
def global_chance(layer: Layer) -> Groups:
    """Shuffles with Python's generator."""
    order = list(range(layer.expert_count))
    return Groups([], [*random.sample(order, len(order)), random.randrange(1000)])


@stage("broken")
def torch_chance(similarity: Similarity) -> Similarity:
    """Adds noise from torch's global generator."""
    return Similarity(similarity.matrix + torch.randn_like(similarity.matrix), "noisy")


@stage("broken")
def clock(layer: Layer) -> Similarity:
    """Depends on when it runs."""
    return Similarity(torch.zeros(1), f"{time.perf_counter_ns()}")


@stage("broken")
def nosy(layer: Layer) -> Similarity:
    """Reads the layer after."""
    other = layer.checkpoint.layers()[layer.position + 1].experts()
    return Similarity(other.down[0].float(), "other")


@stage("broken")
def other_kind(layer: Layer) -> Groups:
    """Returns what it does not promise."""
    return [[0, 1]]  # type: ignore[return-value]


@stage("broken")
def large_only(layer: Layer) -> Groups:
    """Assumes four experts."""
    order = list(range(layer.expert_count))
    return Groups([[order[0], order[3]]], [order[1], order[2]])


@stage("broken")
def wants_previous(layer: Layer, before: Previous[Groups]) -> Groups:
    """Forgets that the first layer has none before it."""
    assert before is not None
    return before


@dataclass(frozen=True)
class Pairs(Artifact):
    """An artifact of a plugin, with fields that do not come back."""

    pairs: Any
    figures: Any = None
    more: Any = None

    def facts(self) -> dict[str, Json]:
        return {"figures": self.figures} if self.figures is not None else {}


@stage("broken")
def tuples(layer: Layer) -> Pairs:
    """Tuples become lists."""
    return Pairs((0, 1))


@stage("broken")
def numbers_for_keys(layer: Layer) -> Pairs:
    """Keys become text."""
    return Pairs({0: 1})


@stage("broken")
def mixed(layer: Layer) -> Pairs:
    """A tensor among JSON."""
    return Pairs([torch.zeros(2), 1])


@stage("broken")
def shared_memory(layer: Layer) -> Pairs:
    """Two names for the same bytes."""
    weights = torch.arange(4.0)
    return Pairs(weights, more=weights)


@stage("broken")
def tensor_facts(layer: Layer) -> Pairs:
    """A tensor in the report."""
    return Pairs([0], torch.zeros(2))


@stage("broken")
def nan_facts(layer: Layer) -> Pairs:
    """JSON has no NaN."""
    return Pairs([0], [float("nan")])


@stage("broken")
def ignores(layer: Layer, *, strength: Annotated[int, Field(description="how much")] = 1) -> Groups:
    """Takes an option and does nothing with it."""
    return groups(layer.expert_count)


@stage("broken")
def keeps(layer: Layer, *, skip: Annotated[list[int], Field(description="layers")] = []) -> Groups:  # noqa: B006
    """Writes into a default that the next call has, too."""
    skip.append(5)
    return groups(layer.expert_count)


@stage("broken")
def doubles(layer: Layer) -> Groups:
    """Has all that follows compute in float64."""
    torch.set_default_dtype(torch.float64)
    return groups(layer.expert_count)


@stage("broken")
def first_layer_only(layer: Layer) -> Groups:
    """Mixes up a layer's number with something that is always 0."""
    return [groups(layer.expert_count)][layer.number]


@stage("broken")
def twice(layer: Layer) -> Groups:
    """An expert in two places."""
    return Groups([[0, 1]], list(range(layer.expert_count)))


@stage("broken")
def forgets(layer: Layer) -> Groups:
    """An expert in none."""
    return Groups([[1, layer.expert_count]], [])


@stage("broken")
def not_a_number(layer: Layer) -> Similarity:
    """Divides by the norm of an expert without tokens."""
    return Similarity(torch.zeros(layer.expert_count, layer.expert_count) / 0, "nan")


@stage("broken")
def some_only(layer: Layer) -> Similarity:
    """Of three experts, whatever there are."""
    return Similarity(torch.zeros(3, 3), "some")


def not_a_stage(layer: Layer) -> Groups:
    """A plain function."""
    return groups(layer.expert_count)


BROKEN: list[tuple[Any, str]] = [
    (ignores, "option strength is accepted and never read, so it changes nothing"),
    (keeps, r"it changes an option in place \(skip has 0 values and then 1\)"),
    (doubles, "it leaves torch's default dtype at torch.float64"),
    (first_layer_only, r"\(model of 2 experts\), layer 1: it fails: IndexError"),
    (twice, "expert 0 is in two groups, or alone and in one"),
    (forgets, "its groups name 2 experts and not expert 0"),
    (not_a_number, "its matrix holds NaN"),
    (some_only, r"its matrix is \[3, 3\]; it is \[expert, expert\], of 2 experts here"),
    (undocumented, "it has no docstring"),
    (one_name, "input strength and option strength have one name"),
    (unexplained, "option strength has no description"),
    (in_place, r"it changes an input in place \(activity.input_norm differs"),
    (in_place_list, r"it changes an input in place \(grouped."),
    (global_chance, r"the same inputs gave two results \(alone"),
    (torch_chance, r"the same inputs gave two results \(matrix differs in .*context.generator"),
    (clock, r"the same inputs gave two results \(metric"),
    (nosy, "it reads weights of layer 1 while it works on layer 0; .*Previous"),
    (other_kind, "it returned list where Groups is promised"),
    (large_only, r"\(model of 2 experts\): it fails: IndexError"),
    (wants_previous, "it fails: AssertionError"),
    (tuples, r"comes back from the store changed \(pairs is a tuple and then a list\)"),
    (numbers_for_keys, r"comes back from the store changed \(pairs has"),
    (mixed, "cannot be stored and read again: StoreError: Pairs holds something that is neither tensor nor JSON"),
    (shared_memory, "cannot be stored and read again"),
    (tensor_facts, r"facts\(\) of Pairs are no JSON"),
    (nan_facts, r"facts\(\) of Pairs are no JSON .*: ValueError"),
]
NAMES = [one.function.__name__ for one, _ in BROKEN]


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=NAMES)
def test_a_broken_stage_is_told_what_is_wrong(broken: Any, message: str) -> None:
    with pytest.raises(CheckError, match=f"(?s)^stage broken.*{message}"):
        check_stage(broken)


def test_the_stage_they_are_made_of_is_not_broken() -> None:
    check_stage(good)


def test_what_measures_the_machine_says_so_and_may_differ() -> None:
    check_stage(replace(clock, repeatable=False, function=matrix_by_the_clock))
    with pytest.raises(CheckError, match="the same inputs gave two results"):
        check_stage(replace(clock, function=matrix_by_the_clock))


def matrix_by_the_clock(layer: Layer) -> Similarity:
    """Depends on when it runs."""
    return Similarity(torch.zeros(layer.expert_count, layer.expert_count), f"{time.perf_counter_ns()}")


def test_a_plain_function_is_no_stage() -> None:
    with pytest.raises(CheckError, match=r"not_a_stage: this is no stage; write @stage\(NAME\) above it"):
        check_stage(not_a_stage)  # type: ignore[arg-type]


def test_what_the_check_needs_is_asked_for() -> None:
    @stage("own")
    def own(pairs: Pairs, *, size: Annotated[int, Field(description="some")]) -> Groups:
        """Takes a kind of its own."""
        return Groups([list(pairs.pairs)], [size])

    with pytest.raises(CheckError, match=r"(?s)its options cannot be read \(give what it needs as options=.*size"):
        check_stage(own)
    with pytest.raises(InputError, match="there is no ready-made Pairs; give one: inputs="):
        check_stage(own, options={"size": 1})
    with pytest.raises(InputError, match="own has no input pair; it has: pairs"):
        check_stage(own, options={"size": 1}, inputs={"pair": Pairs([0, 1])})
    check_stage(own, options={"size": 2}, inputs=lambda world: {"pairs": Pairs([0, 1])})


def test_layers_and_optional_inputs_are_given_and_left_out() -> None:
    seen: list[tuple[int, bool]] = []

    @stage("all")
    def all_(every: Layers[Activity], maybe: Experts | None, checkpoint: Checkpoint) -> Groups:
        """Looks at all layers."""
        seen.append((len(every), maybe is not None))
        return Groups([], sorted(every))

    check_stage(all_)
    assert seen == [(2, True), (2, True), (2, False), (2, False)] * 2


def test_a_stage_can_be_tried_on_another_model(tmp_path: Path) -> None:
    counts: list[int] = []

    @stage("counting")
    def counting(layer: Layer) -> Groups:
        """Count."""
        counts.append(layer.expert_count)
        return groups(layer.expert_count)

    check_stage(counting, checkpoint=small_model(tmp_path / "model", experts=6))
    assert set(counts) == {6}


def test_a_world_is_the_same_twice(tmp_path: Path) -> None:
    checkpoint = small_model(tmp_path / "model")
    one, two = World(checkpoint), World(checkpoint, 1)
    assert torch.equal(one.make(Activity).input_norm, World(checkpoint).make(Activity).input_norm)
    assert not torch.equal(one.make(Activity).input_norm, two.make(Activity).input_norm)
    assert not one.can_make(Pairs)


def test_a_pipeline_runs_with_a_plugin_that_is_not_installed(tmp_path: Path) -> None:
    from moefold import hookimpl

    class Plugin:
        moefold_stages = staticmethod(hookimpl(lambda: [tail]))

    model = small_model(tmp_path / "model")
    found = run_pipeline(f"model: {model.path}\nstages: [{{uses: tail}}]\n", tmp_path, plugins=[Plugin()])
    assert found["tail"]["all"]["facts"] == {"members": [], "alone": [0, 1]}
    assert set(found) == {"tail"}


@stage("tail")
def tail(checkpoint: Checkpoint) -> Groups:
    """The layers' numbers."""
    return Groups([], [layer.number for layer in checkpoint.layers()])


def test_the_small_model_is_one_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = small_model(tmp_path / "model", experts=3, layers=1)
    logits: Tensor = AutoModelForCausalLM.from_pretrained(checkpoint.path)(torch.tensor([[1, 2, 3]])).logits
    assert bool(logits.isfinite().all())
    assert AutoTokenizer.from_pretrained(checkpoint.path)("ab").input_ids
