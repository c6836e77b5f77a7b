"""The stage `save`: what it writes, what it refuses, and that what it wrote loads."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moefold_plugins.save as saving
from models import samples, tiny
from moefold import Activity, Checkpoint, Layers, MergedPair, Packed, PairMerge, Provenance
from moefold.codec import pack
from moefold.errors import FormatError, InputError, StageError
from moefold_kernels.module import PackedModule
from moefold_plugins.codecs import Exponent
from moefold_plugins.save import save
from moefold_plugins.shards import Shards, parse_size

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")
PROVENANCE = Provenance(
    "org/model", "f" * 64, ({"id": "pack", "uses": "pack.exponent", "version": 1, "with": {"window": None}},)
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small checkpoints by family, made once."""
    made: dict[str, Checkpoint] = {}

    def source(family: str) -> Checkpoint:
        if family not in made:
            path = tiny(family, tmp_path_factory.mktemp(family) / "source", num_hidden_layers=2)
            made[family] = Checkpoint.open(str(path))
        return made[family]

    return source


def packed_layer(layer, pairs: list[list[int]]) -> Packed:
    """A layer merged without calibration: means where the weights agree, else the larger one alone."""
    experts = layer.experts()
    matrices = experts.matrices()

    def merge(name: str, index: int) -> MergedPair:
        weights = matrices[name][pairs[index]]
        first, second = weights.float().abs()
        shared = (first - second).abs() <= 0.4 * (first + second)
        magnitude = torch.where(shared, (first + second) / 2, torch.maximum(first, second))
        return MergedPair(magnitude, weights < 0, torch.stack([shared | (first >= second), shared | (first < second)]))

    alone = sorted(set(range(experts.count)) - {expert for pair in pairs for expert in pair})
    return pack(Exponent(), PairMerge(experts, pairs, alone, merge))


def packings(checkpoint: Checkpoint, pairs: list[list[int]] | None = None) -> Layers[Packed]:
    """Every layer, packed when it is asked for."""
    pairs = pairs or [[0, 5], [7, 1], [2, 3], [4, 6]]
    return Layers({layer.number: partial(packed_layer, layer, pairs) for layer in checkpoint.layers()})


def seen(starved: list[int]) -> Activity:
    """An activity of which only the starved experts matter here."""
    return Activity(torch.ones(8, dtype=torch.int64), torch.ones(8, 4), torch.ones(8, 4), 8, 16, starved)


@pytest.mark.parametrize("pairs", [None, [[6, 0], [3, 4]]], ids=["all", "some"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_as_packed(sources, family, pairs, tmp_path):
    source = sources(family)
    layers = packings(source, pairs)
    saved = save(source, layers, None, PROVENANCE, to=tmp_path / "out", shard_size="60KB")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert sum(isinstance(module, PackedModule) for module in model.modules()) == len(layers)
    twin = AutoModelForCausalLM.from_pretrained(source.path)
    written = Checkpoint.open(str(tmp_path / "out"))
    for layer in written.layers():
        experts, original = layer.experts(), source.layer(layer.number).experts()
        for name, weights in experts.matrices().items():
            packed = layers[layer.number]
            for index, pair in enumerate(packed.pairs):
                for slot, expert in enumerate(pair):
                    expected = Exponent().decode(packed.words[name][index], packed.settings[name], slot)
                    assert torch.equal(weights[expert], expected)
            for expert in packed.dense:
                assert torch.equal(weights[expert], original.matrices()[name][expert])
        fill(twin, layer.number, experts)
    ids = samples(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)
    assert saved.intact()
    assert saved.figures["replaced_layers"] == saved.figures["layers"] == len(layers)


def fill(model, number: int, experts) -> None:
    """Put canonical experts into a stock model."""
    (module,) = (m for n, m in model.named_modules() if f"layers.{number}." in n and hasattr(m, "is_concatenated"))
    inner, gate_up, down = experts.inner, experts.gate_up, experts.down
    if not module.is_concatenated:
        gate_up = torch.stack([gate_up[:, :inner], gate_up[:, inner:]], dim=2).flatten(1, 2)
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    module.gate_up_proj.data.copy_(gate_up)
    module.down_proj.data.copy_(down)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_everything_else_keeps_names_and_bytes(sources, family, tmp_path):
    source = sources(family)
    save(source, packings(source), None, PROVENANCE, to=tmp_path / "out")
    out = Checkpoint.open(str(tmp_path / "out"))
    replaced = {key for layer in source.layers() for key in layer.names().keys}
    for key in set(source.weight_map) - replaced:
        assert torch.equal(out.tensor(key), source.tensor(key))
        assert out.header(key) == source.header(key)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source.path / name).read_bytes()
    before, after = ((path / "config.json").read_text() for path in (source.path, tmp_path / "out"))
    assert after.startswith(before.rstrip().removesuffix("}").rstrip())
    assert {k: v for k, v in json.loads(after).items() if k != "quantization_config"} == json.loads(before)
    assert not list(tmp_path.glob(".*"))


def test_shards_and_index(sources, tmp_path):
    source = sources("qwen3_moe")
    saved = save(source, packings(source), None, PROVENANCE, to=tmp_path / "out", shard_size=50_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 2
    assert index["metadata"]["total_size"] == saved.figures["checkpoint_bytes"]["after"]
    assert saved.files.keys() == {p.name for p in (tmp_path / "out").iterdir()} - {"README.md", "moefold.json"}
    (tmp_path / "out" / shards[1]).write_bytes(b"")
    assert not saved.intact()


def test_only_one_layer_is_in_memory_at_a_time(sources, tmp_path):
    source = sources("olmoe")
    layers = packings(source)
    asked = []

    class Counting(Layers):
        def __getitem__(self, number):
            asked.append(number)
            return super().__getitem__(number)

    save(source, Counting({n: partial(layers.__getitem__, n) for n in layers}), None, PROVENANCE, to=tmp_path / "out")
    assert sorted(asked) == sorted(layers)  # each once


def test_figures_and_card(sources, tmp_path):
    source = sources("qwen3_moe")
    layers = Layers({0: seen([]), 1: seen([2, 5])})
    saved = save(source, packings(source), layers, PROVENANCE, to=tmp_path / "out")
    figures = saved.figures
    assert figures["expert_bytes"]["after"] * 2 == figures["expert_bytes"]["before"] == 2 * 8 * 3 * 32 * 64 * 2
    assert sum(figures["masks"].values()) == pytest.approx(1)
    assert 0.4 < figures["masks"]["shared"] < 0.6
    assert figures["starved"] == {"1": [2, 5]}
    assert (figures["clipped"], figures["format"]) == (0, "exponent")
    difference = figures["checkpoint_bytes"]["before"] - figures["checkpoint_bytes"]["after"]
    assert difference == figures["expert_bytes"]["before"] - figures["expert_bytes"]["after"]
    card = (tmp_path / "out" / "README.md").read_text()
    shared = f"shared {figures['masks']['shared']:.1%}"
    for part in ("base_model: org/model", "| 0.500 |", "layer 1: experts 2, 5", "f" * 64, "pack.exponent", shared):
        assert part in card


def test_layers_without_pairs_stay_as_they_are(sources, tmp_path):
    source = sources("mixtral")
    mixed = Layers({0: packed_layer(source.layer(0), []), 1: packed_layer(source.layer(1), [[0, 1]])})
    saved = save(source, mixed, None, PROVENANCE, to=tmp_path / "out")
    assert (saved.figures["layers"], saved.figures["replaced_layers"]) == (2, 1)
    out = Checkpoint.open(str(tmp_path / "out"))
    assert all(torch.equal(out.tensor(key), source.tensor(key)) for key in source.layer(0).names().keys)
    assert list(out.packed_layers) == [1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_packing_a_packed_checkpoint_further(sources, tmp_path):
    source = sources("mixtral")
    first = Layers({0: packed_layer(source.layer(0), []), 1: packed_layer(source.layer(1), [[0, 1]])})
    save(source, first, None, PROVENANCE, to=tmp_path / "one")
    one = Checkpoint.open(str(tmp_path / "one"))
    second = Layers({0: packed_layer(one.layer(0), [[2, 3]]), 1: packed_layer(one.layer(1), [])})
    save(one, second, None, PROVENANCE, to=tmp_path / "two")
    two = Checkpoint.open(str(tmp_path / "two"))
    assert two.packed_layers[1] == one.packed_layers[1]
    assert two.packed_layers[0].pairs == ((2, 3),)
    assert torch.equal(two.layer(1).experts().down, one.layer(1).experts().down)
    AutoModelForCausalLM.from_pretrained(tmp_path / "two")


def test_what_moefold_did_not_write_is_not_replaced(sources, tmp_path):
    source = sources("olmoe")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for target, message in {
        foreign: "moefold did not write it",
        foreign / "thesis.tex": "no directory of its own",
        source.path: "is the source checkpoint itself",
    }.items():
        with pytest.raises(InputError, match=message):
            save(source, packings(source), None, PROVENANCE, to=target)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    shutil.copy(source.path / "config.json", foreign / "config.json")
    with pytest.raises(InputError, match="moefold did not write it"):
        save(source, packings(source), None, PROVENANCE, to=foreign)


def test_a_target_that_cannot_be_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    assert save.reads is not None
    for name, message in {
        "file": "is no directory of its own",
        "folder": "moefold did not write it",
        "file/out": r"file/out cannot be made: .*file is no directory; choose another",
    }.items():
        with pytest.raises(InputError, match=message):
            save.reads(**save.options(to=tmp_path / name).model_dump())
    assert save.reads(**save.options(to=tmp_path / "a" / "b").model_dump()) is None


def test_ours_is_replaced_only_by_a_whole_one(sources, tmp_path, monkeypatch):
    source = sources("olmoe")
    target = tmp_path / "out"
    save(source, packings(source), None, PROVENANCE, to=target)
    (target / "marker").write_text("first")
    with monkeypatch.context() as broken:
        broken.setattr(saving, "_copy_others", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(StageError, match=r"out was not written \(disk full\); make room"):
            save(source, packings(source), None, PROVENANCE, to=target)
    assert (target / "marker").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    save(source, packings(source, [[0, 1]]), None, PROVENANCE, to=target)
    assert not (target / "marker").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_leftovers_of_a_killed_run_are_cleared(sources, tmp_path):
    source = sources("olmoe")
    (tmp_path / ".out.moefold-partial").mkdir()
    (tmp_path / ".out.moefold-partial" / "part-0.safetensors").write_bytes(b"half")
    (tmp_path / "out").mkdir()  # empty: free
    save(source, packings(source), None, PROVENANCE, to=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_paths_are_relative_to_the_working_directory(sources, tmp_path, monkeypatch):
    source = sources("olmoe")
    monkeypatch.chdir(tmp_path)
    saved = save(source, packings(source), None, PROVENANCE, to=Path("deep/er/out"))
    assert saved.path == "deep/er/out"
    assert (tmp_path / "deep" / "er" / "out" / "config.json").is_file()


def test_formats_and_layers_that_have_no_place(sources, tmp_path):
    source = sources("olmoe")
    layer = packed_layer(source.layer(0), [[0, 1]])
    odd = Packed("4bit", layer.pairs, layer.dense, layer.words, layer.experts, layer.settings, layer.counts)
    with pytest.raises(FormatError, match="format 4bit has no checkpoint layout"):
        save(source, Layers({0: odd}), None, PROVENANCE, to=tmp_path / "out")
    with pytest.raises(FormatError, match="decoder layer 9 has no routed experts"):
        save(source, Layers({9: layer}), None, PROVENANCE, to=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_options_are_checked():
    assert saving.save.options.model_validate({"to": "x", "shard_size": "500MiB"}).shard_size == "500MiB"
    for bad in ("4 gigs", "0", -1, "1.5GB"):
        with pytest.raises(ValueError, match="is no size; write bytes as a number, or like 4GB"):
            saving.save.options.model_validate({"to": "x", "shard_size": bad})
    assert [parse_size(size) for size in (7, "7", "7KB", "2 MiB", "4GB")] == [7, 7, 7000, 2**21, 4 * 10**9]


def test_a_shard_that_reads_back_otherwise_is_an_error(tmp_path):
    shards = Shards(tmp_path, 100)
    shards.add("a", torch.zeros(3))
    with pytest.raises(StageError, match="two tensors are called a"):
        shards.add("a", torch.zeros(3))
    shards.promised["a"] = ([4], torch.float32)
    with pytest.raises(StageError, match="a was written as"):
        shards.finish()
