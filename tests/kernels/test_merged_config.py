"""Merged layers in config.json: written, read back, and refused; and files that do not hold what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moefold_kernels import FormatError, MergedLayer, read_config, write_config


def edited(path: Path, to: Path, change_tensors=None, change_config=None) -> Path:
    """A copy of a checkpoint with one thing changed."""
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    if change_tensors:
        change_tensors(tensors)
    if change_config:
        change_config(config["quantization_config"]["layers"]["1"])
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


PREFIX = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3_moe", lambda t: t.pop(f"{PREFIX}.2.up_proj.weight"), r"up_proj.weight of expert 2 is missing"),
        ("qwen3_moe", lambda t: t.update({f"{PREFIX}.5.up_proj.weight": torch.zeros(1)}), r"expert 5 .* one too many"),
        ("gpt_oss", lambda t: t.update({f"{PREFIX}.down_proj": t[f"{PREFIX}.down_proj"][:4].clone()}), "of expert 4"),
        ("qwen3_moe", lambda t: [t.pop(n) for n in list(t) if n.startswith(PREFIX)], "no expert is in the checkpoint"),
    ],
)
def test_files_without_an_expert_are_refused(merged, tmp_path, family, change, message):
    path = edited(merged(family)[0], tmp_path / "x", change)
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("kind", ["merged", "mixed"])
@pytest.mark.parametrize(
    ("route", "message"),
    [
        ([0, 1, 2, 3, 4, 0], r"the checkpoint lists 6 experts, the model has 8"),
        ([0, 1, 2, 3, 5, 0, 0, 0], r"layers\.1\.route has to lead to each expert 0 \.\. 5"),
        ([0, 1, 2, 3, -1, 4, 0, 0], r"layers\.1\.route has to lead to each"),
        ([0, 1, True, 3, 2, 4, 0, 0], r"layers\.1\.route is no list"),
        ([], r"layers\.1\.route is no list"),
    ],
)
def test_a_wrong_route_is_refused(merged, tmp_path, kind, route, message):
    path = edited(merged("qwen3_moe", kind)[0], tmp_path / "x", None, lambda entry: entry.update(route=route))
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(path)


LAYER = MergedLayer("model.layers.3.mlp.experts", (0, 1, 1, 0))


def test_an_entry_is_read_as_it_was_written():
    assert read_config(json.loads(json.dumps(write_config({3: LAYER})))) == {3: LAYER}
    assert LAYER.experts == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(pairs=[]), r"layers\.3\.pairs: unknown key; known: format, prefix, route"),
        (lambda e: e.pop("route"), r"layers\.3\.route is missing"),
        (lambda e: e.update(prefix="a..b"), r"layers\.3\.prefix is 'a\.\.b'"),
        (lambda e: e.update(route=[0, 2, 1, 3]), r"layers\.3\.route leads to as many experts as the router has"),
        (lambda e: e.update(route=None), r"layers\.3\.route is no list"),
        (lambda e: e.update(format="smaller"), r"layers\.3\.format is 'smaller'; this version knows exponent, "),
    ],
)
def test_a_wrong_entry_says_where(change, message):
    entry = write_config({3: LAYER})
    change(entry["layers"]["3"])
    with pytest.raises(FormatError, match=message):
        read_config(entry)


def test_what_is_no_expert_is_not_counted_among_them():
    """Laguna keeps the correction bias of its router, of all outputs, beside the experts."""
    names = {f"{LAYER.prefix}.{expert}.up_proj.weight": (8, 4) for expert in range(2)}
    LAYER.check_files(names | {f"{LAYER.prefix}.e_score_correction_bias": (4,)})
    LAYER.check_files({f"{LAYER.prefix}.down_proj": (2, 4, 8), f"{LAYER.prefix}.e_score_correction_bias": (4,)})
    for wrong in ({f"{LAYER.prefix}.down_proj": (4, 4, 8)}, {f"{LAYER.prefix}.e_score_correction_bias": (4,)}):
        with pytest.raises(FormatError, match=r"experts: (down_proj of expert 2 is missing|no expert is)"):
            LAYER.check_files(wrong)
