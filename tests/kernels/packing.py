"""A packed checkpoint made by hand, and its dense twin: what the save stage writes, written without it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from leveled import levels_of, matrix
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moefold_kernels import PackedLayer, decode, encode, layout, reference_pairs, write_config

SOURCE_NAMES = {"mixtral": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}}
STANDARD = {name: name for name in ("gate_proj", "up_proj", "down_proj")}


def canonical(experts: Any) -> dict[str, Tensor]:
    """A stock experts module's matrices, [expert, rows, columns], whatever its layout (views)."""
    gate_up, down = experts.gate_up_proj.data, experts.down_proj.data
    if experts.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    inner = down.shape[2]
    if experts.is_concatenated:
        return {"gate_proj": gate_up[:, :inner], "up_proj": gate_up[:, inner:], "down_proj": down}
    return {"gate_proj": gate_up[:, 0::2], "up_proj": gate_up[:, 1::2], "down_proj": down}


def stock_experts(model: Any) -> dict[int, Any]:
    """The experts modules by decoder layer."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate"):
            found[int(re.search(r"layers\.(\d+)\.", name).group(1))] = module
    return found


def merge(weights: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two experts [2, rows, columns] merged at random: (magnitude, negative, keep) with every mask present."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(4, weights.shape[1:], generator=generator)  # shared, own, other, neither
    keep = torch.stack([(choice == 0) | (choice == 1), (choice == 0) | (choice == 2)])
    magnitude = torch.where(choice == 0, weights.float().abs().mean(0), weights.float().abs()[0])
    magnitude = torch.where(choice == 2, weights.float().abs()[1], magnitude)
    return magnitude, weights < 0, keep


def pack_checkpoint(
    source: Path,
    packed: Path,
    twin: Path,
    *,
    alone: int = 0,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    format: str = layout.EXPONENT,
) -> None:
    """Write `packed` and its dense `twin`; `layers` are packed (default all with experts), the others are stock."""
    config = json.loads((source / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with safe_open(source_file(source), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    entries: dict[int, PackedLayer] = {}
    for number, module in stock_experts(model).items():
        if layers is not None and number not in layers:
            continue
        prefix = next(n[: n.index(".experts.") + 8] for n in tensors if f"layers.{number}." in n and ".experts." in n)
        entry, new = pack_layer(prefix, config["model_type"], canonical(module), alone, seed + number, format)
        entries[number] = entry
        gone = re.compile(re.escape(prefix) + r"\.(\d+\.\w+\.weight|gate_up_proj|down_proj)$")
        tensors = {name: value for name, value in tensors.items() if not gone.match(name)} | new
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": write_config(entries)}, indent=2))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, packed / name)
    model.save_pretrained(twin)


def pack_layer(
    prefix: str, family: str, matrices: dict[str, Tensor], alone: int, seed: int, format: str = layout.EXPONENT
) -> tuple[PackedLayer, Any]:
    """Pack one layer, and write the decoded weights back into `matrices`."""
    experts = matrices["down_proj"].shape[0]
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed)).tolist()
    dense, rest = tuple(sorted(order[:alone])), order[alone:]
    pairs = tuple((rest[i], rest[i + 1]) for i in range(0, len(rest), 2))
    entry = PackedLayer(prefix, {}, pairs, dense, SOURCE_NAMES.get(family, STANDARD), format)
    if format == layout.EXPONENT:
        entry = replace(entry, window={name: top_of(w[rest]) for name, w in matrices.items()})
    else:
        entry = replace(entry, levels=dict.fromkeys(matrices, levels_of(format)))
    new = {entry.tripwire: torch.empty(0, dtype=torch.bfloat16)}
    for name, weights in matrices.items():
        for index, pair in enumerate(pairs):
            members = list(pair)
            parts, weights[members] = _code(entry, name, weights[members], seed + index)
            new |= {entry.packed(index, name, part): tensor for part, tensor in parts.items()}
        new |= {entry.alone(index, name): weights[e].contiguous().clone() for index, e in enumerate(dense)}
    return entry, new


def _code(entry: PackedLayer, name: str, weights: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """One matrix of a pair [2, rows, columns] as the files have it, and what both slots read."""
    if entry.format == layout.EXPONENT:
        words, _ = encode(*merge(weights, seed), entry.window[name])
        return {"words": words}, torch.stack([decode(words, entry.window[name], slot) for slot in (0, 1)])
    rows, columns = weights.shape[1:]
    level, scale, _, keep = matrix(entry.format, rows, columns, seed)
    planes = reference_pairs.encode(entry.format, level, scale * 0.1, weights < 0, keep)
    levels = entry.levels[name]
    read = [reference_pairs.decode(entry.format, planes, levels, columns, slot) for slot in (0, 1)]
    return reference_pairs.stored(entry.format, planes, columns), torch.stack(read)


def top_of(weights: Tensor) -> int:
    """The largest biased bf16 exponent."""
    return int(weights.abs().max().to(torch.bfloat16).view(torch.int16)) >> 7


def source_file(source: Path) -> Path:
    """The only shard of a checkpoint."""
    (path,) = source.glob("*.safetensors")
    return path
