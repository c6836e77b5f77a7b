"""Pruned checkpoints are stock ones and exact; what each stage chooses; calibrating through pruned layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models import ARCHITECTURES, samples, tiny
from moefold import (
    Activity,
    Checkpoint,
    Context,
    Experts,
    Layers,
    MergedPair,
    Packed,
    PairMerge,
    Provenance,
    Reduced,
    Routed,
    StreamedModel,
    Text,
)
from moefold.codec import pack
from moefold.errors import FormatError, InputError
from moefold_plugins.calibrate import forward
from moefold_plugins.codecs import Exponent
from moefold_plugins.pruning import prune_by_use, prune_random, prune_reap
from moefold_plugins.save import save
from moefold_plugins.similarity import similarity_router

CONTEXT = Context(torch.device("cpu"), torch.Generator())
PROVENANCE = Provenance("org/model", "f" * 64, ({"id": "prune.by_use", "uses": "prune.by_use", "with": {}},))
IDS = samples(4, 24)
TEXT = Text("random", IDS.int())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Small checkpoints by family, made once; 16 experts in 4 groups for DeepSeek, whose router wants two of each."""
    made: dict[str, Checkpoint] = {}

    def source(family: str) -> Checkpoint:
        if family not in made:
            more = {"n_routed_experts": 16} if family == "deepseek_v3" else {}
            path = tiny(family, tmp_path_factory.mktemp(family) / "source", num_hidden_layers=3, **more)
            made[family] = Checkpoint.open(str(path))
        return made[family]

    return source


def used(layer: Any, counts: list[int] | None = None) -> Activity:
    """An activity of which only the tokens matter; other experts in each layer."""
    generator = torch.Generator().manual_seed(layer.number)
    tokens = torch.randperm(layer.expert_count, generator=generator) if counts is None else torch.tensor(counts)
    return Activity(tokens, torch.ones(len(tokens), 64), torch.ones(len(tokens), 4))


def half(layer: Any) -> Reduced:
    return prune_by_use(layer, used(layer))


def prunings(checkpoint: Checkpoint) -> Layers[Reduced]:
    return Layers({layer.number: partial(half, layer) for layer in checkpoint.layers()})


def kept(value: Reduced) -> list[int]:
    return [expert for (expert,) in value.groups]


@contextmanager
def masked(model: Any, gone: dict[int, list[int]]) -> Iterator[None]:
    """The model with the router logits of some experts at -inf before anything is made of them.

    DeepSeek's router takes sigmoids and chooses by them plus a bias: there the choice scores are at -inf.
    """
    linear = torch.nn.functional.linear

    def around(router: Any, experts: list[int]) -> Callable[..., Any]:
        run = router.forward

        def without(*args: Any) -> Tensor:
            logits = linear(*args)
            logits[:, experts] = -torch.inf
            return logits

        def forward_(*args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.nn.functional, "linear", without)
                return run(*args, **kwargs)

        return forward_

    for number, experts in gone.items():
        mlp = model.model.layers[number].mlp
        router = mlp.router if hasattr(mlp, "router") else mlp.gate
        router.forward = around(router, experts)
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias[experts] = -torch.inf
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_saved_pruned_model_is_stock_and_exact(
    sources: Callable[[str], Checkpoint], family: str, tmp_path: Path
) -> None:
    source = sources(family)
    layers = prunings(source)
    saved = save(source, layers, None, PROVENANCE, to=tmp_path / "out", shard_size="60KB")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    total = source.layers()[0].expert_count
    gone = {number: sorted(set(range(total)) - set(kept(layers[number]))) for number in layers}
    assert all(len(experts) == total // 2 for experts in gone.values())
    assert len({tuple(experts) for experts in gone.values()}) > 1, "layers that lose the same experts prove less"
    original = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.no_grad():
        found, plain = model(IDS).logits, original(IDS).logits
    with masked(original, gone):
        expected = original(IDS).logits
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= 1e-6
    assert float((plain - expected).abs().max() / expected.abs().max()) > 0.05, "pruning has to change the model"
    assert not saved.figures["needs_moefold"]
    assert saved.figures["kinds"] == {"pruned": len(layers)}
    assert set(map(tuple, saved.figures["experts"].values())) == {(total, total // 2)}
    assert saved.figures["expert_bytes"]["after"] * 2 == saved.figures["expert_bytes"]["before"]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_files_hold_what_is_left_and_nothing_of_ours(
    sources: Callable[[str], Checkpoint], family: str, tmp_path: Path
) -> None:
    source = sources(family)
    save(source, prunings(source), None, PROVENANCE, to=tmp_path / "out")
    out = Checkpoint.open(str(tmp_path / "out"))
    before, after = source.config, out.config
    changed = {key for key in before if before[key] != after.get(key)}
    assert after.keys() == before.keys()
    assert len(changed) == 1
    assert all(after[key] * 2 == before[key] for key in changed)
    for layer in source.layers():
        own, left = layer.experts(), out.layer(layer.number).experts()
        for name, weights in left.matrices().items():
            assert torch.equal(weights, own.matrices()[name][kept(half(layer))])
    touched = {key for layer in source.layers() for key in (*layer.names().keys, *layer.names().biases)}
    for key in out.weight_map.keys() - touched:
        if out.header(key)[0] == source.header(key)[0]:
            assert torch.equal(out.tensor(key), source.tensor(key))
        else:
            number = int(key.split(".")[2])
            assert torch.equal(out.tensor(key), source.tensor(key)[kept(half(source.layer(number)))])


def test_layers_pruned_to_different_numbers_are_refused(sources: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    source = sources("mixtral")
    first, *rest = source.layers()
    some = Layers({first.number: half(first)})
    with pytest.raises(FormatError, match=r"layer 1 wants nothing changed in config.json .*num_local_experts"):
        save(source, some, None, PROVENANCE, to=tmp_path / "out")
    mixed = {first.number: prune_random(first, experts=5)} | {layer.number: half(layer) for layer in rest}
    with pytest.raises(FormatError, match=r"prune all of them alike"):
        save(source, Layers(mixed), None, PROVENANCE, to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pruned_and_merged_at_once_is_refused(sources: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    source = sources("mixtral")
    layer = source.layers()[0]
    route = torch.tensor([0, 0, 1, 2, 3, -1, -1, -1])
    value = Layers({layer.number: replace(half(layer), route=route)})
    with pytest.raises(FormatError, match=r"layer 0 was pruned and its experts were merged as well"):
        save(source, value, None, PROVENANCE, to=tmp_path / "out")


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_pruned_then_packed(sources: Callable[[str], Checkpoint], family: str, paired: bool, tmp_path: Path) -> None:
    source = sources(family)
    layers = Layers({layer.number: partial(packed, half(layer), paired) for layer in source.layers()})
    saved = save(source, layers, None, PROVENANCE, to=tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert saved.figures["needs_moefold"] == paired
    out = Checkpoint.open(str(tmp_path / "out"))
    twin = StreamedModel(source)
    hidden = twin.embed(IDS)
    for number in range(twin.layer_count):
        experts = half(source.layer(number)) if number in layers else None
        if experts is not None:
            read = out.layer(number).experts()
            assert (read.count, read.route) == (experts.count, None)
            experts = replace(experts, gate_up=read.gate_up, down=read.down)
        with twin.loaded(number, experts):
            hidden = twin.through(number, IDS, hidden)
    with torch.no_grad():
        found, expected = model(IDS).logits.float(), twin.head(hidden).float()
    assert torch.allclose(found, expected, atol=0.05, rtol=0.02), "other kernels, in bfloat16"
    assert float(expected.std()) > 0.5


def packed(value: Reduced, paired: bool) -> Packed:
    """Its first two experts as a pair that share magnitudes where they agree, or none."""
    matrices = value.matrices()

    def merge(name: str, _: int) -> MergedPair:
        both = matrices[name][:2].float()
        first, second = both.abs()
        return MergedPair(torch.maximum(first, second), both < 0, torch.stack([first >= second, first < second]))

    pairs = [[0, 1]] if paired else []
    return pack(Exponent(), PairMerge(value, pairs, list(range(2 * len(pairs), value.count)), merge))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_pruned_checkpoint_can_be_pruned_again(
    sources: Callable[[str], Checkpoint], family: str, tmp_path: Path
) -> None:
    source = sources(family)
    save(source, prunings(source), None, PROVENANCE, to=tmp_path / "out")
    again = Checkpoint.open(str(tmp_path / "out")).layers()[0]
    if family == "deepseek_v3":
        with pytest.raises(InputError, match=r"too few for the router"):
            prune_random(again)
    else:
        assert prune_random(again, experts=3).count == 3


def test_the_least_used_go(sources: Callable[[str], Checkpoint]) -> None:
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


def test_each_group_keeps_as_many(sources: Callable[[str], Checkpoint]) -> None:
    layer = sources("deepseek_v3").layers()[0]
    value = prune_by_use(layer, used(layer, [9, 8, 7, 6, 0, 1, 2, 3, 5, 4, 5, 4, 0, 0, 0, 0]))
    assert kept(value) == [0, 1, 6, 7, 8, 10, 12, 13]
    assert prune_by_use(layer, used(layer), fraction=0.7).count == 12, "rounded to whole groups"
    for seed in range(5):
        groups = [expert // 4 for expert in kept(prune_random(layer, seed=seed))]
        assert groups == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(InputError, match=r"write experts: 8 or experts: 12"):
        prune_random(layer, experts=9)


def test_random_depends_on_seed_and_layer_only(sources: Callable[[str], Checkpoint]) -> None:
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
def test_saliency_is_reaps(sources: Callable[[str], Checkpoint], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    sources: Callable[[str], Checkpoint], family: str, tmp_path: Path
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


def test_pruned_layers_of_which_the_rest_is_merged_run_too(sources: Callable[[str], Checkpoint]) -> None:
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
def test_similarity_of_router_logits(sources: Callable[[str], Checkpoint], family: str) -> None:
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


def test_the_number_changes_under_the_name_that_the_file_has_for_it(
    sources: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    source = sources("qwen3_moe")
    copy = tmp_path / "hub"
    save(source, Layers({}), None, PROVENANCE, to=copy)
    config = json.loads((copy / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (copy / "config.json").write_text(json.dumps(config))
    hub = Checkpoint.open(str(copy))
    save(hub, prunings(hub), None, PROVENANCE, to=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == config | {"num_experts": 4}
