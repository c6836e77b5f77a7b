"""What each pruning stage chooses; calibrating through pruned layers; likeness of router logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import ARCHITECTURES
from moefold import (
    Checkpoint,
    Context,
    Experts,
    Provenance,
    Reduced,
    Routed,
    StreamedModel,
    Text,
)
from moefold.errors import InputError
from moefold_plugins.calibrate import forward
from moefold_plugins.pruning import prune_by_use, prune_random, prune_reap
from moefold_plugins.save import save
from moefold_plugins.similarity import similarity_router
from pruned import IDS, Sources, half, kept, prunings, used

CONTEXT = Context(torch.device("cpu"), torch.Generator())
TEXT = Text("random", IDS.int())
PROVENANCE = Provenance("org/model", "f" * 64, ({"id": "prune.by_use", "uses": "prune.by_use", "with": {}},))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


def test_the_least_used_go(sources: Sources) -> None:
    layer = sources("mixtral").layers()[0]
    counts = [5, 9, 0, 7, 5, 1, 8, 5]
    value = prune_by_use(layer, used(layer, counts))
    assert kept(value) == [0, 1, 3, 6], "of equals the lower number stays"
    assert value.route is not None
    assert value.route.tolist() == [0, 1, -1, 2, -1, -1, 3, -1]
    assert value.figures == {"saliency": list(map(float, counts))}
    assert value.pruned
    assert torch.equal(value.down, layer.experts().down[[0, 1, 3, 6]])
    assert kept(prune_by_use(layer, used(layer, counts), fraction=0.75)) == [0, 1, 3, 4, 6, 7]
    assert kept(prune_by_use(layer, used(layer, counts), experts=3)) == [1, 3, 6]
    whole = prune_by_use(layer, used(layer, counts), fraction=1.0)
    assert whole.count == 8
    assert not whole.pruned
    with pytest.raises(InputError, match=r"these figures are of 4"):
        prune_by_use(layer, used(layer, [1, 2, 3, 4]))
    with pytest.raises(InputError, match=r"leave 1 to 7, not 9"):
        prune_by_use(layer, used(layer, counts), experts=9)


def test_each_group_keeps_as_many(sources: Sources) -> None:
    layer = sources("deepseek_v3").layers()[0]
    value = prune_by_use(layer, used(layer, [9, 8, 7, 6, 0, 1, 2, 3, 5, 4, 5, 4, 0, 0, 0, 0]))
    assert kept(value) == [0, 1, 6, 7, 8, 10, 12, 13]
    assert prune_by_use(layer, used(layer), fraction=0.7).count == 12, "rounded to whole groups"
    for seed in range(5):
        groups = [expert // 4 for expert in kept(prune_random(layer, seed=seed))]
        assert groups == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(InputError, match=r"write experts: 8 or experts: 12"):
        prune_random(layer, experts=9)


def test_random_depends_on_seed_and_layer_only(sources: Sources) -> None:
    first, second = sources("mixtral").layers()[:2]
    assert kept(prune_random(first)) == kept(prune_random(first)) == [1, 2, 5, 7]
    choices = {tuple(kept(prune_random(layer, seed=seed))) for layer in (first, second) for seed in range(4)}
    assert len(choices) > 4
    other = sources("qwen3_moe").layers()[0]
    assert kept(prune_random(other)) == kept(prune_random(first))


def entered(checkpoint: Checkpoint) -> dict[int, Routed]:
    """What enters each layer's experts."""
    return walk(checkpoint, {})


def walk(checkpoint: Checkpoint, experts: dict[int, Experts]) -> dict[int, Routed]:
    """The stage `forward` over all layers, as the runner would call it."""
    routed: dict[int, Routed] = {}
    before = own = None
    for layer in checkpoint.layers():
        before = routed[layer.number] = forward(layer, TEXT, before, own, CONTEXT, batch=2)
        own = experts.get(layer.number) or layer.experts()
    return routed


def activation(family: str, out: Tensor, inner: int) -> Tensor:
    """h of `[token, 2 * inner]` in the family's formula."""
    gate, up = out[:, :inner], out[:, inner:]
    if family == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_saliency_is_reaps(sources: Sources, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources(family)
    layer = source.layers()[-1]
    routed = entered(source)[layer.number]
    gone = int(routed.top_k_index[0, 0])
    routed = replace(routed, top_k_index=routed.top_k_index.where(routed.top_k_index != gone, gone ^ 1))
    experts = layer.experts()
    expected = torch.zeros(experts.count, dtype=torch.float64)
    for e in range(experts.count):
        terms = []
        for token in (routed.top_k_index == e).any(dim=1).nonzero().flatten().tolist():
            gate = float(routed.top_k_weights[token][routed.top_k_index[token] == e].sum())
            x = routed.tokens[token : token + 1].double()
            up = 0.0 if experts.gate_up_bias is None else experts.gate_up_bias[e].double()
            down = 0.0 if experts.down_bias is None else experts.down_bias[e].double()
            h = activation(family, x @ experts.gate_up[e].double().T + up, experts.inner)
            y = h @ experts.down[e].double().T + down
            terms.append(gate * float(y.norm()))
        expected[e] = sum(terms) / max(1, len(terms))
    monkeypatch.setattr("moefold_plugins.visits.CHUNK", 5)
    value = prune_reap(layer, routed, CONTEXT)
    found = torch.tensor(value.figures["saliency"], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=2e-2), "bfloat16 activations"
    assert found[gone] == 0
    assert (found > 0).sum() > experts.count // 2
    if family != "deepseek_v3":
        assert set(kept(value)) == set(found.argsort(descending=True)[: experts.count // 2].tolist())


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_calibrating_through_pruned_layers_is_the_pruned_checkpoint(
    sources: Sources, family: str, tmp_path: Path
) -> None:
    source = sources(family)
    layers = prunings(source)
    save(source, layers, None, PROVENANCE, to=tmp_path / "out")
    out = Checkpoint.open(str(tmp_path / "out"))
    through, expected = walk(source, dict(layers)), entered(out)
    plain = entered(source)
    last = source.layers()[-1].number
    for number, one in through.items():
        assert torch.equal(one.layer_input, expected[number].layer_input)
        assert torch.equal(one.tokens, expected[number].tokens)
    assert not torch.equal(through[last].tokens, plain[last].tokens)
    model, twin = StreamedModel(source), StreamedModel(out)
    hidden = model.embed(IDS)
    assert torch.equal(twin.embed(IDS), hidden)
    live = model.live_bytes()
    assert twin.live_bytes() == live
    for number in range(model.layer_count):
        pruned = dict(layers).get(number)
        with model.loaded(number, pruned), twin.loaded(number):
            after = model.through(number, IDS, hidden)
            assert torch.equal(after, twin.through(number, IDS, hidden))
            assert model.live_bytes() == twin.live_bytes()
        if pruned is not None:
            with model.loaded(number, pruned, with_experts=False), twin.loaded(number, with_experts=False):
                for found, stock in zip(*(m.entering(number, IDS, hidden) for m in (model, twin)), strict=True):
                    assert torch.equal(found, stock)
            with model.loaded(number):
                assert not torch.equal(model.through(number, IDS, hidden), after), "the layer is its own again"
        hidden = after
    assert model.live_bytes() == live


def test_pruned_layers_of_which_the_rest_is_merged_run_too(sources: Sources) -> None:
    source = sources("qwen3_moe")
    layer = source.layers()[1]
    value = half(layer)
    doubled = Reduced(value.gate_up[[0, 1, 2, 2]], value.down[[0, 1, 2, 2]], route=value.route)
    assert value.route is not None
    merged = Reduced(value.gate_up[:3], value.down[:3], route=value.route.where(value.route != 3, 2))
    model = StreamedModel(source)
    hidden = model.embed(IDS)
    given = []
    for experts in (doubled, merged, value):
        with model.loaded(layer.number, experts):
            given.append(model.through(layer.number, IDS, hidden))
    assert torch.allclose(given[0], given[1], atol=0.02, rtol=0.02)
    assert not torch.allclose(given[0], given[2], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_similarity_of_router_logits(sources: Sources, family: str) -> None:
    source = sources(family)
    layer = source.layers()[1]
    routed = entered(source)[layer.number]
    name = "router" if family == "gpt_oss" else "gate"
    weight = source.tensor(f"model.layers.{layer.number}.mlp.{name}.weight").double()
    logits = routed.tokens.double() @ weight.T
    if family == "gpt_oss":
        logits += source.tensor(f"model.layers.{layer.number}.mlp.{name}.bias").double()
    expected = torch.nn.functional.cosine_similarity(logits[:, :, None], logits[:, None, :], dim=0)
    found = similarity_router(layer, routed, CONTEXT)
    assert torch.allclose(found.matrix.double(), expected, atol=1e-5)
    assert found.matrix.diagonal().allclose(torch.ones(8))
    assert float((found.matrix - torch.eye(8)).abs().max()) > 0.1
