"""Compensated merges of unusual layers: starved experts, odd numbers, every expert chosen, biases, merged before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from merged_layers import IDS, load, logits, stream
from torch import Tensor

from models import tiny
from moefold import Checkpoint, Context, Experts, Groups, Layer, Layers, Provenance, Reduced, Routed, StreamedModel
from moefold.codec import pack, unpack
from moefold_plugins.align import align
from moefold_plugins.calibrate import observe
from moefold_plugins.codecs import Exponent
from moefold_plugins.compensated import compensated
from moefold_plugins.neurons import reorder
from moefold_plugins.pairing import pair_by_error
from moefold_plugins.puzzlemoe import puzzlemoe
from moefold_plugins.save import save

CONTEXT = Context(torch.device("cpu"), torch.Generator())
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    """Small checkpoints, made once each."""
    made: dict[tuple, Checkpoint] = {}

    def checkpoint(family: str, **settings: int) -> Checkpoint:
        key = (family, *settings.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("source") / "m"
            made[key] = Checkpoint.open(str(tiny(family, folder, num_hidden_layers=2, **settings)))
        return made[key]

    return checkpoint


def tokens_to(index: Tensor, hidden: int = 64) -> Routed:
    """Tokens that have much in common, routed as `index` [token, top_k] says."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(len(index), hidden, generator=generator) @ torch.randn(hidden, hidden, generator=generator)
    tokens = (tokens / 8).bfloat16()
    return Routed(tokens[None], tokens, index, torch.rand(index.shape, generator=generator) + 0.1)


def chosen(count: int, experts: int, top_k: int) -> Tensor:
    return torch.rand(count, experts, generator=torch.Generator().manual_seed(5)).argsort(dim=1)[:, :top_k]


def outputs(layer: Layer, experts: Experts, routed: Routed) -> Tensor:
    """What the experts add to the layer, [token, hidden] float32."""
    total = torch.zeros(routed.tokens.shape, dtype=torch.float32)
    reached = routed.reaches(experts)
    for expert in range(experts.count):
        gates = (routed.top_k_weights * (reached == expert)).sum(dim=1)
        total += layer.output(experts, expert, routed.tokens).float() * gates[:, None]
    return total


def merged_and_read(layer: Layer, routed: Routed, pairs: Groups, **options: object) -> tuple[Experts, dict]:
    merge = compensated(layer, routed, layer.experts(), pairs, None, CONTEXT, **options)
    return unpack(Exponent(), pack(Exponent(), merge), layer, CONTEXT.device), merge.figures


def error(layer: Layer, routed: Routed, experts: Experts) -> float:
    """Squared error of the layer's experts, in units of what they gave."""
    before = outputs(layer, layer.experts(), routed)
    return float((outputs(layer, experts, routed) - before).square().sum() / before.square().sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("neurons", ["matched", "natural"])
def test_every_family_is_merged_for_less_than_its_outputs(source, family, neurons):
    layer, routed = source(family).layers()[0], tokens_to(chosen(600, 8, 2))
    experts, _ = merged_and_read(layer, routed, Groups([[0, 3], [5, 1]], [2, 4, 6, 7]), neurons=neurons)
    assert 0 < error(layer, routed, experts) < 0.35


def test_what_the_report_says_outputs_lose_is_what_they_lose(source):
    layer, routed = source("qwen3_moe").layers()[0], tokens_to(chosen(600, 8, 2))
    pairs = Groups([[0, 3], [5, 1], [2, 4], [6, 7]], [])
    experts, figures = merged_and_read(layer, routed, pairs, blend=0.0)
    own = layer.experts()
    for pair, losses in zip(pairs.members, figures["damage"]["output"], strict=True):
        for expert, loss in zip(pair, losses, strict=True):
            hits = routed.top_k_index == expert
            rows, gates = hits.any(dim=1), (routed.top_k_weights * hits).sum(dim=1)
            off = (
                layer.output(experts, expert, routed.tokens).float() - layer.output(own, expert, routed.tokens).float()
            )
            expected = (off * gates[:, None])[rows].square().sum(dim=1).mean()
            assert loss == pytest.approx(float(expected), rel=0.05)


@pytest.mark.parametrize("together", [True, False])
def test_what_the_layer_is_said_to_have_lost_is_what_its_output_lost(source, together):
    """Of each token, all its experts together; as of independent ones where down is not coded once more."""
    layer = source("qwen3_moe").layers()[0]
    routed = tokens_to(chosen(400, layer.expert_count, 2))
    pairs = Groups([[0, 5], [3, 1], [2, 7]], [4, 6])
    merged, figures = merged_and_read(layer, routed, pairs, together=together, blend=0)
    off = (outputs(layer, merged, routed) - outputs(layer, layer.experts(), routed)).norm(dim=1)
    found = figures["lost"]
    if together:
        assert found == pytest.approx(float(off.mean()), rel=0.02)
    else:
        assert found == pytest.approx(float(off.square().mean().sqrt()), rel=0.15)


def test_an_expert_of_one_token_and_one_of_none(source):
    index = chosen(300, 6, 2)
    index[7] = torch.tensor([6, 0])
    layer, routed = source("qwen3_moe").layers()[0], tokens_to(index)
    for blend in (1024.0, 0.0):
        experts, figures = merged_and_read(layer, routed, Groups([[0, 6], [1, 7]], [2, 3, 4, 5]), blend=blend)
        assert figures["tokens"]["6"] == 1
        assert figures["unseen"] == [7]
        assert error(layer, routed, experts) < 0.35
        assert bool(experts.gate_up.isfinite().all())


def test_an_odd_number_of_experts_and_every_one_chosen(source):
    layer = source("qwen3_moe", num_experts=7, num_experts_per_tok=7).layers()[0]
    routed = tokens_to(chosen(300, 7, 7))
    pairs = pair_by_error(layer, routed, layer.experts(), CONTEXT)
    assert (len(pairs.members), len(pairs.alone)) == (3, 1)
    experts, figures = merged_and_read(layer, routed, pairs)
    assert set(figures["tokens"].values()) == {300}
    assert torch.equal(experts.down[pairs.alone], layer.experts().down[pairs.alone])
    assert error(layer, routed, experts) < 0.35


def test_moments_without_a_factor_are_damped_further_and_named(source):
    """Four tokens span four of 64 directions, and rounding makes some of the others negative."""
    index = chosen(300, 6, 2)
    index[index == 5] = 4
    index[:4] = torch.tensor([5, 0])
    layer, routed = source("qwen3_moe").layers()[0], tokens_to(index)
    experts, figures = merged_and_read(layer, routed, Groups([[0, 5]], [1, 2, 3, 4, 6, 7]), blend=0.0, damping=1e-13)
    assert figures["raised"]["gate_up"]["5"] > 0
    assert bool(experts.gate_up.isfinite().all())
    assert bool(experts.down.isfinite().all())


def test_equal_experts_with_other_biases_are_merged_without_loss(source):
    """gpt-oss: neurons change places, and each expert's biases go along."""
    layer, routed = source("gpt_oss").layers()[0], tokens_to(chosen(400, 8, 2))
    own = layer.experts()
    for stack in (own.gate_up, own.down):
        stack[6] = stack[2]
    reorder(own, 6, torch.randperm(own.inner, generator=torch.Generator().manual_seed(2)))
    merge = compensated(layer, routed, own, Groups([[2, 6]], [0, 1, 3, 4, 5, 7]), None, CONTEXT)
    assert merge.figures["matched"] == [True]
    assert not torch.equal(merge.biases["gate_up_bias"][2], own.gate_up_bias[2])
    read = unpack(Exponent(), pack(Exponent(), merge), layer, CONTEXT.device)
    torch.testing.assert_close(outputs(layer, read, routed), outputs(layer, own, routed), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_what_is_saved_is_what_was_merged(source, tmp_path, family):
    """With neurons in another order, as transformers reads it, and as our own reader does."""
    checkpoint, routed = source(family), tokens_to(chosen(400, 8, 2))
    pairs, packed, read = Groups([[0, 3], [5, 1]], [2, 4, 6, 7]), {}, {}
    for layer in checkpoint.layers():
        merge = compensated(layer, routed, layer.experts(), pairs, None, CONTEXT)
        packed[layer.number] = pack(Exponent(), merge)
        read[layer.number] = unpack(Exponent(), packed[layer.number], layer, CONTEXT.device)
    save(checkpoint, Layers(packed), None, Provenance("org/model", "f" * 64, ()), to=tmp_path / "out")
    model = StreamedModel(checkpoint)
    hidden = model.embed(IDS)
    for number in range(model.layer_count):
        with model.loaded(number, read.get(number)):
            hidden = model.through(number, IDS, hidden)
    torch.testing.assert_close(logits(load(tmp_path / "out")), model.head(hidden), rtol=0.02, atol=0.02)
    assert torch.equal(stream(tmp_path / "out"), model.head(hidden))
    for layer in Checkpoint.open(str(tmp_path / "out")).layers():
        again = layer.experts()
        for name, wanted in vars(read[layer.number]).items():
            assert not isinstance(wanted, Tensor) or torch.equal(getattr(again, name), wanted), name


def test_experts_merged_before_keep_their_route(source):
    layer, routed = source("gpt_oss").layers()[0], tokens_to(chosen(400, 8, 2))
    own = layer.experts()
    index = [0, 1, 2, 3]
    before = Reduced(
        own.gate_up[index], own.down[index], own.gate_up_bias[index], own.down_bias[index], own.gated,
        torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]),
    )  # fmt: skip
    merge = compensated(layer, routed, before, Groups([[0, 2], [1, 3]], []), None, CONTEXT)
    read = unpack(Exponent(), pack(Exponent(), merge), layer, CONTEXT.device)
    assert merge.route == before.route.tolist()
    assert sum(merge.figures["tokens"].values()) <= 2 * len(routed.tokens)
    off = outputs(layer, read, routed) - outputs(layer, before, routed)
    assert float(off.square().sum()) < 0.35 * float(outputs(layer, before, routed).square().sum())


def test_aligned_experts_keep_their_biases_when_packed(source):
    """By the published rule, too: neurons in another order are nothing without their biases."""
    layer, routed = source("gpt_oss").layers()[0], tokens_to(chosen(400, 8, 2))
    own, pairs = layer.experts(), Groups([[0, 3], [5, 1]], [2, 4, 6, 7])
    aligned = align(own, pairs, CONTEXT)
    assert not torch.equal(aligned.gate_up_bias, own.gate_up_bias)
    merge = puzzlemoe(aligned, pairs, observe(layer, routed, aligned, CONTEXT), CONTEXT)
    read = unpack(Exponent(), pack(Exponent(), merge), layer, CONTEXT.device)
    assert torch.equal(read.gate_up_bias, aligned.gate_up_bias)
    assert pack(Exponent(), puzzlemoe(own, pairs, observe(layer, routed, own, CONTEXT), CONTEXT)).biases == {}


@pytest.mark.parametrize("dead", [9, 32])
def test_neurons_that_never_fire(source, dead):
    """As of a ReLU, or padding: no error in their columns of down costs anything, in either expert of a pair."""
    layer = source("qwen3_moe").layers()[0]
    own = layer.experts()
    gate_up = own.gate_up.clone()
    gate_up[:, :dead] = 0  # rows of gate
    experts, routed = replace(own, gate_up=gate_up), tokens_to(chosen(300, 8, 2))
    pairs = pair_by_error(layer, routed, experts, CONTEXT)
    assert len(pairs.members) == 4
    assert pairs.costs is not None
    assert pairs.costs.isfinite().all()
    merged = compensated(layer, routed, experts, pairs, None, CONTEXT)
    assert all(bool(part.isfinite().all()) for part in merged.magnitude.values())
    assert torch.tensor(merged.figures["damage"]["output"]).isfinite().all()
