"""plan.json: written with a checkpoint, changed by hand, read again; mixed formats save and load bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moefold import Checkpoint, Groups, MergePlan, Packed, PairDamage, PairMerge, StreamedModel
from moefold.errors import FormatError, InputError, MoefoldError
from moefold.stage import Layers
from moefold.testing import World, run_pipeline, small_model
from moefold_plugins import plan_files
from moefold_plugins.plans import pack_planned, plan_read, unpack_planned
from moefold_plugins.save import save

HEAD = """
model: {model}
stages:
  - {{id: text, uses: text.stdlib, with: {{part: calibrate, samples: 4, length: 64}}}}
  - {{uses: forward}}
  - {{uses: levels}}
  - {{uses: damage.pairs}}
"""
TAIL = """
  - {{uses: pair.planned}}
  - {{uses: puzzlemoe.compensated}}
  - {{uses: pack.planned}}
  - {{uses: save, with: {{to: {out}}}}}
"""
BUDGET = HEAD + "  - {{uses: plan.budget, with: {{budget: {budget}}}}}" + TAIL
READ = HEAD + "  - {{uses: plan.read, with: {{path: {plan}}}}}" + TAIL
MIXED = {
    "0": {"format": "pair4", "pairs": [[0, 3], [1, 2]]},
    "1": {"format": "exponent", "pairs": [[4, 0]]},
    "2": {"pairs": []},
    "3": {"format": "pair6", "pairs": [[0, 1], [2, 3], [4, 5]], "alone": []},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    small_model(folder / "model", experts=6, layers=4, hidden=64, inner=64)
    return folder / "model"


@pytest.fixture(scope="module")
def mixed(folder: Path, model: Path) -> Path:
    """A checkpoint of four layers, each as differently packed as can be."""
    (folder / "mixed.json").write_text(json.dumps({"layers": MIXED}))
    out = folder / "mixed"
    run_pipeline(READ.format(model=model, plan=folder / "mixed.json", out=out), folder)
    return out


def test_a_budget_is_met_to_the_byte_that_was_planned(folder, model):
    out = folder / "budget"
    run_pipeline(BUDGET.format(model=model, budget=0.4, out=out), folder)
    plan = json.loads((out / "plan.json").read_text())
    saved = json.loads((out / "moefold.json").read_text())["saved"]
    assert saved["expert_bytes"] == {name: plan["budget"][name] for name in ("before", "after")}
    assert plan["budget"]["after"] <= 0.4 * plan["budget"]["before"]
    assert all(cost > 0 for layer in plan["layers"].values() for cost in layer["damage"])


def test_layers_of_different_formats_load_bit_by_bit(model, mixed):
    before, after = Checkpoint.open(str(model)), Checkpoint.open(str(mixed))
    assert [after.packed_layers[n].format for n in (0, 1, 3)] == ["pair4", "exponent", "pair6"]
    stock = AutoModelForCausalLM.from_pretrained(mixed, dtype="auto")
    for number in range(4):
        own, read = before.layer(number).experts(), after.layer(number).experts()
        paired = {e for pair in MIXED[str(number)]["pairs"] for e in pair}
        for expert in range(6):
            assert torch.equal(own.gate_up[expert], read.gate_up[expert]) == (expert not in paired)
    ids = torch.arange(64).view(2, 32) * 7 % 250
    streamed = StreamedModel(after, "cpu")
    hidden = streamed.embed(ids)
    for number in range(4):
        with streamed.loaded(number):
            hidden = streamed.through(number, ids, hidden)
    with torch.no_grad():
        expected, logits = streamed.head(hidden).float(), stock(ids).logits.float()
    assert (logits - expected).norm() / expected.norm() < 2e-2  # bfloat16 sums in another order
    for name, tensor in AutoModelForCausalLM.from_pretrained(mixed, dtype="auto").state_dict().items():
        assert torch.equal(tensor, stock.state_dict()[name]), name


def test_a_plan_is_read_again_from_the_checkpoint(folder, model, mixed):
    out = folder / "again"
    notes = run_pipeline(READ.format(model=model, plan=mixed, out=out), folder)
    (facts,) = (note["facts"] for note in notes["plan.read"].values())
    assert {n: one["pairs"] for n, one in facts["layers"].items()} == {
        n: sorted(sorted(pair) for pair in one["pairs"]) for n, one in MIXED.items()
    }
    assert all(cost > 0 for one in facts["layers"].values() for cost in one["damage"])
    first, second = (json.loads((place / "moefold.json").read_text())["saved"] for place in (mixed, out))
    assert first["expert_bytes"] == second["expert_bytes"]
    assert facts["budget"]["after"] == first["expert_bytes"]["after"]
    assert (mixed / "plan.json").read_text() == (out / "plan.json").read_text()


def test_what_a_plan_chooses_decides_its_digest_and_nothing_else(tmp_path):
    plan: dict[str, Any] = {"layers": {"0": {"format": "pair4", "pairs": [[0, 1]], "damage": [0.5]}}}
    file = tmp_path / "plan.json"

    def digest() -> Any:
        file.write_text(json.dumps(plan))
        return plan_files.plan_digest(file)

    first = digest()
    plan["layers"]["0"]["damage"] = [0.7]
    assert digest() == first
    plan["layers"]["0"]["format"] = "pair6"
    assert digest() != first
    assert "cannot be read" in plan_files.plan_digest(tmp_path / "none.json")


MODEL = {"0": [4, 100], "1": [4, 100]}
GOOD: dict[str, Any] = {"format": "exponent", "pairs": [[0, 1]], "alone": [2, 3]}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"1": GOOD}, r'layer 0 is missing; write "0": \{"pairs": \[\]\} to leave it'),
        ({"0": GOOD, "1": GOOD, "7": GOOD}, "layer 7: the model has no such layer"),
        ({"0": GOOD, "1": GOOD | {"format": "pair7"}}, "layer 1: format pair7; did you mean pair"),
        ({"0": GOOD, "1": GOOD | {"format": None}}, "known are exponent, pair8"),
        ({"0": GOOD, "1": GOOD | {"pairs": [[0, 1], [1, 2]]}}, "layer 1: expert 1 is there 2 times"),
        ({"0": GOOD, "1": GOOD | {"alone": [2]}}, r"layer 1: experts \[3\] are nowhere"),
        ({"0": GOOD, "1": GOOD | {"alone": [1, 2, 3]}}, "expert 1 is there 2 times"),
        ({"0": GOOD, "1": {"format": "exponent", "pairs": [[0, 4]]}}, "no expert 4; the layer has 0 to 3"),
        ({"0": GOOD, "1": {"pairs": [[0, 1, 2]]}}, "a list of pairs"),
        ({"0": GOOD, "1": {"pairs": [[0, True]]}}, "a list of pairs"),
        ({"0": GOOD, "1": GOOD | {"pears": 1}}, "unknown key pears; did you mean pairs"),
        ({"0": GOOD, "1": []}, "layer 1: write a mapping"),
    ],
)
def test_a_broken_plan_is_told_what_to_write(tmp_path, layers, message):
    (tmp_path / "plan.json").write_text(json.dumps({"layers": layers}))
    with pytest.raises(InputError, match=message):
        plan_files.read_plan(tmp_path / "plan.json", MODEL)


def test_all_problems_are_told_at_once(tmp_path):
    layers = {"0": GOOD | {"format": "int4"}, "2": GOOD}
    (tmp_path / "plan.json").write_text(json.dumps({"layers": layers, "speed": 1}))
    with pytest.raises(InputError) as caught:
        plan_files.read_plan(tmp_path / "plan.json", MODEL)
    assert all(
        part in str(caught.value) for part in ("unknown key speed", "format int4", "layer 1 is missing", "layer 2")
    )


def test_a_plan_for_another_model_is_refused(tmp_path):
    written = {"model": {"0": [8, 100], "1": [8, 100]}, "layers": {"0": GOOD, "1": GOOD}}
    (tmp_path / "plan.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match="another model: its layer 0 has 8 experts of 100 weights, and this one's 4"):
        plan_files.read_plan(tmp_path / "plan.json", MODEL)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "plan.json:1:2: not JSON"), ("[]", "is no plan; it needs"), ('{"layers": {}, "version": 9}', "version 9")],
)
def test_what_is_no_plan_is_refused(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=message):
        plan_files.load(tmp_path)


def test_packing_follows_the_plan_whatever_merged(tmp_path, monkeypatch):
    small_model(tmp_path / "model", experts=4, hidden=64, inner=64)
    world = World(Checkpoint.open(str(tmp_path / "model")))
    plan = world.make(MergePlan)
    few = MergePlan({n: one | {"format": "pair5"} for n, one in plan.layers.items()}, plan.model)
    moved = []
    monkeypatch.setattr(PairMerge, "to", lambda merge, device: moved.append(device) or merge)
    packed = pack_planned(world.layer, world.make(PairMerge), few, None, world.context())
    assert moved == [world.context().device]
    assert packed.format == "pair5"
    read = unpack_planned(packed, world.layer, world.context())
    assert read.down.shape == world.layer.experts().down.shape
    assert few.groups(world.layer.number) == Groups(packed.pairs, packed.dense, "pair5")
    every = Layers({n: w.make(Packed) for n, w in world.every_layer().items()})
    with pytest.raises(FormatError, match=r"2 pairs in pair5, and 2 in exponent came; write pair\.planned"):
        save(world.checkpoint, every, None, world.provenance(), few, to=tmp_path / "out")


def test_a_format_beside_the_plans_is_refused(folder, model):
    text = READ.format(model=model, plan=folder / "mixed.json", out=folder / "other")
    (folder / "mixed.json").write_text(json.dumps({"layers": MIXED}))
    text = text.replace("uses: puzzlemoe.compensated", "uses: puzzlemoe.compensated, with: {format: pair8}")
    with pytest.raises(MoefoldError, match="the plan says pair4, and the option format pair8; drop it"):
        run_pipeline(text, folder / "other")


def test_without_damage_a_plan_has_none(tmp_path):
    small_model(tmp_path / "model", experts=4)
    world = World(Checkpoint.open(str(tmp_path / "model")))
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"layers": world.make(MergePlan).layers}))
    plan = plan_read(world.checkpoint, None, path=file)
    assert plan.predicted(0) is None
    every = Layers({n: w.make(PairDamage) for n, w in world.every_layer().items()})
    assert (plan_read(world.checkpoint, every, path=file).predicted(0) or 0) > 0
