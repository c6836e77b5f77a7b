"""Pruned checkpoints are stock ones, and exact."""

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

from models import ARCHITECTURES
from moefold import (
    Checkpoint,
    Layers,
    MergedPair,
    Packed,
    PairMerge,
    Provenance,
    Reduced,
    StreamedModel,
)
from moefold.codec import pack
from moefold.errors import FormatError, InputError
from moefold_plugins.codecs import Exponent
from moefold_plugins.pruning import prune_random
from moefold_plugins.save import save
from pruned import IDS, Sources, half, kept, prunings

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
def test_a_saved_pruned_model_is_stock_and_exact(sources: Sources, family: str, tmp_path: Path) -> None:
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
def test_files_hold_what_is_left_and_nothing_of_ours(sources: Sources, family: str, tmp_path: Path) -> None:
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


def test_layers_pruned_to_different_numbers_are_refused(sources: Sources, tmp_path: Path) -> None:
    source = sources("mixtral")
    first, *rest = source.layers()
    some = Layers({first.number: half(first)})
    with pytest.raises(FormatError, match=r"layer 1 wants nothing changed in config.json .*num_local_experts"):
        save(source, some, None, PROVENANCE, to=tmp_path / "out")
    mixed = {first.number: prune_random(first, experts=5)} | {layer.number: half(layer) for layer in rest}
    with pytest.raises(FormatError, match=r"prune all of them alike"):
        save(source, Layers(mixed), None, PROVENANCE, to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pruned_and_merged_at_once_is_refused(sources: Sources, tmp_path: Path) -> None:
    source = sources("mixtral")
    layer = source.layers()[0]
    route = torch.tensor([0, 0, 1, 2, 3, -1, -1, -1])
    value = Layers({layer.number: replace(half(layer), route=route)})
    with pytest.raises(FormatError, match=r"layer 0 was pruned and its experts were merged as well"):
        save(source, value, None, PROVENANCE, to=tmp_path / "out")


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_pruned_then_packed(sources: Sources, family: str, paired: bool, tmp_path: Path) -> None:
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
def test_a_pruned_checkpoint_can_be_pruned_again(sources: Sources, family: str, tmp_path: Path) -> None:
    source = sources(family)
    save(source, prunings(source), None, PROVENANCE, to=tmp_path / "out")
    again = Checkpoint.open(str(tmp_path / "out")).layers()[0]
    if family == "deepseek_v3":
        with pytest.raises(InputError, match=r"too few for the router"):
            prune_random(again)
    else:
        assert prune_random(again, experts=3).count == 3


def test_the_number_changes_under_the_name_that_the_file_has_for_it(sources: Sources, tmp_path: Path) -> None:
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
