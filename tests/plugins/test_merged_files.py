"""Merged experts, saved: what loads is what was merged, in transformers and in our reader; expanded, anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merged_layers import FAMILIES, PROVENANCE, Made, load, logits, mergers, paired, stream

from models import tiny
from moefold import Checkpoint, Layers
from moefold_kernels.module import PackedModule
from moefold_kernels.routed import MergedModule, RoutedModule
from moefold_plugins.save import save

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints, made once."""
    return Made(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["merged", "hybrid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_twin_that_repeats_experts(made, family, kind, implementation):
    ours, twin = (load(path, experts_implementation=implementation) for path in made.saved(family, kind))
    wanted = PackedModule if kind == "hybrid" else MergedModule
    assert sum(isinstance(module, wanted) for module in ours.modules()) == len(made.source(family).layers())
    assert not any(isinstance(module, RoutedModule) for module in twin.modules())
    assert torch.equal(logits(ours), logits(twin))
    assert not torch.allclose(logits(ours), logits(load(made.source(family).path)), atol=0.1)


@pytest.mark.parametrize("kind", ["merged", "hybrid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_our_reader_runs_what_transformers_loads(made, family, kind):
    ours, _ = made.saved(family, kind)
    model = load(ours) if kind == "merged" else load(ours, experts_implementation="grouped_mm")
    assert torch.equal(stream(ours), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_reads_back_as_it_was_merged(made, family):
    ours, _ = made.saved(family)
    for layer in Checkpoint.open(str(ours)).layers():
        value, read = mergers(made.source(family))[layer.number], layer.experts()
        for name in ("gate_up", "down", "gate_up_bias", "down_bias", "route"):
            one, other = getattr(value, name), getattr(read, name)
            assert (one is None and other is None) or torch.equal(one, other)
        assert (layer.expert_count, layer.router_outputs) == (5, 8)
        names = layer.names()
        assert {*names.keys, *names.biases} <= set(layer.checkpoint.weight_map)
        assert bool(names.biases) == (family == "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_keeps_names_and_bytes(made, family):
    source, out = made.source(family), Checkpoint.open(str(made.saved(family)[0]))
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
def test_figures_and_card(made, export, tmp_path):
    source = made.source("qwen3_moe")
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


def test_expanded_needs_nothing_of_ours(made):
    code = """
import sys
import torch
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
print("moefold_kernels" in sys.modules)
"""
    paths = [str(made.saved(family)[1]) for family in FAMILIES]
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["False"], result.stderr
    for path in paths:
        assert "quantization_config" not in json.loads((Path(path) / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_experts_as_before_are_stock(made, tmp_path, family):
    source = made.source(family)
    shuffled = [[e] for e in (7, 3, 1, 0, 2, 6, 5, 4)]
    save(source, mergers(source, shuffled), None, PROVENANCE, to=tmp_path / "out")
    out = Checkpoint.open(str(tmp_path / "out"))
    assert not out.entries
    for number, layer in ((n.number, n) for n in out.layers()):
        own = source.layer(number).experts()
        assert torch.equal(layer.experts().down, (own.down.float() * 0.75).to(own.down.dtype))


@pytest.mark.parametrize("kind", ["merged", "packed"])
def test_experts_that_the_files_hold_in_one_tensor_under_another_name(tmp_path, kind):
    """Granite: block_sparse_moe.input_linear.weight, which transformers calls experts.gate_up_proj until it saves."""
    source = Checkpoint.open(str(tiny("granitemoe", tmp_path / "source", num_local_experts=8, num_hidden_layers=2)))
    values = mergers(source) if kind == "merged" else Layers({1: lambda: paired(source.layer(1).experts(), [[3, 0]])})
    save(source, values, None, PROVENANCE, to=tmp_path / "ours")
    ours = load(tmp_path / "ours", experts_implementation="eager")
    assert torch.equal(stream(tmp_path / "ours"), logits(ours))
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", experts_implementation="eager")), logits(ours))
    assert torch.equal(stream(tmp_path / "again"), logits(ours))
