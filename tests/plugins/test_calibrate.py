"""Calibration against the fully loaded stock model: what enters each layer's experts, and its counts and norms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import samples, tiny
from moefold import Activity, Checkpoint, Context, Experts, Routed, Text
from moefold_plugins.calibrate import forward, observe
from moefold_plugins.evaluate import losses

CONTEXT = Context(torch.device("cpu"), torch.Generator())
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(str(tiny(request.param, tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def text() -> Text:
    return Text("random", samples(6, 24).int())


def stock_entries(model, ids: torch.Tensor) -> dict[int, tuple]:
    """What enters each experts module of the stock model, all samples in batches as `forward` takes them."""
    found: dict[int, list[tuple]] = {}
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args, n=n: found.setdefault(n, []).append(args))
        for n, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts")
    ]
    with torch.no_grad():
        for part in ids.split(4):
            model(input_ids=part.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {n: tuple(torch.cat(parts) for parts in zip(*calls, strict=True)) for n, calls in found.items()}


def walk(checkpoint: Checkpoint, text: Text, experts: dict[int, Experts] | None = None) -> dict[int, Routed]:
    """The stage `forward` over all layers, as the runner would call it."""
    routed: dict[int, Routed] = {}
    before = merged = None
    for layer in checkpoint.layers():
        before = forward(layer, text, before, merged, CONTEXT, batch=4)
        merged = (experts or {}).get(layer.number) or layer.experts()
        routed[layer.number] = before
    return routed


def test_what_enters_is_bit_equal(checkpoint: Checkpoint, text: Text) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto")
    expected = stock_entries(model, text.tokens)
    routed = walk(checkpoint, text)
    assert list(routed) == list(expected)
    for number, one in routed.items():
        for found, stock in zip((one.tokens, one.top_k_index, one.top_k_weights), expected[number], strict=True):
            assert torch.equal(found, stock)


def test_counts_and_norms_by_hand(checkpoint: Checkpoint, text: Text) -> None:
    routed = walk(checkpoint, text)
    layer = checkpoint.layers()[-1]
    one, experts = routed[layer.number], layer.experts()
    found = observe(layer, one, experts, CONTEXT, minimum=1)
    for e in range(experts.count):
        mine = (one.top_k_index == e).any(dim=1)
        assert int(found.tokens[e]) == int(mine.sum())
        if not mine.any():
            assert e in found.starved
            continue
        x = one.tokens[mine].double()
        assert torch.allclose(found.input_norm[e].double(), x.norm(dim=0), rtol=1e-4)
        inner = hidden(checkpoint, experts, e, x).norm(dim=0)
        assert torch.allclose(found.inner_norm[e].double(), inner, rtol=5e-2, atol=1e-2)  # bf16 activations
    assert found.total == 6 * 24
    assert int(found.tokens.sum()) == one.top_k_index.numel()


def hidden(checkpoint: Checkpoint, experts: Experts, e: int, x: torch.Tensor) -> torch.Tensor:
    """h_e(x) in float64 by the family's formula."""
    out = x @ experts.gate_up[e].double().T
    if experts.gate_up_bias is not None:
        out = out + experts.gate_up_bias[e].double()
    gate, up = out[:, : experts.inner], out[:, experts.inner :]
    if checkpoint.config["model_type"] == "gpt_oss":  # clamped SwiGLU
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return torch.nn.functional.silu(gate) * up


def test_experts_that_saw_too_little_take_the_layers_statistics(checkpoint: Checkpoint, text: Text) -> None:
    layer = checkpoint.layers()[0]
    one, experts = walk(checkpoint, text)[layer.number], layer.experts()
    counts = torch.bincount(one.top_k_index.flatten(), minlength=experts.count)
    minimum = int(counts.sort().values[experts.count // 2]) + 1
    found = observe(layer, one, experts, CONTEXT, minimum=minimum)
    assert found.starved == [e for e in range(experts.count) if counts[e] < minimum]
    assert 0 < len(found.starved) < experts.count
    typical = one.tokens.double().square().mean(dim=0).sqrt() * minimum**0.5
    for e in found.starved:
        assert torch.allclose(found.input_norm[e].double(), typical, rtol=1e-3)
        assert bool((found.inner_norm[e] > 0).any())
    rest = observe(layer, one, experts, CONTEXT, minimum=1)
    busy = [e for e in range(experts.count) if e not in found.starved]
    assert torch.equal(found.input_norm[busy], rest.input_norm[busy])


def test_an_expert_that_calibration_never_reached_is_accounted_for(checkpoint: Checkpoint, text: Text) -> None:
    layer = checkpoint.layers()[0]
    one, experts = walk(checkpoint, text)[layer.number], layer.experts()
    never = replace(one, top_k_index=one.top_k_index.where(one.top_k_index != 3, 2))
    found: Activity = observe(layer, never, experts, CONTEXT, minimum=1)
    assert found.starved == [3]
    assert int(found.tokens[3]) == 0
    assert torch.isfinite(found.input_norm).all()
    assert bool((found.input_norm[3] > 0).all())


def test_calibrating_through_other_experts_is_the_model_with_those_experts(
    checkpoint: Checkpoint, text: Text, tmp_path: Path
) -> None:
    first, second = checkpoint.layers()[:2]
    own = first.experts()
    halved = replace(own, down=own.down * 0.5)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto")
    model.model.layers[first.number].mlp.experts.down_proj.data.mul_(0.5)
    expected = stock_entries(model, text.tokens)
    through = walk(checkpoint, text, {first.number: halved})
    assert torch.equal(through[first.number].tokens, expected[first.number][0])
    assert torch.equal(through[second.number].tokens, expected[second.number][0])
    assert not torch.equal(through[second.number].tokens, walk(checkpoint, text)[second.number].tokens)


def test_losses_are_the_stock_models(checkpoint: Checkpoint, text: Text) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto")
    found = losses(checkpoint, {"a": text.tokens, "b": text.tokens[:2]}, torch.device("cpu"), batch=2)
    for name, ids in (("a", text.tokens.long()), ("b", text.tokens[:2].long())):
        with torch.no_grad():
            logits = torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(2)])
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        assert found[name] == pytest.approx(float(expected), rel=1e-5)
