"""Quantised experts: their bytes and values, what save writes of them, and that stock readers and ours agree on it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from compressed_tensors.utils.match import is_match
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from models import samples, tiny
from moefold import Checkpoint, Context, Experts, Layers, Provenance, Quantized, Reduced, Scheme, StreamedModel
from moefold.errors import CheckpointError, FormatError, InputError
from moefold_plugins.evaluate import losses
from moefold_plugins.quantize import dequantize, quantize
from moefold_plugins.save import save

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3")
SCHEMES = {"fp8": {"scheme": "fp8"}, "int8": {"scheme": "int8"}, "int4": {"scheme": "int4", "group": 32}}
PROVENANCE = Provenance("org/model", "f" * 64, ({"id": "quantize", "uses": "quantize", "version": 1, "with": {}},))
CPU = Context(torch.device("cpu"), torch.Generator())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small checkpoints by family, made once."""
    made: dict[str, Checkpoint] = {}

    def source(family: str) -> Checkpoint:
        if family not in made:
            sizes = {"intermediate_size": 64} if family == "mixtral" else {}
            path = tiny(family, tmp_path_factory.mktemp(family) / "source", num_hidden_layers=2, **sizes)
            made[family] = Checkpoint.open(str(path))
        return made[family]

    return source


def layers(source: Checkpoint, **options) -> Layers[Quantized]:
    """Every layer, quantised when it is asked for."""
    return Layers(
        {layer.number: partial(lambda one: quantize(one.experts(), one, **options), layer) for layer in source.layers()}
    )


def twin(source: Checkpoint, quantized: Layers[Quantized]):
    """The stock model with what the quantised experts read."""
    model = AutoModelForCausalLM.from_pretrained(source.path)
    for number, value in quantized.items():
        (module,) = (m for n, m in model.named_modules() if f"layers.{number}." in n and hasattr(m, "is_concatenated"))
        experts = dequantize(value, CPU)
        module.gate_up_proj.data.copy_(experts.gate_up)
        module.down_proj.data.copy_(experts.down)
    return model


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_in_stock_transformers_and_here(sources, family, scheme, tmp_path):
    source, ids = sources(family), samples(3, 12)
    quantized = layers(source, **SCHEMES[scheme])
    saved = save(source, quantized, None, PROVENANCE, to=tmp_path / "out", shard_size="60KB")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    expected = logits(twin(source, quantized), ids)
    assert torch.equal(logits(model, ids), expected)
    assert not torch.equal(expected, logits(AutoModelForCausalLM.from_pretrained(source.path), ids))
    asked = CompressedTensorsConfig(dequantize=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=asked)
    assert torch.equal(logits(dense, ids), expected)
    out = Checkpoint.open(str(tmp_path / "out"))
    assert set(out.weight_map) == set(source.weight_map)
    loss = losses(out, {"text": ids}, torch.device("cpu"), 2)["text"]
    assert loss == pytest.approx(float(F.cross_entropy(expected[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())))
    assert saved.figures["needs_moefold"] is False


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_those_of_the_files(sources, scheme, tmp_path):
    source = sources("qwen3_moe")
    quantized = layers(source, **SCHEMES[scheme])
    saved = save(source, quantized, None, PROVENANCE, to=tmp_path / "out")
    weights, rows = 8 * 3 * 32 * 64, 8 * (32 + 32 + 64)  # of a layer: [32, 64] twice and [64, 32] for each expert
    groups = 8 * (2 * 32 * 64 + 64 * 32) // 32
    shapes = 8 * 3 * 2 * 8  # two int64 for each matrix
    promised = {
        "fp8": weights + 2 * rows,
        "int8": weights + 2 * rows + shapes,
        "int4": weights // 2 + 2 * groups + shapes,
    }
    assert quantized[0].bytes() == promised[scheme] == quantized[0].facts()["bytes"]
    assert saved.figures["expert_bytes"] == {"before": 2 * 2 * weights, "after": 2 * promised[scheme]}
    sizes = saved.figures["checkpoint_bytes"]
    assert sizes["before"] - sizes["after"] == 2 * (2 * weights - promised[scheme])


def test_the_card_says_who_loads_it(sources, tmp_path):
    source = sources("qwen3_moe")
    save(source, layers(source, scheme="fp8"), None, PROVENANCE, to=tmp_path / "stock")
    stock = (tmp_path / "stock" / "README.md").read_text()
    for part in ("Experts are fp8", "(and vLLM) by itself", "not in memory", "vLLM also rounds", "2 quantized"):
        assert part in stock
    assert "moefold_kernels" not in stock
    save(source, merged(source, scheme="int4", group=32), None, PROVENANCE, to=tmp_path / "ours")
    ours = (tmp_path / "ours" / "README.md").read_text()
    for part in ("int4 in groups of 32", "with moefold imported", "import moefold_kernels", "8 before, 4 after"):
        assert part in ours
    assert "vLLM" not in ours


def test_everything_else_keeps_names_and_bytes(sources, tmp_path):
    source = sources("deepseek_v3")
    save(source, layers(source, scheme="fp8"), None, PROVENANCE, to=tmp_path / "out")
    out = Checkpoint.open(str(tmp_path / "out"))
    replaced = {key for layer in source.layers() for key in layer.names().keys}
    for key in set(source.weight_map) - replaced:
        assert torch.equal(out.tensor(key), source.tensor(key))
    before, after = (json.loads((path / "config.json").read_text()) for path in (source.path, tmp_path / "out"))
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before


def test_only_routed_experts_are_named_as_quantised():
    (pattern,) = Scheme("int8").to_config()["ignore"]
    linear = torch.nn.Linear(1, 1)
    quantised = ("model.layers.0.mlp.experts.3.gate_proj", "model.layers.1.block_sparse_moe.experts.0.w1",
                 "model.layers.2.mlp.experts", "model.layers.2.mlp.experts.routed_experts.0.up_proj")  # fmt: skip
    others = ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate", "model.layers.0.mlp.down_proj",
              "model.layers.0.mlp.shared_experts.gate_proj", "model.layers.0.mlp.shared_expert_gate")  # fmt: skip
    assert not any(is_match(name, linear, pattern) for name in quantised)
    assert all(is_match(name, linear, pattern) for name in others)


@pytest.mark.parametrize(("scheme", "group", "bound"), [("fp8", None, 2**-4), ("int8", None, 0.5), ("int4", 32, 0.5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_the_nearest_of_the_scheme(scheme, group, bound, dtype):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    chosen = Scheme(scheme, group)
    stored = chosen.quantize(weight)
    assert set(stored) == set(chosen.ends)
    read = chosen.dequantize(stored)
    assert read.dtype == stored["weight_scale"].dtype == dtype
    assert not read[3].any()
    scale = stored["weight_scale"].float().repeat_interleave(group or 64, dim=1)
    error = (read.float() - weight.float()).abs()
    if scheme == "fp8":  # three bits of fraction; below the smallest normal number, steps of 2**-9
        step = torch.maximum(weight.float().abs() * bound, 2**-10 * scale)
    else:
        step = bound * scale
        most = (2 ** (int(scheme[3:]) - 1) - 1) * scale  # a scale spans the largest weight to half a step
        step = torch.maximum(step, weight.float().abs() - most)
    assert (error <= step * 1.001 + read.float().abs() * torch.finfo(dtype).eps).all()
    if scheme != "fp8":
        assert (error > 0.45 * scale).any()


def test_dequantised_experts_serve_the_next_layer(sources):
    source, ids = sources("olmoe"), samples(2, 9)
    value = quantize(source.layer(0).experts(), source.layer(0), scheme="int8")
    model = StreamedModel(source)
    hidden = model.embed(ids)
    with model.loaded(0, dequantize(value, CPU)):
        found = model.through(0, ids, hidden)
    reference = twin(source, Layers({0: value}))
    with torch.no_grad():
        expected = reference(ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(found, expected)


def test_an_artifact_comes_back_from_the_store(sources, tmp_path):
    layer = sources("olmoe").layer(0)
    value = quantize(layer.experts(), layer, scheme="fp8")
    value.save(tmp_path / "one")
    back = Quantized.load(tmp_path / "one")
    assert (back.scheme, back.group, back.route, back.count) == ("fp8", None, None, 8)
    assert all(torch.equal(back.tensors[name].float(), tensor.float()) for name, tensor in value.tensors.items())


ROUTE = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


def merged(source: Checkpoint, **options) -> Layers[Quantized]:
    """The first four experts in place of all, quantised."""
    few = {layer.number: replace(first_four(layer.experts()), route=ROUTE) for layer in source.layers()}
    return Layers({number: quantize(experts, source.layer(number), **options) for number, experts in few.items()})


def repeated(source: Checkpoint, **options) -> Layers[Quantized]:
    """The same for readers without routes."""
    all_ = {layer.number: repeat(first_four(layer.experts()), ROUTE) for layer in source.layers()}
    return Layers({number: quantize(experts, source.layer(number), **options) for number, experts in all_.items()})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_experts_quantised_once_and_led_to_by_a_route(sources, family, scheme, tmp_path):
    source, ids = sources(family), samples(2, 9)
    quantized = merged(source, **SCHEMES[scheme])
    saved = save(source, quantized, None, PROVENANCE, to=tmp_path / "out", shard_size="60KB")
    assert saved.figures["expert_bytes"]["after"] == sum(quantized[number].bytes() for number in quantized)
    assert (saved.figures["needs_moefold"], saved.figures["kinds"]) == (True, {"merged": len(quantized)})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    expected = logits(twin(source, repeated(source, **SCHEMES[scheme])), ids)
    assert torch.equal(logits(model, ids), expected)
    out = Checkpoint.open(str(tmp_path / "out"))
    assert out.layers()[0].experts().route is not None
    loss = losses(out, {"text": ids}, torch.device("cpu"), 2)["text"]
    assert loss == pytest.approx(float(F.cross_entropy(expected[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())))
    model.save_pretrained(tmp_path / "again")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again, ids), expected)
    with pytest.raises(InputError, match="is quantised already"):
        save(out, Layers({}), None, PROVENANCE, to=tmp_path / "third")


def test_stock_transformers_refuses_merged_experts(sources, tmp_path):
    source, places = sources("qwen3_moe"), [str(tmp_path / name) for name in SCHEMES]
    for place, options in zip(places, SCHEMES.values(), strict=True):
        save(source, merged(source, **options), None, PROVENANCE, to=place)
    code = """
import sys
from transformers import AutoModelForCausalLM
for place in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(place)
    except Exception as error:
        print("raises", type(error).__name__)
    else:
        print("loads")
print("moefold_kernels" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["raises RuntimeError"] * 3 + ["False"]


def test_merged_experts_quantised_once_and_repeated(sources, tmp_path):
    source, ids = sources("qwen3_moe"), samples(2, 9)
    few, many = merged(source, scheme="int4", group=16), repeated(source, scheme="int4", group=16)
    saved = save(source, few, None, PROVENANCE, to=tmp_path / "out", export="expanded")
    assert saved.figures["kinds"] == {"expanded": 2}
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), logits(twin(source, many), ids)
    )
    assert saved.figures["expert_bytes"]["after"] == sum(many[number].bytes() for number in many)


@pytest.mark.parametrize("family", FAMILIES[:3])  # DeepSeek's groups of two cannot spare one
def test_pruned_experts_quantised(sources, family, tmp_path):
    source, ids = sources(family), samples(2, 9)
    route, kept = torch.tensor([-1, 0, 1, -1, 2, -1, -1, 3]), [1, 2, 4, 7]
    few = {n: Reduced(e.gate_up[kept], e.down[kept], route=route, groups=[[i] for i in kept])
           for n, e in ((layer.number, layer.experts()) for layer in source.layers())}  # fmt: skip
    quantized = Layers(
        {number: quantize(experts, source.layer(number), scheme="int4", group=32) for number, experts in few.items()}
    )
    saved = save(source, quantized, None, PROVENANCE, to=tmp_path / "out")
    assert (saved.figures["needs_moefold"], saved.figures["kinds"]) == (False, {"pruned": len(quantized)})
    read = {number: dequantize(quantized[number], CPU) for number in quantized}
    dense = {number: replace(few[number], gate_up=one.gate_up, down=one.down) for number, one in read.items()}
    save(source, Layers(dense), None, PROVENANCE, to=tmp_path / "dense")
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "dense"))
    assert torch.equal(logits(one, ids), logits(other, ids))
    first, second = (losses(Checkpoint.open(str(tmp_path / name)), {"text": ids}, torch.device("cpu"), 2)
                     for name in ("out", "dense"))  # fmt: skip
    assert first == second


def first_four(experts: Experts) -> Experts:
    return replace(experts, gate_up=experts.gate_up[:4], down=experts.down[:4])


def repeat(experts: Experts, route: torch.Tensor) -> Experts:
    return replace(experts, gate_up=experts.gate_up[route], down=experts.down[route])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int4"}, "rows of 64 weights do not divide into int4 in groups of 128; write group: 32"),
        ({"scheme": "int4", "group": 64}, "rows of 32 weights .* write group: 32"),
        ({"scheme": "int8", "group": 32}, "int8 has one scale for each row; drop group"),
    ],
)
def test_sizes_that_do_not_divide(sources, options, message):
    with pytest.raises(InputError if "drop" in message else FormatError, match=message):
        quantize(sources("qwen3_moe").layer(0).experts(), sources("qwen3_moe").layer(0), **options)


def test_no_group_works():
    with pytest.raises(
        FormatError, match="rows of 12 weights do not divide into int4 in groups of 8; write scheme: fp8"
    ):
        Scheme("int4", 8).quantize(torch.ones(4, 12))


def test_weights_that_are_not_finite():
    with pytest.raises(FormatError, match="not finite"):
        Scheme("fp8").quantize(torch.tensor([[1.0, float("nan")]]))


def test_fused_experts_with_biases_are_refused(tmp_path):
    source = Checkpoint.open(str(tiny("gpt_oss", tmp_path / "source", num_hidden_layers=2)))
    with pytest.raises(InputError, match="biases"):
        quantize(source.layer(0).experts(), source.layer(0), scheme="fp8")


def test_fused_experts_are_refused_before_save(tmp_path):
    source = Checkpoint.open(str(tiny("granitemoe", tmp_path / "source", num_local_experts=8, num_hidden_layers=2)))
    with pytest.raises(InputError, match="all experts of a layer in one tensor"):
        quantize(source.layer(0).experts(), source.layer(0), scheme="fp8")


def test_layers_in_different_schemes_are_refused(sources, tmp_path):
    source = sources("olmoe")
    one, two = (quantize(source.layer(n).experts(), source.layer(n), scheme=s) for n, s in ((0, "fp8"), (1, "int8")))
    for mixed in (Layers({0: one}), Layers({0: one, 1: two})):
        with pytest.raises(FormatError, match="quantise all layers alike"):
            save(source, mixed, None, PROVENANCE, to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_checkpoint_is_not_compressed_further(sources, tmp_path):
    source = sources("olmoe")
    save(source, layers(source, scheme="int8"), None, PROVENANCE, to=tmp_path / "out")
    out = Checkpoint.open(str(tmp_path / "out"))
    assert out.quantized == Scheme("int8")
    with pytest.raises(InputError, match="is quantised already"):
        save(out, layers(out, scheme="fp8"), None, PROVENANCE, to=tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not known"),
        (lambda entry: entry.update(transform_config={"a": 1}), "transform_config is not known"),
        (lambda entry: entry.update(quantization_status="frozen"), "status compressed"),
        (lambda entry: entry["config_groups"].update(group_1={}), "not one config group"),
        (lambda entry: entry["config_groups"]["group_0"]["weights"].update(symmetric=False), "moefold reads"),
        (lambda entry: entry["config_groups"]["group_0"]["weights"].update(strategy="tensor"), "moefold reads"),
        (lambda entry: entry["config_groups"]["group_0"]["weights"].update(num_bits=6), "moefold reads"),
        (lambda entry: entry["config_groups"]["group_0"].update(format="int-quantized"), "moefold reads"),
        (lambda entry: entry.update(quant_method="gptq"), "already quantised by gptq"),
    ],
)
def test_other_quantisations_are_refused(sources, change, message, tmp_path):
    source = sources("olmoe")
    save(source, layers(source, scheme="int8"), None, PROVENANCE, to=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(str(tmp_path / "out"))


def test_a_lost_part_is_named(sources, tmp_path):
    source = sources("olmoe")
    save(source, layers(source, scheme="int8"), None, PROVENANCE, to=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] = Scheme("fp8").to_config()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight_scale has no model.*\.weight beside it"):
        Checkpoint.open(str(tmp_path / "out"))
