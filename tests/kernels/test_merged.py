"""Stock transformers on checkpoints with merged experts: bit-equal to the twin in which they are repeated."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layers import TOLERANCE, difference
from merged_checkpoints import KINDS, ROUTE
from packing import stock_experts
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import moefold_kernels.transformers as ours
from moefold_kernels import BackendError
from moefold_kernels.module import PackedModule
from moefold_kernels.routed import MergedModule, RoutedModule

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")
IDS = torch.tensor([[5, 77, 130, 9, 200, 31, 64], [8, 8, 250, 17, 3, 99, 140]])


def load(path: Path, **kwargs):
    """A model, after checking that every tensor had its place."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.cpu()


def expert_bytes(model) -> int:
    return sum(p.numel() * p.element_size() for m in stock_experts(model).values() for p in m.parameters())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_twins(merged, family, kind, implementation):
    left, right = (load(path, experts_implementation=implementation) for path in merged(family, kind))
    assert any(isinstance(module, RoutedModule) for module in left.modules())
    assert torch.equal(logits(left), logits(right))
    if kind == "merged":
        assert expert_bytes(left) * 8 == expert_bytes(right) * 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["mixed", "packed"])
def test_the_kernels_run_packed_experts_over_merged_ones(merged, family, kind, device):
    pytest.importorskip("triton")
    left, right = merged(family, kind)
    found = logits(load(left, experts_implementation="moefold").to(device))
    assert 0 < difference(found, logits(load(right).to(device))) < TOLERANCE["logits"]


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_experts_take_the_default_of_transformers(merged, family):
    left, right = (load(path) for path in merged(family))
    assert left.config._experts_implementation == right.config._experts_implementation
    assert load(merged(family, "mixed")[0]).config._experts_implementation == "moefold"
    with pytest.raises(BackendError, match="is not packed, and experts_implementation='moefold' is for packed"):
        logits(load(merged(family)[0], experts_implementation="moefold"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["mixed", "merged"])
def test_save_pretrained_writes_the_same_layout(merged, family, kind, tmp_path):
    path, _ = merged(family, kind)
    model = load(path)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((directory / "config.json").read_text()) for directory in (path, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(merged, family):
    outs = []
    for path in merged(family):
        model = load(path)
        outs.append(model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0))
    assert torch.equal(*outs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["argument", "method"])
def test_dequantize_gives_a_stock_model(merged, family, way, tmp_path):
    path, twin = merged(family, "mixed")
    if way == "argument":
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            model = load(path, quantization_config=ours.MoefoldConfig(dequantize=True))
    else:
        model = load(path).dequantize()
    assert not any(isinstance(module, RoutedModule) for module in model.modules())
    assert {module.num_experts for module in stock_experts(model).values()} == {8}
    assert torch.equal(logits(model), logits(load(twin)))
    model.save_pretrained(tmp_path / "stock")
    saved, expected = load_file(tmp_path / "stock" / "model.safetensors"), load_file(twin / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert "quantization_config" not in json.loads((tmp_path / "stock" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_other_dtypes(merged, family, dtype):
    # by batched_mm, whose rows do not depend on each other: a float32 product of more rows rounds otherwise
    left, right = (load(path, dtype=dtype, experts_implementation="batched_mm") for path in merged(family))
    kept, stock = ({n: p.dtype for n, p in model.named_parameters()} for model in (left, right))
    assert kept == stock  # gpt-oss keeps its norms in float32
    assert dtype in kept.values()
    assert torch.equal(logits(left), logits(right))


@pytest.mark.parametrize("kind", ["mixed", "merged"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_device_map_auto(merged, family, kind):
    models = [load(p, device_map="auto", experts_implementation="grouped_mm") for p in merged(family, kind)]
    assert torch.equal(*(logits(model) for model in models))


@pytest.mark.parametrize("kind", ["mixed", "merged"])
def test_disk_offload(merged, kind, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    paths = merged("mixtral", kind)
    models = [load(path, device_map=device_map, offload_folder=tmp_path / path.name) for path in paths]
    assert torch.equal(*(logits(model) for model in models))


def test_the_base_model_loads(merged):
    left, right = (AutoModel.from_pretrained(path) for path in merged("mixtral"))
    assert any(isinstance(module, MergedModule) for module in left.modules())
    with torch.no_grad():
        assert torch.equal(left(IDS).last_hidden_state, right(IDS).last_hidden_state)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", ["packed", "merged"])
def test_compiled_whole(merged, family, kind):
    module = stock_experts(load(merged(family, kind)[0], experts_implementation="batched_mm"))[1]
    index = torch.tensor([[0, 4], [7, 2], [3, 5]])  # the first two reach one expert twice
    batch = (torch.randn(3, 64).bfloat16(), index, torch.rand(3, 2).bfloat16())
    with torch.no_grad():
        right = module(*batch)
        found = torch.compile(module, fullgraph=True, backend="aot_eager")(*batch)
    assert torch.equal(found, right)


def test_modules_are_copied_and_moved_with_their_route(merged):
    module = stock_experts(load(merged("qwen3_moe")[0]))[0]
    copied, emptied = copy.deepcopy(module), copy.deepcopy(module).to("meta").to_empty(device="cpu")
    assert copied.route.tolist() == emptied.route.tolist() == ROUTE
    assert copied.to(torch.float16).route.dtype == torch.int64
    assert set(module.state_dict()) == {"gate_up_proj", "down_proj"}
    named = {"hidden_states": torch.randn(2, 64).bfloat16(), "top_k_index": torch.tensor([[1, 3], [6, 7]])}
    named["top_k_weights"] = torch.rand(2, 2).bfloat16()
    assert torch.equal(module(**named), module(*named.values()))


def test_stock_transformers_without_us_raises(merged):
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
    paths = [str(merged(family, kind)[0]) for family in FAMILIES for kind in KINDS]
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["RAISED"] * len(paths)


def test_parallel_plans_stay_as_they_are(merged):
    model = load(merged("qwen3_moe")[0])
    plan = {"model.layers.*.mlp.experts.gate_up_proj": "packed_colwise"}
    model.hf_quantizer.update_parallel_plan(model, plan)
    assert plan["model.layers.*.mlp.experts.gate_up_proj"] == "packed_colwise"
    assert isinstance(stock_experts(model)[0], MergedModule)
    assert not any(isinstance(module, PackedModule) for module in model.modules())


@pytest.mark.slow
@pytest.mark.usefixtures("a_device_each")
def test_two_processes_of_tensor_parallelism(merged, tmp_path):
    code = """
import sys
import torch
import moefold_kernels.transformers
from transformers import AutoModelForCausalLM
outs = []
for path in sys.argv[1:3]:
    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    outs.append(model(torch.tensor([[5, 77, 130, 9, 200]])).logits)
down = model.model.layers[0].mlp.experts.down_proj._local_tensor
print("EQUAL" if torch.equal(*outs) else "DIFFERENT", list(down.shape))
"""
    (tmp_path / "run.py").write_text(code)
    for kind in ("merged", "mixed"):
        left, right = merged("mixtral", kind)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(tmp_path / "run.py"), str(right), str(left)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        said = [result.stdout.count(word) for word in ("EQUAL", "[5, 64, 24]", "DIFFERENT")]
        assert said == [2, 2, 0], result.stdout + result.stderr
