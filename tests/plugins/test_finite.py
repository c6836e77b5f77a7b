"""NaN in a checkpoint is an error that says where, and never a loss of `nan` with exit code 0."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import samples, tiny
from moefold import Activity, Checkpoint, Context, Groups, Text
from moefold.errors import StageError
from moefold_plugins.averaging import average
from moefold_plugins.calibrate import forward, observe
from moefold_plugins.damage import damage_pairs
from moefold_plugins.evaluate import evaluate_baseline, perplexity
from moefold_plugins.finite import is_finite
from moefold_plugins.pruning import prune_reap

CONTEXT = Context(torch.device("cpu"), torch.Generator())
TEXT = Text("random", samples(6, 24).int())


def broken(path: Path, name: str) -> Checkpoint:
    """A model of two layers with one NaN in a tensor."""
    file = tiny("qwen3_moe", path, num_hidden_layers=2, shard_size="1GB") / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return Checkpoint.open(str(path))


def entering(checkpoint: Checkpoint) -> list[Any]:
    """What enters the experts of both layers."""
    first, second = checkpoint.layers()
    one = forward(first, TEXT, None, None, CONTEXT)
    return [one, forward(second, TEXT, one, first.experts(), CONTEXT)]


def test_a_layer_that_gives_nan(tmp_path: Path) -> None:
    checkpoint = broken(tmp_path / "a", "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(StageError, match=r"^what enters the experts is not finite; check the checkpoint"):
        entering(checkpoint)
    with pytest.raises(StageError, match=r"^what decoder layer 0 gives is not finite; "):
        evaluate_baseline(checkpoint, (TEXT,), CONTEXT)


def test_a_router_with_nan(tmp_path: Path) -> None:
    checkpoint = broken(tmp_path / "a", "model.layers.0.mlp.gate.weight")
    with pytest.raises(StageError, match=r"^the router's weights are not finite; "):
        entering(checkpoint)


def test_an_expert_with_nan(tmp_path: Path) -> None:
    checkpoint = broken(tmp_path / "a", "model.layers.1.mlp.experts.6.up_proj.weight")
    layer, routed = checkpoint.layers()[1], entering(checkpoint)[1]
    with pytest.raises(StageError, match=r"^what experts 6 multiply is not finite; "):
        observe(layer, routed, layer.experts(), CONTEXT)
    with pytest.raises(StageError, match=r"^what merging experts would cost, .* is not finite; "):
        damage_pairs(layer, TEXT, routed, layer.experts(), None, CONTEXT)
    with pytest.raises(StageError, match=r"^the mean of experts 1, 6 is not finite; "):
        average(layer.experts(), Groups([[1, 6]], [0, 2, 3, 4, 5, 7]), CONTEXT)
    with pytest.raises(StageError, match=r"^the saliency of experts is not finite; "):
        prune_reap(layer, routed, CONTEXT)


def test_down_with_nan_is_seen_where_it_is_merged(tmp_path: Path) -> None:
    checkpoint = broken(tmp_path / "a", "model.layers.1.mlp.experts.6.down_proj.weight")
    layer, routed = checkpoint.layers()[1], entering(checkpoint)[1]
    found = observe(layer, routed, layer.experts(), CONTEXT)
    assert isinstance(found, Activity)
    with pytest.raises(StageError, match=r"^the mean of experts 6 is not finite; "):
        average(layer.experts(), Groups([[0, 1]], [2, 3, 4, 5, 6, 7]), CONTEXT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite(value: float) -> None:
    assert is_finite(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    assert is_finite(torch.empty(0))
    assert not is_finite(torch.tensor([1.0, value], dtype=torch.bfloat16))


def test_a_perplexity_that_no_float_holds() -> None:
    assert perplexity(1000.0) == math.inf
    assert perplexity(0.0) == 1.0
