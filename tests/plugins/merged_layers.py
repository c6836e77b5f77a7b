"""Layers of merged experts, packed ones over them, and checkpoints that save makes of both."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from models import samples, tiny
from moefold import Checkpoint, Experts, Layers, MergedPair, Packed, PairMerge, Provenance, Reduced, StreamedModel
from moefold.codec import pack, unpack
from moefold_plugins.codecs import Exponent
from moefold_plugins.save import save

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")
PROVENANCE = Provenance("org/model", "f" * 64, ())
IDS = samples(2, 11)
GROUPS = [[0, 3, 6], [1], [2, 7], [4], [5]]


class Made:
    """Small checkpoints by family, and what save makes of their merged experts; each made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sources: dict[str, Checkpoint] = {}
        self.directories: dict[tuple[str, str], tuple[Path, Path]] = {}

    def source(self, family: str) -> Checkpoint:
        if family not in self.sources:
            path = tiny(family, self.root / family / "source", num_hidden_layers=2)
            self.sources[family] = Checkpoint.open(str(path))
        return self.sources[family]

    def saved(self, family: str, kind: str = "merged") -> tuple[Path, Path]:
        """Directories: merged (and, `hybrid`, packed then), and its twin in which experts are repeated."""
        if (family, kind) not in self.directories:
            root, source = self.root / family / kind, self.source(family)
            values: Layers[Any] = mergers(source) if kind == "merged" else hybrids(source)
            save(source, values, None, PROVENANCE, to=root / "ours", shard_size="60KB")
            if kind == "hybrid":  # the twin is what the packed experts read
                values = Layers({n: partial(decoded, source, n, values[n]) for n in values})
            save(source, values, None, PROVENANCE, to=root / "twin", export="expanded")
            self.directories[family, kind] = root / "ours", root / "twin"
        return self.directories[family, kind]


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
