"""GPTQ and rounding to nearest against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models import samples, tiny
from moefold import Checkpoint, Context, Layers, Provenance, Routed, Scheme, StreamedModel
from moefold.errors import InputError
from moefold_plugins.gptq import GroupCoder, SchemeCoder, coded, gptq, quantize_gptq
from moefold_plugins.quantize import dequantize, quantize
from moefold_plugins.save import save

CPU = Context(torch.device("cpu"), torch.Generator())


def nearest(weights: Tensor, bits: int, group: int) -> Tensor:
    """A matrix [rows, columns], each group of a row rounded to 2 ** bits values that zero is one of."""
    steps, out = 2**bits - 1, torch.empty_like(weights)
    for row, values in enumerate(weights):
        for start in range(0, len(values), group):
            part = values[start : start + group]
            low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            scale = float(torch.tensor((high - low) / steps).half()) or 1.0
            zero = min(max(round(-low / scale), 0), steps)
            out[row, start : start + group] = (((part / scale).round() + zero).clamp(0, steps) - zero) * scale
    return out


def compensated(weights: Tensor, moment: Tensor, bits: int, group: int) -> Tensor:
    """As published: U of the inverse, errors pushed to later columns, scales set when a group begins; float64."""
    upper = torch.linalg.cholesky(torch.linalg.inv(moment.double()), upper=True)
    work, out = weights.double().clone(), torch.empty_like(weights)
    for k in range(weights.shape[1]):
        if k % group == 0:
            coder = GroupCoder(bits, group, torch.float32)
            coder.open(k, work[:, k : k + group].T[None, None].float())
        out[:, k] = coder.code(k, work[:, k][None, None].float())[0, 0]
        work[:, k + 1 :] -= ((work[:, k] - out[:, k]) / upper[k, k])[:, None] * upper[k, k + 1 :]
    return out


@pytest.fixture
def case() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 8, generator=generator) @ torch.randn(8, 40, generator=generator)
    inputs += 0.3 * torch.randn(500, 40, generator=generator)
    return torch.randn(24, 40, generator=generator), inputs.T @ inputs / 500


def run(weights: Tensor, moment: Tensor | None, bits: int, block: int = 32) -> Tensor:
    given = None if moment is None else moment.clone()[None, None]
    return coded(weights.T[None, None], given, GroupCoder(bits, 16, weights.dtype), 1e-9, block)[0][0, 0].T


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nearest_is_the_nearest(case, bits):
    torch.testing.assert_close(run(case[0], None, bits), nearest(case[0], bits, 16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compensated_is_gptq(case, bits):
    weights, moment = case
    found, expected = run(weights, moment, bits), compensated(weights, moment, bits, 16)
    assert (found - expected).abs().lt(1e-5).float().mean() > 0.95  # float32 rounds a few to the other side
    error, plain = (
        float((((weights - read) @ moment) * (weights - read)).sum()) for read in (found, run(weights, None, bits))
    )
    assert error < 0.5 * plain


@pytest.mark.parametrize("block", [1, 20, 100])
def test_blocks_change_nothing_but_rounding(case, block):
    weights, moment = case
    assert (run(weights, moment, 3) - run(weights, moment, 3, block)).abs().lt(1e-5).float().mean() > 0.95


def test_rows_of_zeros_stay_zeros():
    assert not run(torch.zeros(3, 40), None, 2).any()


@pytest.mark.parametrize("compensate", [True, False])
def test_the_stage_gives_dense_experts_that_can_be_saved(tmp_path, compensate):
    source = Checkpoint.open(str(tiny("qwen3_moe", tmp_path / "source", num_hidden_layers=2)))
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(200, 64, generator=generator).bfloat16()
    index = torch.rand(200, 6, generator=generator).argsort(dim=1)[:, :2]
    routed = Routed(tokens[None], tokens, index, torch.rand(200, 2, generator=generator))
    context = Context(torch.device("cpu"), torch.Generator())
    made = {
        layer.number: gptq(layer, routed, layer.experts(), context, bits=3, group=32, compensate=compensate)
        for layer in source.layers()
    }
    assert made[0].figures["bits_per_weight"] == 4.0
    for expert, columns in ((0, made[0].gate_up[0]), (7, made[0].down[7])):
        assert max(len(part.unique()) for row in columns for part in row.split(32)) <= 8, expert
    save(source, Layers(made), None, Provenance("org/model", "f" * 64, ()), to=tmp_path / "out")
    again = Checkpoint.open(str(tmp_path / "out")).layers()[0].experts()
    assert torch.equal(again.gate_up, made[0].gate_up)
    assert torch.equal(again.down, made[0].down)


def test_asymmetric_down_loses_less_of_the_output(tmp_path):
    """Of each expert, over its own tokens."""
    layer = Checkpoint.open(str(tiny("gpt_oss", tmp_path / "source", num_hidden_layers=2))).layers()[0]
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(600, 64, generator=generator).bfloat16()
    index = torch.rand(600, 8, generator=generator).argsort(dim=1)[:, :2]
    routed = Routed(tokens[None], tokens, index, torch.rand(600, 2, generator=generator))
    context, own = Context(torch.device("cpu"), torch.Generator()), layer.experts()
    errors = []
    for asymmetric in (False, True):
        made = gptq(layer, routed, own, context, bits=2, group=32, asymmetric=asymmetric)
        off = [layer.output(made, e, tokens).float() - layer.output(own, e, tokens).float() for e in range(8)]
        errors.append([float(each[(index == e).any(dim=1)].square().mean()) for e, each in enumerate(off)])
    assert torch.tensor(errors[1]).sum() < 0.97 * torch.tensor(errors[0]).sum()
    with pytest.raises(InputError, match="drop asymmetric"):
        gptq(layer, routed, own, context, compensate=False, asymmetric=True)


@pytest.mark.parametrize("scheme", [Scheme("int4", 8), Scheme("int8")], ids=lambda scheme: scheme.title)
def test_what_a_scheme_stores_reads_as_it_was_coded(case, scheme):
    weights, moment = (part.bfloat16() for part in case)
    columns = weights.T[None, None]
    coder = SchemeCoder(scheme, columns)
    read = coded(columns, moment.float()[None, None], coder, 1e-2, 32)[0][0, 0].T
    again = scheme.dequantize(scheme.stored(read.float(), coder.scales()[0]))
    assert torch.equal(again, read)
    plain = scheme.dequantize(scheme.quantize(weights))
    error, nearest = (
        float((((weights - one).float() @ case[1]) * (weights - one).float()).sum()) for one in (again, plain)
    )
    assert error < 0.6 * nearest


def routed_tokens(experts: int) -> Routed:
    generator = torch.Generator().manual_seed(4)
    tokens = (torch.randn(400, 6, generator=generator) @ torch.randn(6, 64, generator=generator)).bfloat16()
    index = torch.rand(400, experts, generator=generator).argsort(dim=1)[:, :2]
    return Routed(tokens[None], tokens, index, torch.rand(400, 2, generator=generator))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("options", [{"scheme": "int4", "group": 32}, {"scheme": "int8"}], ids=["int4", "int8"])
def test_quantised_experts_load_in_stock_transformers_and_lose_less(tmp_path, family, options):
    sizes = {"intermediate_size": 64} if family == "mixtral" else {}
    source = Checkpoint.open(str(tiny(family, tmp_path / "source", num_hidden_layers=2, **sizes)))
    made = {}
    for layer in source.layers():
        own, routed = layer.experts(), routed_tokens(layer.expert_count)
        made[layer.number] = quantize_gptq(layer, routed, own, CPU, **options)
        reads = (dequantize(made[layer.number], CPU), dequantize(quantize(own, layer, **options), CPU))
        seen = [(routed.top_k_index == e).any(dim=1) for e in range(own.count)]
        losses = [
            sum(
                float((layer.output(read, e, x) - layer.output(own, e, x)).float().square().sum())
                for e, x in ((e, routed.tokens[rows]) for e, rows in enumerate(seen))
            )
            for read in reads
        ]
        assert losses[0] < 0.7 * losses[1]
    saved = save(source, Layers(made), None, Provenance("org/model", "f" * 64, ()), to=tmp_path / "out")
    assert saved.figures["expert_bytes"]["after"] == sum(value.bytes() for value in made.values())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ids = samples(3, 12)
    streamed = StreamedModel(Checkpoint.open(str(tmp_path / "out")), "cpu")
    hidden = streamed.embed(ids)
    for number in range(streamed.layer_count):
        with streamed.loaded(number):
            hidden = streamed.through(number, ids, hidden)
    with torch.no_grad():
        expected, logits = streamed.head(hidden).float(), model(ids).logits.float()
    assert (logits - expected).norm() / expected.norm() < 1e-2


def test_a_damping_that_had_to_be_raised_is_counted(tmp_path):
    layer = Checkpoint.open(str(tiny("qwen3_moe", tmp_path / "source", num_hidden_layers=2))).layers()[0]
    options = {"scheme": "int8", "damping": 1e-12, "blend": 0}
    raised = quantize_gptq(layer, routed_tokens(8), layer.experts(), CPU, **options).figures["raised"]
    assert set(raised["gate_up"]) == {str(e) for e in range(8)}, "tokens of six dimensions"
    ordinary = quantize_gptq(layer, routed_tokens(8), layer.experts(), CPU, scheme="int8").figures["raised"]
    assert ordinary == {"gate_up": {}, "down": {}}


def test_what_has_no_such_form_is_refused_before_anything_is_done(tmp_path):
    layer = Checkpoint.open(str(tiny("gpt_oss", tmp_path / "source", num_hidden_layers=2))).layers()[0]
    with pytest.raises(InputError, match=r"quantize\.gptq: these experts have biases"):
        quantize_gptq(layer, routed_tokens(8), layer.experts(), CPU, scheme="int4")
    layer = Checkpoint.open(str(tiny("qwen3_moe", tmp_path / "other", num_hidden_layers=2))).layers()[0]
    with pytest.raises(InputError, match="int8 has one scale for each row; drop group"):
        quantize_gptq(layer, routed_tokens(8), layer.experts(), CPU, scheme="int8", group=32)
