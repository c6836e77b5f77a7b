"""`moefold` in transformers: near the dense twin, taken by default where kernels can, never replaced in silence."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from layers import TOLERANCE, difference
from packing import stock_experts
from test_module import LAYOUTS, filled, layer, stock
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import moefold_kernels.transformers as ours
from moefold_kernels import BackendError, implementation
from moefold_kernels.module import PackedModule, pack_module
from moefold_kernels.places import tables
from moefold_kernels.triton.backend import Triton

pytest.importorskip("triton")

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
IDS = torch.tensor([[5, 77, 130], [8, 250, 17]])


@pytest.fixture(autouse=True)
def nothing_asked_yet():
    """Each test asks the backend anew, and is told anew."""
    yield
    implementation._ask.cache_clear()
    implementation._say_once.cache_clear()


@pytest.fixture
def no_kernels(monkeypatch):
    """A machine whose devices the kernels do not take."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def load(path, device="cpu", **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).to(device)


@torch.no_grad()
def logits(model):
    return model(IDS.to(model.device)).logits.cpu()


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == implementation.__name__]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_near_the_twins(made, family, device):
    packed, twin = made(family, 2)
    model = load(packed, device, experts_implementation="moefold")
    assert {m.known_activation.name for m in model.modules() if isinstance(m, PackedModule)} == {
        "clamped" if family == "gpt_oss" else "silu"
    }
    assert 0 < difference(logits(model), logits(load(twin, device))) < TOLERANCE["logits"]


def test_an_activation_that_is_not_fused(made, device):
    packed, twin = made("qwen3_moe", 2, hidden_act="gelu")
    model = load(packed, device, experts_implementation="moefold")
    assert stock_experts(model)[0].known_activation.name == "other"
    assert 0 < difference(logits(model), logits(load(twin, device))) < TOLERANCE["logits"]


def test_another_dtype(made, device):
    """Experts alone are float32 then, and computed with as bf16."""
    packed, twin = made("gpt_oss", 2)
    model = load(packed, device, experts_implementation="moefold", dtype=torch.float32)
    found = logits(model)
    assert found.dtype == torch.float32
    assert 0 < difference(found, logits(load(twin, device, dtype=torch.float32))) < TOLERANCE["logits"]


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize(("gate", "transposed", "joined"), LAYOUTS)
def test_every_layout(gate, transposed, joined, activation, device):
    module = stock(gate, transposed, joined)
    module.act_fn = {"silu": F.silu, "relu": F.relu}[activation]
    pack_module(module, layer(gate), "here")
    filled(module).requires_grad_(False).to(device)
    arguments = (
        torch.randn(4, 8).bfloat16().to(device),
        torch.tensor([[0, 1], [2, 4], [3, 0], [1, 2]]).to(device),
        torch.rand(4, 2).to(device),
    )
    right = module(*arguments)
    module.config._experts_implementation = "moefold"
    assert 0 < difference(module(*arguments), right) < TOLERANCE["logits"]


def test_by_default_where_kernels_can(made, device, monkeypatch, caplog):
    packed, _ = made("mixtral", 2)
    named = logits(load(packed, device, experts_implementation="moefold"))
    implementation._ask.cache_clear()
    if device.type == "cpu":  # a CPU stands for a GPU
        monkeypatch.setattr(implementation, "Triton", lambda interpret: Triton(interpret=True))
    model = load(packed)
    assert model.config._experts_implementation == "moefold"
    assert torch.equal(logits(model.to(device)), named)
    assert not warnings(caplog)


def test_by_default_where_kernels_cannot(made, no_kernels, caplog):
    """The stock implementation, said once for all layers and calls, with the reason."""
    packed, twin = made("mixtral", 2)
    model, dense = load(packed), load(twin)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(logits(model), logits(dense))
    (said,) = warnings(caplog)
    assert said == (
        "MixtralExperts: grouped_mm over decoded weights, because moefold cannot: "
        "compiles for CUDA devices, not for cpu"
    )


@pytest.mark.parametrize("sizes", [{"hidden_size": 36}, {"moe_intermediate_size": 20}])
def test_sizes_that_grouped_mm_refuses(made, no_kernels, caplog, sizes):
    """The loop over experts stands in for the stock default, which torch would refuse; in the message and in fact."""
    packed, twin = made("qwen3_moe", 2, **sizes)
    model, dense = load(packed), load(twin, experts_implementation="eager")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(model), logits(dense))
    (said,) = warnings(caplog)
    assert said.startswith("Qwen3MoeExperts: eager over decoded weights, because moefold cannot: ")
    named = load(packed, experts_implementation="moefold")
    with pytest.raises(BackendError, match=r'Name another one: model.set_experts_implementation\("eager"\)'):
        logits(named)
    stock = model.dequantize()
    assert stock.config._experts_implementation == "eager"
    assert torch.equal(logits(stock), logits(dense))
    assert torch.equal(logits(model.float()), logits(dense.float()))


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_a_named_implementation_is_taken(made, name, caplog):
    packed, twin = made("qwen3_moe", 2)
    model, dense = (load(path, experts_implementation=name) for path in (packed, twin))
    assert model.config._experts_implementation == name
    assert torch.equal(logits(model), logits(dense))
    later = load(packed)
    later.set_experts_implementation(name)
    assert torch.equal(logits(later), logits(dense))
    assert not warnings(caplog)


def test_named_and_impossible_is_an_error(made, no_kernels):
    model = load(made("qwen3_moe")[0], experts_implementation="moefold")
    with pytest.raises(BackendError, match=r"cannot run Qwen3MoeExperts: compiles for CUDA.*grouped_mm"):
        logits(model)


def test_dense_models_are_refused_by_name(made):
    model = load(made("qwen3_moe")[1], experts_implementation="moefold")
    with pytest.raises(BackendError, match="Qwen3MoeExperts is not packed"):
        logits(model)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [("has_post_expert_norm", "each expert's output is normalised"), ("_is_expert_parallel", "expert parallelism")],
)
def test_modules_that_the_kernels_do_not_cover(flag, reason, caplog):
    module = stock(True, False, True)
    pack_module(module, layer(), "here")
    filled(module)
    arguments = torch.randn(2, 8).bfloat16(), torch.tensor([[0, 1], [2, 4]]), torch.rand(2, 2)
    module.config._experts_implementation = "moefold"
    setattr(module, flag, True)
    module.post_expert_norm = torch.nn.Identity()
    with pytest.raises(BackendError, match=reason), torch.no_grad():
        module(*arguments)
    module.fallback = "batched_mm"
    with torch.no_grad():
        found = module(*arguments)
    assert reason in warnings(caplog)[0]
    module.config._experts_implementation = "batched_mm"
    assert torch.equal(module(*arguments), found)


def test_gradients_pass_by_default_and_are_refused_by_name(made, device, monkeypatch, caplog):
    packed, _ = made("qwen3_moe")
    monkeypatch.setattr(implementation, "Triton", lambda interpret: Triton(interpret=True))
    model = load(packed, device)
    model(IDS.to(device)).logits.float().sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert "the kernels have no gradient" in warnings(caplog)[0]
    named = load(packed, device, experts_implementation="moefold")
    with pytest.raises(BackendError, match="no gradient"):
        named(IDS.to(device)).logits.float().sum().backward()


def test_packed_and_stock_layers_mix(made, device):
    packed, twin = made("mixtral", 2, (1,))
    model = load(packed, device, experts_implementation="moefold")
    assert [isinstance(module, PackedModule) for module in stock_experts(model).values()] == [False, True]
    assert 0 < difference(logits(model), logits(load(twin, device))) < TOLERANCE["logits"]


def test_tables_are_where_the_module_is(made, device):
    model = load(made("mixtral", 2)[0], experts_implementation="moefold")
    module = stock_experts(model)[1]
    right = tables(module.packed_layer.pairs, module.packed_layer.dense)
    assert not {"places", "placed", "dtype_like"} & set(module.state_dict())
    for moved in (module, copy.deepcopy(module), module.to(torch.float16), module.to(device)):
        assert all(torch.equal(a.cpu(), b) for a, b in zip((moved.places, moved.placed), right, strict=True))
        assert moved.places.device == moved.gate_up_packed.device
    assert module.places.dtype == torch.int32
    emptied = module.to("meta").to_empty(device=device)
    assert all(torch.equal(a.cpu(), b) for a, b in zip((emptied.places, emptied.placed), right, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are compiled for it, and not interpreted")
def test_offloaded_to_disk(made, tmp_path):
    packed, twin = made("qwen3_moe", 2)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        packed, device_map=places, offload_folder=tmp_path, offload_buffers=True, experts_implementation="moefold"
    )
    assert difference(logits(model), logits(load(twin))) < TOLERANCE["logits"]


def test_generate(made, device):
    model = load(made("qwen3_moe")[0], device, experts_implementation="moefold")
    out = model.generate(IDS.to(device), max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out.shape == (2, 5)


@pytest.mark.parametrize("format", ["exponent", "pair6"])
def test_compiled_whole(made, format, device):
    sizes = {"num_hidden_layers": 1, "hidden_size": 128, "moe_intermediate_size": 64}
    model = load(made("qwen3_moe", 2, format=format, **sizes)[0], device, experts_implementation="moefold")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert difference(logits(compiled), logits(model)) < TOLERANCE["logits"]


def test_dequantised_and_saved_models_are_stock(made, tmp_path):
    model = load(made("qwen3_moe")[0])
    model.save_pretrained(tmp_path)
    assert "moefold" not in str({**json.loads((tmp_path / "config.json").read_text()), "quantization_config": None})
    assert model.dequantize().config._experts_implementation == "grouped_mm"
    logits(model)


def test_what_a_part_names_is_kept():
    """A model of several parts: each that named nothing takes `moefold`."""
    config = AutoConfig.for_model("qwen3_vl_moe")
    config.text_config._experts_implementation_internal = "eager"
    quantizer = ours.MoefoldQuantizer(ours.MoefoldConfig(layers={"0": layer().to_json()}))
    quantizer.update_attn_implementation(config)
    assert config._experts_implementation == "moefold"
    assert config.text_config._experts_implementation == "eager"
    assert config.vision_config._experts_implementation == "moefold"


def test_registering_twice_is_harmless():
    implementation.register()
    implementation.register()
