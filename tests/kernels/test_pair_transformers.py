"""Stock transformers on checkpoints in the few-bit pair formats: bit-equal to the decoded dense twin."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from layers import TOLERANCE, difference
from leveled import FORMATS
from packing import canonical, stock_experts
from safetensors import safe_open
from safetensors.torch import load_file
from test_transformers import FAMILIES, IDS, edited, load, logits

import moefold_kernels.transformers as ours
from moefold import Checkpoint
from moefold_kernels import BackendError, FormatError, implementation, layout_pairs, read_config, read_layer
from moefold_kernels.module import PackedModule

PAIRS = [*zip(FAMILIES, (*FORMATS, "pair6"), strict=True)]
"""Every family and every format."""
SIZES = {
    "bands": {"hidden_size": 128, "moe_intermediate_size": 128},
    "down in rows": {"hidden_size": 128, "moe_intermediate_size": 64},
    "gate and up in rows": {"hidden_size": 64, "moe_intermediate_size": 128},
}
"""Of qwen3_moe; the families' own sizes are in rows."""


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("family", "format"), PAIRS)
def test_logits_are_the_twins(made, family, format, implementation):
    packed, twin = made(family, 2, format=format)
    left, right = (load(path, experts_implementation=implementation) for path in (packed, twin))
    assert any(isinstance(module, PackedModule) for module in left.modules())
    assert torch.equal(logits(left), logits(right))
    assert logits(left).float().std() > 0.01


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_bands_are_read_saved_and_decoded(made, format, sizes, tmp_path):
    packed, twin = made("qwen3_moe", 2, format=format, **SIZES[sizes])
    model, right = load(packed, experts_implementation="grouped_mm"), load(twin, experts_implementation="grouped_mm")
    assert torch.equal(logits(model), logits(right))
    hidden, inner = SIZES[sizes].values()
    module = stock_experts(model)[0]
    lines, bands = (2 * inner, 2 * inner // layout_pairs.BAND), (hidden, hidden // layout_pairs.BAND)
    assert module.gate_up_packed.shape[1] == lines[hidden % 128 == 0]
    assert module.down_packed.shape[1] == bands[inner % 128 == 0]
    assert (module.inner, module.hidden, module.split) == (inner, hidden, False)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(packed / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    layers = read_config(json.loads((packed / "config.json").read_text())["quantization_config"])
    with safe_open(packed / "model.safetensors", framework="pt") as file:
        read = read_layer(file.get_tensor, layers[0])
        for matrix, weights in canonical(stock_experts(right)[0]).items():
            assert torch.equal(read[matrix], weights)
    plain = load(packed).dequantize()
    assert torch.equal(logits(plain), logits(load(twin)))


@pytest.mark.parametrize("format", FORMATS)
def test_earlier_layouts_are_refused(made, format, tmp_path):
    packed, _ = made("qwen3_moe", format=format)
    shutil.copytree(packed, tmp_path / "old")
    config = json.loads((packed / "config.json").read_text())
    entries, version = config["quantization_config"]["layers"], layout_pairs.VERSIONS[format]
    for layout, said in ((version - 1, f"layout of {format} is {version - 1}"), (None, f"{format} without layout")):
        for entry in entries.values():
            entry |= {"layout": layout}
            if layout is None:
                del entry["layout"]
        (tmp_path / "old" / "config.json").write_text(json.dumps(config))
        with pytest.raises(FormatError, match=rf"layers\.\d\.?.*{said}"):
            load(tmp_path / "old")


@pytest.mark.parametrize(("family", "format"), PAIRS)
def test_bytes_are_the_declared_ones(made, family, format):
    packed, twin = (stock_experts(load(path)) for path in made(family, format=format))
    for number, module in packed.items():
        held = sum(p.numel() * p.element_size() for n, p in module.named_parameters() if "bias" not in n)
        sizes = [(len(w) // 2, *w.shape[1:]) for w in canonical(twin[number]).values()]
        assert held == sum(pairs * layout_pairs.size(format, rows, columns) for pairs, rows, columns in sizes)


@pytest.mark.parametrize(("family", "format"), PAIRS)
def test_save_pretrained_writes_the_same_layout(made, family, format, tmp_path):
    packed, _ = made(family, 2, format=format)
    model = load(packed)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(packed / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((path / "config.json").read_text()) for path in (packed, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize(("family", "format"), [("mixtral", "pair5"), ("gpt_oss", "pair4")])
def test_generate_and_layers_that_are_stock(made, family, format):
    models = [load(path) for path in made(family, 2, (1,), format)]
    outs = [m.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0) for m in models]
    assert torch.equal(*outs)
    kinds = {number: isinstance(module, PackedModule) for number, module in stock_experts(models[0]).items()}
    assert kinds[1]
    assert not kinds[0]


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_gives_a_stock_model(made, format, tmp_path):
    packed, twin = made("qwen3_moe", 2, format=format)
    model = load(packed).dequantize()
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    model.save_pretrained(tmp_path / "stock")
    saved, expected = load_file(tmp_path / "stock" / "model.safetensors"), load_file(twin / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_cast_the_decoded_values_and_no_scale(made, dtype):
    packed, twin = made("mixtral", 2, format="pair6")
    left, right = load(packed, dtype=dtype), load(twin, dtype=dtype)
    assert torch.equal(logits(left), logits(right))
    module = stock_experts(load(packed).to(dtype))[0]
    assert module.down_group.dtype == torch.int16
    assert torch.equal(module.down_proj, stock_experts(right)[0].down_proj)


@pytest.mark.parametrize(("where", "format"), [("auto", "pair8"), ("disk", "pair5")])
def test_device_maps(made, where, format, tmp_path):
    disk = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
            "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    places = {"device_map": "auto"} if where == "auto" else {"device_map": disk, "offload_folder": tmp_path}
    packed, twin = made("qwen3_moe", 2, format=format)
    left, right = (load(path, experts_implementation="grouped_mm", **places) for path in (packed, twin))
    assert torch.equal(logits(left).cpu(), logits(right).cpu())


@pytest.mark.parametrize(("family", "format"), PAIRS)
def test_both_readers_give_what_the_model_decodes(made, family, format):
    packed, twin = made(family, 2, format=format)
    layers = read_config(json.loads((packed / "config.json").read_text())["quantization_config"])
    streamed = {layer.number: layer.experts().matrices() for layer in Checkpoint.open(str(packed)).layers()}
    with safe_open(packed / "model.safetensors", framework="pt") as file:
        for number, module in stock_experts(load(twin)).items():
            read = read_layer(file.get_tensor, layers[number])
            for matrix, weights in canonical(module).items():
                assert torch.equal(read[matrix], weights)
                assert torch.equal(streamed[number][matrix], weights)


def test_stock_transformers_without_us_raises(made):
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "try:\n    AutoModelForCausalLM.from_pretrained(sys.argv[1])\n    print('LOADED')\n"
        "except Exception as error:\n    print('RAISED', type(error).__name__)"
    )
    packed, _ = made("qwen3_moe", format="pair4")
    done = subprocess.run([sys.executable, "-c", code, str(packed)], capture_output=True, text=True)
    assert "RAISED" in done.stdout, done.stdout + done.stderr


PARTS = ["up_proj.packed_weight", "up_proj.packed_weight_low", "down_proj.packed_weight_group"]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_or_cut_tensor_is_named(made, tmp_path, part):
    packed, _ = made("qwen3_moe", format="pair6")
    name = f"model.layers.1.mlp.experts.2.{part}"
    with pytest.raises(FormatError, match=f"{name} is not in the checkpoint"):
        load(edited(packed, tmp_path / "x", lambda tensors: tensors.pop(name)))
    cut = {name: load_file(packed / "model.safetensors")[name][:31].clone()}
    path = edited(packed, tmp_path / "y", lambda tensors: tensors.update(cut))
    with pytest.raises(FormatError, match=rf"{name} is \[31, "):
        load(path)


@pytest.mark.parametrize("sizes", [None, *SIZES])
@pytest.mark.parametrize("format", FORMATS)
def test_kernels_run_them_by_name(made, format, sizes, device):
    packed, twin = made("qwen3_moe", 2, format=format, **SIZES.get(sizes, {}))
    found = logits(load(packed, experts_implementation="moefold").to(device))
    assert 0 < difference(found, logits(load(twin).to(device))) < TOLERANCE["logits"]


def test_where_no_kernel_can_run_them_is_said_once(made, caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    packed, _ = made("olmoe", format="pair4")
    implementation._say_once.cache_clear()
    implementation._ask.cache_clear()
    with caplog.at_level(logging.WARNING):
        model = load(packed)
        logits(model), logits(model)
    (said,) = [record.getMessage() for record in caplog.records if "decoded weights" in record.getMessage()]
    assert "compiles for CUDA devices" in said
    with pytest.raises(BackendError, match="compiles for CUDA devices"):
        logits(load(packed, experts_implementation="moefold"))
    implementation._ask.cache_clear()


TWO = """
import sys
import torch
import moefold_kernels.transformers
from transformers import AutoModelForCausalLM
try:
    outs = []
    for path in sys.argv[1:]:
        model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
        outs.append(model(torch.tensor([[5, 77, 130, 9, 200]])).logits)
    print("EQUAL" if torch.equal(*outs) else "DIFFERENT")
except moefold_kernels.FormatError as error:
    print("REFUSED", error)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("a_device_each")
@pytest.mark.parametrize(
    ("hidden", "inner", "word"),
    [
        (72, 128, "EQUAL"),  # by rows: 64 columns of down for each
        (64, 96, "REFUSED"),  # 48 of a group
        (128, 256, "EQUAL"),  # in bands: 128 columns
        (64, 256, "EQUAL"),  # down in bands, gate and up by rows
        (128, 128, "REFUSED"),  # 64 columns of what lies in steps of 128
        (64, 128, "REFUSED"),  # the same, of down alone
        (128, 64, "REFUSED"),  # 32 of a group; gate and up are in bands
        (128, 192, "REFUSED"),  # 96 columns, a group and a half
        (128, 384, "REFUSED"),  # three steps of down
    ],
)
def test_two_processes_split_what_can_be_or_refuse(made, tmp_path, hidden, inner, word):
    """What each rank gets of a band's words has to be whole columns."""
    (tmp_path / "run.py").write_text(TWO)
    packed, twin = made("mixtral", format="pair6", hidden_size=hidden, intermediate_size=inner)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "run.py"), str(twin), str(packed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.count(word) == 2, done.stdout + done.stderr[-3000:]
    assert word == "EQUAL" or "use fewer ranks" in done.stdout


def test_parallel_plans_name_every_part():
    plan = {"layers.*.mlp.experts.gate_up_proj": "packed_colwise", "layers.*.mlp.experts.down_proj": "rowwise"}
    styles = ours._packed_styles(plan)
    assert styles["layers.*.mlp.experts.gate_up_low"] == "packed_colwise"
    assert styles["layers.*.mlp.experts.down_group"] == "rowwise"
