"""Stock transformers on packed checkpoints: bit-equal to the decoded dense twin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packing import canonical, pack_checkpoint, stock_experts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3MoeForCausalLM

import moefold_kernels.transformers as ours
from models import tiny
from moefold_kernels import FormatError, fuse, read_config, read_layer
from moefold_kernels.module import PackedModule

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")
IDS = torch.tensor([[5, 77, 130, 9, 200, 31, 64], [8, 8, 250, 17, 3, 99, 140]])


def load(path: Path, **kwargs):
    """A model, after checking that every tensor had its place."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_twins(made, family, implementation):
    packed, twin = made(family)
    left = load(packed, experts_implementation=implementation)
    right = load(twin, experts_implementation=implementation)
    assert any(isinstance(module, PackedModule) for module in left.modules())
    assert torch.equal(logits(left), logits(right))
    assert logits(left).float().std() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_take_half_the_bytes(made, family):
    packed, twin = (stock_experts(load(path)) for path in made(family))
    for number, module in packed.items():
        held = sum(p.numel() * p.element_size() for n, p in module.named_parameters() if "bias" not in n)
        dense = sum(p.numel() * p.element_size() for n, p in twin[number].named_parameters() if "bias" not in n)
        assert held * 2 == dense


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alone", [0, 2])
def test_save_pretrained_writes_the_same_layout(made, family, alone, tmp_path):
    packed, _ = made(family, alone)
    model = load(packed)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(packed / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((path / "config.json").read_text()) for path in (packed, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(made, family):
    outs = []
    for path in made(family):
        model = load(path)
        outs.append(model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0))
    assert torch.equal(*outs)
    assert outs[0].shape == (2, IDS.shape[1] + 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_stock_layers_mix(made, family):
    packed, twin = made(family, 2, (1,))
    model = load(packed)
    kinds = {number: isinstance(module, PackedModule) for number, module in stock_experts(model).items()}
    assert kinds[1]
    assert not kinds.get(0, False)
    assert torch.equal(logits(model), logits(load(twin)))


def test_an_odd_number_of_experts(tmp_path):
    source = tiny("qwen3_moe", tmp_path / "source", shard_size="1GB", num_experts=7, num_hidden_layers=2)
    pack_checkpoint(source, tmp_path / "packed", tmp_path / "twin", alone=1)
    assert torch.equal(logits(load(tmp_path / "packed")), logits(load(tmp_path / "twin")))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["argument", "method"])
def test_dequantize_gives_a_stock_model(made, family, way, tmp_path):
    packed, twin = made(family, 2)
    if way == "argument":
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            model = load(packed, quantization_config=ours.MoefoldConfig(dequantize=True))
    else:
        model = load(packed).dequantize()
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    assert torch.equal(logits(model), logits(load(twin)))
    model.save_pretrained(tmp_path / "stock")
    assert "quantization_config" not in json.loads((tmp_path / "stock" / "config.json").read_text())
    saved, expected = load_file(tmp_path / "stock" / "model.safetensors"), load_file(twin / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_other_dtypes_cast_the_decoded_values(made, family, dtype):
    packed, twin = made(family, 2)
    left, right = load(packed, dtype=dtype), load(twin, dtype=dtype)
    own, stock = ({n: p.dtype for n, p in model.named_parameters() if p.is_floating_point()} for model in (left, right))
    assert all(own[name] == stock.get(name, dtype) for name in own)  # gpt-oss keeps its norms in float32
    assert left.get_submodule("model").dtype == right.get_submodule("model").dtype
    for number, module in stock_experts(left).items():
        assert module.down_proj.dtype == dtype
        assert torch.equal(module.down_proj, stock_experts(right)[number].down_proj)
    assert torch.equal(logits(left), logits(right))


def test_what_transformers_keeps_in_float32_stays_so(tmp_path):
    """ERNIE's routers are float32 in a bfloat16 checkpoint; in bfloat16 they would choose other experts."""
    source = tiny("ernie4_5_moe", tmp_path / "source", shard_size="1GB", moe_num_experts=8, moe_k=2)
    tensors = load_file(source / "model.safetensors")
    routers = [name for name in tensors if name.endswith(".gate.weight")]
    for name in routers:
        tensors[name] = tensors[name].float() * 1.001
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    pack_checkpoint(source, tmp_path / "packed", tmp_path / "twin")
    found, expected = (dict(load(path).named_parameters()) for path in (tmp_path / "packed", source))
    assert len(routers) == 2
    for name in routers:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_device_map_auto(made, family):
    packed, twin = made(family)
    left, right = (load(p, device_map="auto", experts_implementation="grouped_mm") for p in (packed, twin))
    assert torch.equal(logits(left).cpu(), logits(right).cpu())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_disk_offload(made, family, tmp_path):
    packed, twin = made(family, 2)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    models = [load(path, device_map=device_map, offload_folder=tmp_path / path.name) for path in (packed, twin)]
    assert torch.equal(*(logits(model) for model in models))


def test_the_base_model_loads(made):
    packed, twin = made("mixtral", 2)
    left, right = (AutoModel.from_pretrained(path) for path in (packed, twin))
    assert any(isinstance(module, PackedModule) for module in left.modules())
    with torch.no_grad():
        assert torch.equal(left(IDS).last_hidden_state, right(IDS).last_hidden_state)


def test_moving_the_model_moves_the_decoded_dtype(made):
    module = stock_experts(load(made("qwen3_moe")[0]))[0]
    assert module.down_proj.dtype == torch.bfloat16
    assert module.to(torch.float32).down_proj.dtype == torch.float32
    assert module.gate_up_packed.dtype == torch.int16


@pytest.mark.parametrize("family", FAMILIES)
def test_read_layer_is_what_the_model_decodes(made, family):
    packed, twin = made(family, 2)
    layers = read_config(json.loads((packed / "config.json").read_text())["quantization_config"])
    with safe_open(packed / "model.safetensors", framework="pt") as file:
        for number, module in stock_experts(load(twin)).items():
            read = read_layer(file.get_tensor, layers[number])
            for matrix, weights in canonical(module).items():
                assert torch.equal(read[matrix], weights)
            gate_up, down = fuse(read)
            assert gate_up.shape[1:] == (2 * down.shape[2], down.shape[1])


def test_stock_transformers_without_us_raises(made):
    code = """
import sys
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
        print("LOADED", path)
    except RuntimeError as error:
        print("RAISED")
"""
    paths = [str(made(family, alone)[0]) for family in FAMILIES for alone in (0, 2)]
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["RAISED"] * len(paths)
    assert "gate_up_proj" in result.stderr


def edited(packed: Path, to: Path, change_tensors=None, change_config=None) -> Path:
    """A copy of a packed checkpoint with one thing changed."""
    tensors, config = load_file(packed / "model.safetensors"), json.loads((packed / "config.json").read_text())
    if change_tensors:
        change_tensors(tensors)
    if change_config:
        change_config(config["quantization_config"])
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


WORDS = "model.layers.1.mlp.experts.2.up_proj.packed_weight"
LEFT = "model.layers.1.mlp.experts.1.down_proj.weight"


@pytest.mark.parametrize("name", [WORDS, LEFT, "model.layers.0.mlp.experts.gate_up_proj"])
def test_a_missing_tensor_is_named(made, tmp_path, name):
    path = edited(made("qwen3_moe", 2)[0], tmp_path / "x", lambda tensors: tensors.pop(name))
    with pytest.raises(FormatError, match=f"{name} is not in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("kept", ["up_proj", "nothing"])
def test_a_missing_tensor_of_a_state_dict_is_an_error(made, kept):
    packed, _ = made("qwen3_moe")
    whole = load_file(packed / "model.safetensors")
    assert torch.equal(logits(from_state(packed, dict(whole))), logits(load(packed)))
    part = {name: value for name, value in whole.items() if f"1.mlp.experts.2.{kept}" not in name}
    if kept == "nothing":
        part = {name: value for name, value in whole.items() if "packed_weight" not in name}
    with pytest.raises((FormatError, RuntimeError), match=r"did not come|automatic conversion"):
        from_state(packed, part)


def from_state(packed: Path, tensors):
    """A model from tensors in memory, of which transformers gives the quantizer no file."""
    config = AutoConfig.from_pretrained(packed)
    return Qwen3MoeForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


@pytest.mark.slow
@pytest.mark.usefixtures("a_device_each")
def test_two_processes_of_tensor_parallelism(made, tmp_path):
    code = """
import sys
import torch
import moefold_kernels.transformers
from transformers import AutoModelForCausalLM
outs = []
for path in sys.argv[1:3]:
    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    outs.append(model(torch.tensor([[5, 77, 130, 9, 200]])).logits)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], tp_plan="auto", experts_implementation="moefold")
with torch.no_grad():
    fast = model(torch.tensor([[5, 77, 130, 9, 200]])).logits.float()
print("NEAR" if (fast - outs[0].float()).norm() < 0.03 * fast.norm() else "FAR")
words = model.model.layers[0].mlp.experts.gate_up_packed._local_tensor
print("EQUAL" if torch.equal(*outs) else "DIFFERENT", list(words.shape))
"""
    (tmp_path / "run.py").write_text(code)
    twin, packed = made("mixtral", 2)[::-1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "run.py"), str(twin), str(packed)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [result.stdout.count(word) for word in ("EQUAL", "NEAR", "[3, 48, 64]", "DIFFERENT", "FAR")]
    assert said == [2, 2, 2, 0, 0], result.stdout + result.stderr


def test_a_wrong_shape_is_named(made, tmp_path):
    path = edited(made("qwen3_moe", 2)[0], tmp_path / "x", lambda t: t.update({WORDS: t[WORDS][:-1].clone()}))
    with pytest.raises(FormatError, match=rf"{WORDS} is \[31, 64\] in the checkpoint's files, not \[32, 64\]"):
        AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version is 2"),
        (lambda c: c.pop("layers"), "layers is missing"),
        (lambda c: c["layers"]["1"]["pairs"].pop(), "layers.1: pairs and dense together"),
        (lambda c: c["layers"]["1"].update(prefix="model.layers.1.mlp.expert"), "is no experts module"),
        (lambda c: c["layers"]["1"].update(dense=[], pairs=[[0, 1], [2, 3]]), "lists 4 experts, the model has 8"),
    ],
)
def test_a_wrong_config_is_refused(made, tmp_path, change, message):
    path = edited(made("qwen3_moe", 2)[0], tmp_path / "x", change_config=change)
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("setting", [{"enable_expert_parallel": True}, {"ep_size": 2}])
def test_expert_parallelism_is_refused(made, setting):
    config = AutoConfig.from_pretrained(made("qwen3_moe")[1])
    model = Qwen3MoeForCausalLM(config)
    config.distributed_config = SimpleNamespace(**setting)
    quantizer = ours.MoefoldQuantizer(ours.MoefoldConfig())
    with pytest.raises(FormatError, match="expert parallelism would separate the experts of a pair"):
        quantizer.preprocess_model(model)


def test_registering_twice_is_harmless():
    ours.register()
    ours.register()


def test_parallel_plans_name_the_packed_parameters(made):
    model = load(made("qwen3_moe")[0])
    plan = {"model.layers.*.mlp.experts.gate_up_proj": "packed_colwise", "x.shared_experts.gate_up_proj": "colwise"}
    model.hf_quantizer.update_parallel_plan(model, plan)
    assert plan["model.layers.*.mlp.experts.gate_up_packed"] == "packed_colwise"
    assert not any(name.startswith("x.shared_experts.gate_up_p") and "packed" in name for name in plan)
    config = model.hf_quantizer.update_tp_plan(model.config)
    assert config.base_model_tp_plan["layers.*.mlp.experts.down_packed"] == "rowwise"
