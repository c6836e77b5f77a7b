"""Random packed layers, batches for them, and what they give: float64, rounded nowhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from leveled import matrix, uneven
from torch import Tensor

from moefold_kernels import reference_pairs
from moefold_kernels.activation import clamped, silu
from moefold_kernels.bench.weights import LEVELS
from moefold_kernels.levels import coded as levels_coded
from moefold_kernels.levels import layer_tables
from moefold_kernels.places import tables
from moefold_kernels.reference import PackedExperts, encode
from moefold_kernels.reference_pairs import LeveledExperts

TOLERANCE = {"interpreted": 1e-2, "compiled": 5e-3, "logits": 3e-2}
"""Of ||found - expected|| / ||expected||: a layer where Triton is interpreted (there float32 becomes bf16 by cutting
bits off), a layer on a GPU, and the logits of small models in bf16, whose stock implementations differ among
themselves by up to 6e-3. An activation that is not fused rounds once more, and takes twice the layer's."""

GATED, UNGATED = ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")
TOPS = {"gate_proj": 121, "up_proj": 123, "down_proj": 125}


@dataclass(frozen=True)
class Layer:
    """A layer of experts, and biases where it has them."""

    packed: PackedExperts
    biases: tuple[Tensor, Tensor] | None = None  # [expert, 2 * inner] gate before up, [expert, hidden]

    @property
    def experts(self) -> int:
        return 2 * len(self.packed.pairs) + len(self.packed.alone)

    def to(self, device: torch.device) -> Layer:
        move = lambda matrices: {name: matrix.to(device) for name, matrix in matrices.items()}  # noqa: E731
        packed = replace(self.packed, words=move(self.packed.words), dense=move(self.packed.dense))
        return Layer(packed, None if self.biases is None else tuple(b.to(device) for b in self.biases))


def random_layer(
    experts: int, hidden: int, inner: int, alone: int = 0, *, gated: bool = True, biased: bool = False, seed: int = 0
) -> Layer:
    """Every mask in equal shares; pairs and experts alone in no order; windows of three heights."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(experts, generator=generator).tolist()
    dense, rest = order[:alone], order[alone:]
    pairs = [(rest[i], rest[i + 1]) for i in range(0, len(rest), 2)]
    words, matrices = {}, {}
    for name in GATED if gated else UNGATED:
        shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
        merged = torch.rand(len(pairs), *shape, generator=generator) * 2.0 ** (TOPS[name] - 126)
        choice = torch.randint(4, merged.shape, generator=generator)
        keep = torch.stack([(choice == 0) | (choice == 1), (choice == 0) | (choice == 2)])
        negative = torch.randint(2, keep.shape, generator=generator).bool()
        words[name] = encode(merged, negative, keep, TOPS[name])[0]
        matrices[name] = (torch.randn(alone, *shape, generator=generator) * shape[1] ** -0.5).bfloat16()
    window = {name: TOPS[name] for name in words}
    packed = PackedExperts(words, matrices if alone else {}, window, pairs, dense)
    if not biased:
        return Layer(packed)
    sizes = ((2 if gated else 1) * inner, hidden)
    return Layer(packed, tuple(torch.randn(experts, n, generator=generator).bfloat16() for n in sizes))


def batch(
    tokens: int, hidden: int, top_k: int, experts: int, *, skew: float = 0.0, seed: int = 1
) -> tuple[Tensor, ...]:
    """(hidden bf16, index int64, weights float32); with `skew` nearly all entries are of the first two experts."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator)
    scores[:, :2] += skew
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    weights = torch.rand(tokens, top_k, generator=generator)
    return x, scores.topk(top_k, dim=1).indices, weights


def expected(layer: Layer, x: Tensor, index: Tensor, weights: Tensor, activate: Callable[..., Tensor] = silu) -> Tensor:
    """The layer's output; `activate` is of gate and up, or of up alone where there is no gate."""
    packed, out = layer.packed, torch.zeros(x.shape, dtype=torch.float64)
    matrices = {name: packed.unpacked(name).double().cpu() for name in packed.words}
    for expert in range(layer.experts):
        token, choice = torch.where(index.cpu() == expert)
        rows = x.cpu().bfloat16()[token].double()
        parts = [rows @ matrices[name][expert].T for name in matrices if name != "down_proj"]
        if layer.biases is not None:
            parts = [
                p + b for p, b in zip(parts, layer.biases[0][expert].double().cpu().chunk(len(parts)), strict=True)
            ]
        result = activate(*parts) @ matrices["down_proj"][expert].T
        if layer.biases is not None:
            result = result + layer.biases[1][expert].double().cpu()
        out.index_add_(0, token, result * weights.cpu().double()[token, choice][:, None])
    return out


clamped_gate = functools.partial(clamped, limit=1.5, alpha=1.702)


def leveled_layer(
    format: str, experts: int, hidden: int, inner: int, alone: int = 0, *, gated: bool = True, biased: bool = False,
    seed: int = 0, device: torch.device | str = "cpu", alike: bool = False, coded: bool = False,
) -> Layer:  # fmt: skip
    """The same in a few-bit format, with other levels for each matrix, or the same (`alike`), e4m3 ones if `coded`."""
    like = random_layer(experts, hidden, inner, alone, gated=gated, biased=biased, seed=seed)
    packed, parts, levels, columns = like.packed, {}, {}, {}
    for number, (name, words) in enumerate(packed.words.items()):
        pairs, rows, columns[name] = words.shape
        factor = 2.0 ** (-3 if alike else number - 4)  # pair8's pieces stay straight
        given = LEVELS[format] if coded else uneven(format)
        levels[name] = torch.tensor([level * factor for level in given]).bfloat16().tolist()
        drawn = [matrix(format, rows, columns[name], seed=8 * number + pair) for pair in range(pairs)]
        made = [reference_pairs.stored(format, reference_pairs.encode(format, *one), columns[name]) for one in drawn]
        parts[name] = {part: torch.stack([one[part] for one in made]).to(device) for part in made[0]}
    planes = {part: {name: held[part] for name, held in parts.items()} for part in next(iter(parts.values()))}
    rest = format, planes.get("low", {}), planes["scale"], levels, columns
    moved = Layer(replace(packed, window={}), like.biases).to(torch.device(device))
    made = LeveledExperts(planes["words"], moved.packed.dense, {}, packed.pairs, packed.alone, *rest)
    return Layer(made, moved.biases)


def operands(layer: Layer, *, interleaved: bool = False) -> Any:
    """The operations' operands."""
    from moefold_kernels.triton.operands import Operands

    packed, gated = layer.packed, "gate_proj" in layer.packed.words
    fused = lambda m: torch.cat([m["gate_proj"], m["up_proj"]], dim=1) if gated else m["up_proj"]  # noqa: E731
    dense = (fused(packed.dense), packed.dense["down_proj"]) if packed.alone else (None, None)
    device = packed.words["down_proj"].device
    places = (table.to(device) for table in tables(packed.pairs, packed.alone))
    wide, down = layer.biases or (None, None)
    if wide is not None and interleaved:
        wide = torch.stack(wide.chunk(2, dim=1), dim=2).flatten(1)
    few = ()
    if isinstance(packed, LeveledExperts):
        low = (fused(packed.low), packed.low["down_proj"]) if packed.low else (None, None)
        scale = fused(packed.scale), packed.scale["down_proj"]
        few = packed.format, *low, *scale, layer_tables(packed.format, packed.levels).to(device)
        few += (levels_coded(packed.format, packed.levels),)
    top = packed.window or {"up_proj": 127, "down_proj": 127}
    tops = [top.get("gate_proj", top["up_proj"]), top["up_proj"], top["down_proj"]]
    return Operands(
        fused(packed.words), packed.words["down_proj"], *dense, wide, down, *places, tops, gated, interleaved, *few
    )


def difference(found: Tensor, right: Tensor) -> float:
    """||found - right|| / ||right||; infinite or NaN where `found` is."""
    return ((found.cpu().double() - right.cpu().double()).norm() / right.double().norm().cpu().clamp(min=1e-30)).item()


def assert_near(found: Tensor, right: Tensor, fused: bool = True) -> None:
    """Within the tolerance of a layer on the device that `found` is on."""
    assert found.shape == right.shape
    limit = TOLERANCE["compiled" if found.is_cuda else "interpreted"] * (1 if fused else 2)
    assert difference(found, right) < limit
