"""A checkpoint with merged layers made by hand, and its dense twin: each group of experts is its first one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from packing import canonical, pack_layer, source_file, stock_experts
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moefold_kernels import LayerEntry, MergedLayer, write_config

ROUTE = [0, 1, 1, 2, 0, 3, 4, 1]
KINDS: dict[str, dict[int, str]] = {
    "merged": {0: "merged", 1: "merged"},
    "mixed": {0: "merged", 1: "packed"},
    "partly": {1: "merged"},
    "packed": {0: "packed", 1: "packed"},
}


def merge_checkpoint(source: Path, ours: Path, twin: Path, route: Sequence[int], kinds: Mapping[int, str]) -> None:
    """Write `ours` and its dense `twin`; `kinds` says of layers whether they are merged, or packed over merged ones."""
    config = json.loads((source / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tensors, entries = load_file(source_file(source)), dict[int, LayerEntry]()
    first = [list(route).index(expert) for expert in range(max(route) + 1)]
    for number, module in stock_experts(model).items():
        if number not in kinds:
            continue
        prefix = next(n[: n.index(".experts.") + 8] for n in tensors if f"layers.{number}." in n and ".experts." in n)
        own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{prefix}.")}
        entries[number] = MergedLayer(prefix, tuple(route))
        fewer = chosen(prefix, own, first)
        matrices = {name: weights[first].clone() for name, weights in canonical(module).items()}
        if kinds[number] == "packed":
            packed, words = pack_layer(prefix, config["model_type"], matrices, 1, number)
            entries[number] = replace(packed, route=tuple(route))
            fewer = {name: tensor for name, tensor in fewer.items() if name.endswith("_bias")} | words
        tensors |= fewer
        for name, weights in canonical(module).items():
            weights.copy_(matrices[name][list(route)])
        for name, bias in module.named_parameters():
            if name.endswith("_bias"):
                bias.data = bias.data[first][list(route)]
    ours.mkdir()
    save_file(tensors, ours / "model.safetensors", metadata={"format": "pt"})
    (ours / "config.json").write_text(json.dumps(config | {"quantization_config": write_config(entries)}, indent=2))
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", ours)
    model.save_pretrained(twin)


def chosen(prefix: str, own: Mapping[str, Tensor], experts: Sequence[int]) -> dict[str, Tensor]:
    """The named experts of a layer's own tensors, numbered from 0."""
    found: dict[str, Tensor] = {}
    for name, tensor in own.items():
        match = re.fullmatch(re.escape(prefix) + r"\.(\d+)\.(.+)", name)
        if match is None:
            found[name] = tensor[list(experts)].contiguous()
        elif int(match[1]) in experts:
            found[f"{prefix}.{list(experts).index(int(match[1]))}.{match[2]}"] = tensor
    return found
