"""Which tensors and which config key follow the number of experts, and what a router needs of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import moefold.meta
import moefold.narrow
from models import ARCHITECTURES, tiny
from moefold import Checkpoint, Pruning
from moefold.errors import CheckpointError, InputError

SIXTEEN: dict[str, dict[str, Any]] = {"deepseek_v3": {"n_routed_experts": 16}}
EXPERTS = {"experts.gate_up_proj": 0, "experts.down_proj": 0}
KEYS = {
    "qwen3_moe": "num_experts num_local_experts", "mixtral": "num_local_experts", "olmoe": "num_experts",
    "deepseek_v3": "n_routed_experts", "gpt_oss": "num_local_experts",
}  # fmt: skip
AXES = {
    "qwen3_moe": EXPERTS | {"gate.weight": 0},
    "mixtral": EXPERTS | {"gate.weight": 0},
    "olmoe": EXPERTS | {"gate.weight": 0},
    "deepseek_v3": EXPERTS | {"gate.weight": 0, "gate.e_score_correction_bias": 0},
    "gpt_oss": EXPERTS
    | {"experts.gate_up_proj_bias": 0, "experts.down_proj_bias": 0, "router.weight": 0, "router.bias": 0},
}


def make(architecture: str, path: Path, **overrides: Any) -> Checkpoint:
    return Checkpoint.open(str(tiny(architecture, path / "model", **SIXTEEN.get(architecture, {}) | overrides)))


def edit(checkpoint: Checkpoint, drop: str, **changes: Any) -> Checkpoint:
    file = checkpoint.path / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != drop}
    file.write_text(json.dumps(config | changes))
    return Checkpoint.open(str(checkpoint.path))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_axes_and_key(name: str, tmp_path: Path) -> None:
    checkpoint = make(name, tmp_path)
    skeleton = checkpoint.skeleton
    half = skeleton.expert_count(2) // 2
    narrow = skeleton.narrow(half)
    expected = {f"model.layers.{n}.mlp.{name_}": axis for n in skeleton.experts for name_, axis in AXES[name].items()}
    assert narrow.axes == expected
    assert set(narrow.config) <= set(KEYS[name].split())
    assert set(narrow.config) <= set(checkpoint.config)
    assert set(narrow.config.values()) == {half}
    assert skeleton.narrow(half) is narrow


def test_an_axis_that_is_not_the_first(tmp_path: Path) -> None:
    overrides = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "intermediate_size": 64}
    checkpoint = make("ernie4_5_moe", tmp_path, **overrides)
    narrow = checkpoint.skeleton.narrow(3)
    found = {name.split(".mlp.")[1]: axis for name, axis in narrow.axes.items() if ".2." in name}
    assert found == EXPERTS | {"gate.weight": 0, "gate.moe_statics.e_score_correction_bias": 1}
    left = Pruning(checkpoint.layer(2)).beside(torch.tensor([1, 4, 7]))
    bias = next(key for key in left if "e_score_correction_bias" in key)
    assert torch.equal(left[bias], checkpoint.tensor(bias)[:, [1, 4, 7]])


def test_a_key_under_the_name_that_the_file_has_for_it(tmp_path: Path) -> None:
    checkpoint = edit(make("qwen3_moe", tmp_path), "num_local_experts", num_experts=8)  # as the hub has it
    assert checkpoint.skeleton.narrow(4).config == {"num_experts": 4}
    both = edit(checkpoint, "", num_local_experts=8)
    assert both.skeleton.narrow(4).config == {"num_experts": 4, "num_local_experts": 4}


def test_a_composite_model_has_it_in_its_text_config(tmp_path: Path) -> None:
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 288}
    more = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"layer_types": ["full_attention"] * 2, "head_dim": 16, "shared_expert_intermediate_size": 32}
    config = AutoConfig.for_model("qwen3_5_moe", text_config=sizes | more | layers)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert "num_experts" not in checkpoint.config
    assert checkpoint.config["text_config"]["num_experts"] == 8
    assert checkpoint.skeleton.narrow(4).config == {"num_experts": 4}
    elsewhere = {"model_type": "qwen3_5_moe", "llm_config": checkpoint.config["text_config"]}
    checkpoint.__dict__["config"] = elsewhere
    with pytest.raises(CheckpointError, match=r"neither config.json nor its text_config"):
        moefold.narrow.Narrow.of(checkpoint.skeleton, 4)


def test_other_keys_of_the_same_value_are_left_alone(tmp_path: Path) -> None:
    checkpoint = make("olmoe", tmp_path, num_attention_heads=8, num_key_value_heads=8, num_experts_per_tok=8)
    with pytest.raises(InputError, match=r"4 experts left of 8: too few for the router .*\(experts: 8\)"):
        checkpoint.skeleton.narrow(4)
    narrow = moefold.narrow.Narrow.of(checkpoint.skeleton, 4)
    assert narrow.config == {"num_experts": 4}
    assert len(narrow.axes) == 3 * 3


def test_a_key_that_is_named_alike_and_counts_something_else(tmp_path: Path) -> None:
    checkpoint = make("deepseek_v3", tmp_path, n_shared_experts=16, num_attention_heads=16, num_key_value_heads=16)
    assert checkpoint.skeleton.narrow(8).config == {"n_routed_experts": 8}


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, r"has 16 experts a layer; leave 1 to 15, not 0"),
        (16, r"leave 1 to 15, not 16"),
        (6, r"6 experts left of 16: its router has 4 equal groups of experts; write experts: 4 or experts: 8"),
        (4, r"4 experts left of 16: too few for the router of decoder layer 1; leave more of them \(experts: 8\)"),
    ],
)
def test_numbers_that_the_groups_of_a_router_forbid(count: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        make("deepseek_v3", tmp_path).skeleton.narrow(count)


def test_the_open_groups_must_hold_what_a_token_takes(tmp_path: Path) -> None:
    skeleton = make("deepseek_v3", tmp_path, num_experts_per_tok=5).skeleton
    with pytest.raises(InputError, match=r"a token takes 5 experts out of 2 of 4 groups; .*\(experts: 12\)"):
        skeleton.narrow(8)
    assert skeleton.narrow(12).count == 12


def test_a_router_that_does_not_run_alone_is_asked_for_its_top_k(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = make("mixtral", tmp_path).skeleton
    monkeypatch.setattr(moefold.narrow, "_chosen", lambda *_: None)
    assert skeleton.narrow(2).count == 2
    with pytest.raises(InputError, match=r"a token takes 2 experts; leave more of them \(experts: 2\)"):
        skeleton.narrow(1)


def test_the_groups_of_experts(tmp_path: Path) -> None:
    grouped = Pruning(make("deepseek_v3", tmp_path / "a").layer(1))
    assert grouped.groups == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert Pruning(make("mixtral", tmp_path / "b").layer(1)).groups == [list(range(8))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mlp: mlp.register_buffer("zero", torch.empty(mlp.gate.weight.shape[0] + 2)), r"zero is \[10\] for 8"),
        (lambda mlp: setattr(mlp, "gate", nn.Linear(64, 8)), r"router of decoder layer 0 does not follow"),
        (lambda mlp: mlp.register_buffer("table", torch.empty(9, dtype=torch.int64)), r"table may hold numbers of"),
        (
            lambda mlp: mlp.register_buffer(f"for_{mlp.gate.weight.shape[0]}", torch.empty(1)),
            r"for_\d comes or goes with the number",
        ),
    ],
)
def test_models_of_which_it_cannot_be_told_are_refused(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make("mixtral", tmp_path)
    make_model = AutoModelForCausalLM.from_config

    def changed(*args: Any, **kwargs: Any) -> Any:
        model = make_model(*args, **kwargs)
        change(model.model.layers[0].mlp)
        return model

    monkeypatch.setattr(moefold.meta.AutoModelForCausalLM, "from_config", changed)
    with pytest.raises(CheckpointError, match=message):
        moefold.narrow.Narrow.of(checkpoint.skeleton, 4)


def test_experts_that_follow_no_key_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = make("mixtral", tmp_path, num_attention_heads=8, num_key_value_heads=8).skeleton
    monkeypatch.setattr(moefold.narrow, "_unlikely", lambda key: key == "num_local_experts")
    assert moefold.narrow.Narrow.of(skeleton, 4).config == {"num_local_experts": 4}, "others are tried and left"
    monkeypatch.setattr(moefold.narrow, "on_meta", lambda *_: skeleton.model)
    with pytest.raises(CheckpointError, match=r"which key of config.json counts experts cannot be told"):
        moefold.narrow.Narrow.of(skeleton, 4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_router_is_found(name: str, tmp_path: Path) -> None:
    checkpoint = make(name, tmp_path)
    weight, bias = checkpoint.skeleton.router(2)
    stored = "block_sparse_moe.gate" if name == "mixtral" else "mlp.router" if name == "gpt_oss" else "mlp.gate"
    assert torch.equal(weight, checkpoint.tensor(f"model.layers.2.{stored}.weight"))
    assert (bias is not None) == (name == "gpt_oss")
    if bias is not None:
        assert torch.equal(bias, checkpoint.tensor(f"model.layers.2.{stored}.bias"))
