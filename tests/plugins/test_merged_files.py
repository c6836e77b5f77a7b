"""Merged experts, saved: what loads is what was merged, in transformers and in our reader; expanded, anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import samples, tiny
from moefold import Checkpoint, Experts, Layers, MergedPair, Packed, PairMerge, Provenance, Reduced, StreamedModel
from moefold.codec import pack, unpack
from moefold.errors import CheckpointError, FormatError
from moefold_kernels.module import PackedModule
from moefold_kernels.routed import MergedModule, RoutedModule
from moefold_plugins.codecs import Exponent
from moefold_plugins.save import save

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PROVENANCE = Provenance("org/model", "f" * 64, ())
IDS = samples(2, 11)
GROUPS = [[0, 3, 6], [1], [2, 7], [4], [5]]
FEWER = [[0, 4], [1, 2], [3]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture(scope="module")
def saved(sources, tmp_path_factory):
    """A function that gives (merged, expanded) directories of a family, made once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def directories(family: str, kind: str = "merged") -> tuple[Path, Path]:
        if (family, kind) not in made:
            root, source = tmp_path_factory.mktemp(family), sources(family)
            values = {"merged": mergers, "hybrid": hybrids}[kind](source)
            save(source, values, None, PROVENANCE, to=root / "ours", shard_size="60KB")
            if kind == "hybrid":  # the twin is what the packed experts read
                values = Layers({n: partial(decoded, source, n, values[n]) for n in values})
            save(source, values, None, PROVENANCE, to=root / "twin", export="expanded")
            made[family, kind] = root / "ours", root / "twin"
        return made[family, kind]

    return directories


def merged(experts: Experts, groups: list[list[int]]) -> Reduced:
    """The mean of each group, where the first counts most."""

    def mean(tensor):
        if tensor is None:
            return None
        rows = [sum(tensor[e].float() * w for w, e in zip((0.75, 0.25, 0.0), g, strict=False)) for g in groups]
        return torch.stack(rows).to(tensor.dtype)

    route = torch.tensor([next(n for n, g in enumerate(groups) if e in g) for e in range(experts.count)])
    route = route if experts.route is None else route[experts.route]
    parts = (mean(t) for t in (experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias))
    return Reduced(*parts, experts.gated, route, groups)


def mergers(source: Checkpoint, groups: list[list[int]] = GROUPS) -> Layers[Reduced]:
    return Layers({n.number: partial(lambda layer: merged(layer.experts(), groups), n) for n in source.layers()})


def paired(experts: Experts, pairs: list[list[int]]) -> Packed:
    """The larger of two weights, packed."""
    matrices = experts.matrices()

    def merge(name: str, index: int) -> MergedPair:
        weights = matrices[name][pairs[index]]
        first, second = weights.float().abs()
        return MergedPair(torch.maximum(first, second), weights < 0, torch.stack([first >= second, first < second]))

    alone = sorted(set(range(experts.count)) - {expert for pair in pairs for expert in pair})
    return pack(Exponent(), PairMerge(experts, pairs, alone, merge))


def hybrids(source: Checkpoint) -> Layers[Packed]:
    """Merged, then packed."""

    def one(layer) -> Packed:
        return paired(merged(layer.experts(), GROUPS), [[3, 0], [1, 4]])

    return Layers({layer.number: partial(one, layer) for layer in source.layers()})


def decoded(source: Checkpoint, number: int, value: Packed) -> Reduced:
    read = unpack(Exponent(), value, source.layer(number), torch.device("cpu"))
    return Reduced(read.gate_up, read.down, read.gate_up_bias, read.down_bias, read.gated, read.route)


def load(path: Path, **kwargs):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS.to(model.device)).logits


def stream(path: Path) -> torch.Tensor:
    model = StreamedModel(Checkpoint.open(str(path)))
    hidden = model.embed(IDS)
    for number in range(model.layer_count):
        with model.loaded(number):
            hidden = model.through(number, IDS, hidden)
    return model.head(hidden)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["merged", "hybrid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_twin_that_repeats_experts(saved, sources, family, kind, implementation):
    ours, twin = (load(path, experts_implementation=implementation) for path in saved(family, kind))
    wanted = PackedModule if kind == "hybrid" else MergedModule
    assert sum(isinstance(module, wanted) for module in ours.modules()) == len(sources(family).layers())
    assert not any(isinstance(module, RoutedModule) for module in twin.modules())
    assert torch.equal(logits(ours), logits(twin))
    assert not torch.allclose(logits(ours), logits(load(sources(family).path)), atol=0.1)


@pytest.mark.parametrize("kind", ["merged", "hybrid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_our_reader_runs_what_transformers_loads(saved, family, kind):
    ours, _ = saved(family, kind)
    model = load(ours) if kind == "merged" else load(ours, experts_implementation="grouped_mm")
    assert torch.equal(stream(ours), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_reads_back_as_it_was_merged(saved, sources, family):
    ours, _ = saved(family)
    for layer in Checkpoint.open(str(ours)).layers():
        value, read = mergers(sources(family))[layer.number], layer.experts()
        for name in ("gate_up", "down", "gate_up_bias", "down_bias", "route"):
            one, other = getattr(value, name), getattr(read, name)
            assert (one is None and other is None) or torch.equal(one, other)
        assert (layer.expert_count, layer.router_outputs) == (5, 8)
        names = layer.names()
        assert {*names.keys, *names.biases} <= set(layer.checkpoint.weight_map)
        assert bool(names.biases) == (family == "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_keeps_names_and_bytes(saved, sources, family):
    source, out = sources(family), Checkpoint.open(str(saved(family)[0]))
    experts = {key for layer in source.layers() for key in (*layer.names().keys, *layer.names().biases)}
    for key in set(source.weight_map) - experts:
        assert torch.equal(out.tensor(key), source.tensor(key))
    if family == "gpt_oss":
        assert out.weight_map.keys() == source.weight_map.keys()
    else:  # experts 5, 6 and 7 are gone
        gone = {key for key in experts if any(f".experts.{number}." in key for number in (5, 6, 7))}
        assert out.weight_map.keys() == source.weight_map.keys() - gone
    config = json.loads((out.path / "config.json").read_text())
    layers = config.pop("quantization_config")["layers"]
    assert config == json.loads((source.path / "config.json").read_text())
    assert all(entry["route"] == [0, 1, 2, 0, 3, 4, 0, 2] for entry in layers.values())


@pytest.mark.parametrize("export", ["route", "expanded"])
def test_figures_and_card(sources, export, tmp_path):
    source = sources("qwen3_moe")
    figures = save(source, mergers(source), None, PROVENANCE, to=tmp_path / "out", export=export).figures
    fewer = export == "route"
    assert figures["kinds"] == {"merged" if fewer else "expanded": 2}
    assert figures["experts"] == {"0": [8, 5 if fewer else 8], "1": [8, 5 if fewer else 8]}
    assert figures["expert_bytes"]["after"] * 8 == figures["expert_bytes"]["before"] * (5 if fewer else 8)
    assert figures["needs_moefold"] == fewer
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("import moefold_kernels" in card) == fewer
    assert ("saves nothing, neither on disk nor in memory" in card) != fewer
    difference = figures["checkpoint_bytes"]["before"] - figures["checkpoint_bytes"]["after"]
    assert difference == figures["expert_bytes"]["before"] - figures["expert_bytes"]["after"]


def test_expanded_needs_nothing_of_ours(saved):
    code = """
import sys
import torch
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
print("moefold_kernels" in sys.modules)
"""
    paths = [str(saved(family)[1]) for family in FAMILIES]
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["False"], result.stderr
    for path in paths:
        assert "quantization_config" not in json.loads((Path(path) / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_is_merged_further(saved, tmp_path, family):
    first = Checkpoint.open(str(saved(family)[0]))
    save(first, mergers(first, FEWER), None, PROVENANCE, to=tmp_path / "out")
    save(first, mergers(first, FEWER), None, PROVENANCE, to=tmp_path / "twin", export="expanded")
    assert {layer.expert_count for layer in Checkpoint.open(str(tmp_path / "out")).layers()} == {3}
    assert Checkpoint.open(str(tmp_path / "out")).layers()[0].experts().route.tolist() == [0, 1, 1, 0, 2, 0, 0, 1]
    ours = load(tmp_path / "out")
    assert torch.equal(logits(ours), logits(load(tmp_path / "twin")))
    assert torch.equal(logits(ours), stream(tmp_path / "out"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_is_packed(saved, tmp_path, family):
    """The same files as when both were done at once."""
    first = Checkpoint.open(str(saved(family)[0]))
    layers = {n.number: partial(lambda layer: paired(layer.experts(), [[3, 0], [1, 4]]), n) for n in first.layers()}
    save(first, Layers(layers), None, PROVENANCE, to=tmp_path / "out")
    out, once = (Checkpoint.open(str(path)) for path in (tmp_path / "out", saved(family, "hybrid")[0]))
    assert out.entries == once.entries
    assert out.weight_map.keys() == once.weight_map.keys()
    assert all(torch.equal(out.tensor(key), once.tensor(key)) for key in out.weight_map)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_a_packer_skips_stays_merged(saved, sources, tmp_path, family):
    source = sources(family)
    values = {n: partial(lambda n: paired(merged(n.experts(), GROUPS), []), n) for n in source.layers()}
    layers = Layers({layer.number: value for layer, value in values.items()})
    saved_ = save(source, layers, None, PROVENANCE, to=tmp_path / "out")
    out, once = (Checkpoint.open(str(path)) for path in (tmp_path / "out", saved(family)[0]))
    assert out.entries == once.entries
    assert all(torch.equal(out.tensor(key), once.tensor(key)) for key in once.weight_map)
    assert (saved_.figures["format"], saved_.figures["kinds"]) == ("none", {"merged": 2})


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_experts_as_before_are_stock(sources, tmp_path, family):
    source = sources(family)
    shuffled = [[e] for e in (7, 3, 1, 0, 2, 6, 5, 4)]
    save(source, mergers(source, shuffled), None, PROVENANCE, to=tmp_path / "out")
    out = Checkpoint.open(str(tmp_path / "out"))
    assert not out.entries
    for number, layer in ((n.number, n) for n in out.layers()):
        own = source.layer(number).experts()
        assert torch.equal(layer.experts().down, (own.down.float() * 0.75).to(own.down.dtype))


def test_layers_that_nothing_replaces(saved, sources, tmp_path):
    source = sources("mixtral")
    one = Layers({1: mergers(source)[1]})
    figures = save(source, one, None, PROVENANCE, to=tmp_path / "one").figures
    assert figures["experts"] == {"0": [8, 8], "1": [8, 5]}
    first = Checkpoint.open(str(tmp_path / "one"))
    assert torch.equal(logits(load(first.path)), stream(first.path))
    save(first, Layers({0: mergers(first)[0]}), None, PROVENANCE, to=tmp_path / "both")
    both = Checkpoint.open(str(tmp_path / "both"))
    assert both.entries == Checkpoint.open(str(saved("mixtral")[0])).entries
    with pytest.raises(FormatError, match="layer 1 is merged or packed there already, and nothing replaces it; to exp"):
        save(first, Layers({0: mergers(first)[0]}), None, PROVENANCE, to=tmp_path / "x", export="expanded")


def test_what_has_no_form_is_refused(saved, sources, tmp_path):
    source = sources("mixtral")
    value, packed = mergers(source)[0], hybrids(source)[0]
    experts = {"gate_up": value.gate_up, "down": value.down}

    def refuse(value, message, kind=FormatError, source=source, **options):
        with pytest.raises(kind, match=message):
            save(source, Layers({0: value}), None, PROVENANCE, to=tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())

    refuse(packed, "packed experts have no form that stock readers know", export="expanded")
    refuse(Reduced(**experts), "layer 0: 5 experts with no route come in place of those of 8 router outputs")
    refuse(Reduced(**experts, route=torch.tensor([0, 1, 2, 3, 4])), "a route of 5 entries onto 5 come in place")
    refuse(Reduced(**experts, route=torch.tensor([0, 1, 2, 3, 3, 3, 3, 3])), "a route of 8 entries onto 4 come in")
    wide = {name: tensor.float() for name, tensor in experts.items()}
    refuse(Reduced(**wide, route=value.route), "merged experts are torch.float32, the source's torch.bfloat16")
    refuse(
        value,
        "the experts of layer 0 are packed, and no others can take their place",
        CheckpointError,
        Checkpoint.open(str(saved("mixtral", "hybrid")[0])),
    )


@pytest.mark.parametrize("kind", ["merged", "hybrid"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: e["0"].update(route=[0, 1, 2, 3, 4, 0]),
            r"layers\.0\.route has 6 entries, the router 8 outputs; they",
        ),
        (lambda e: e.update({"7": e.pop("0")}), "MixtralForCausalLM has no experts in layer 7, of which config.json"),
    ],
)
def test_our_reader_checks_the_entry(saved, tmp_path, kind, change, message):
    out = tmp_path / "out"
    out.mkdir()
    for path in saved("mixtral", kind)[0].iterdir():
        (out / path.name).symlink_to(path)
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"]["layers"])
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(str(out)).layers()
