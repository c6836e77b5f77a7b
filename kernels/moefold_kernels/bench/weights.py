"""Random experts: pairs in words, from which every contender's weights are decoded, so all compute the same layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moefold_kernels import eighths, layout, layout_pairs
from moefold_kernels.bench.cases import Shape
from moefold_kernels.reference import PackedExperts, encode
from moefold_kernels.reference_pairs import LeveledExperts

LEVELS = {
    "pair4": [0.5625, 1.875],
    "pair5": [0.3125, 0.75, 1.25, 1.875],
    "pair6": [0.125, 0.375, 0.625, 0.875, 1.125, 1.375, 1.625, 1.875],
    "pair8": list(eighths.scaled(range(32), 32.0)),
}
"""Levels as models have them: numbers of eighths.py."""
OWN = 0.26
"""Share of positions that one expert keeps alone; the other as many, and the rest is shared (Gaussians at tau 0.4)."""


def random_experts(shape: Shape, generator: torch.Generator, format: str = layout.EXPONENT) -> PackedExperts:
    """A layer of random pairs: half-normal magnitudes of deviation 1 / sqrt(columns), random signs, 48/26/26 % masks.

    They are drawn as merged words rather than merged from two experts: the same bits as far as a kernel can tell, in
    seconds on a GPU. Whole matrices at a time: the largest shape takes about 10 GB while it is made.
    """
    sizes = {
        "gate_proj": (shape.inner, shape.hidden),
        "up_proj": (shape.inner, shape.hidden),
        "down_proj": (shape.hidden, shape.inner),
    }
    if format != layout.EXPONENT:
        return _random_levels(shape, format, sizes, generator)
    words, window = {}, {}
    for name, (rows, columns) in sizes.items():
        words[name], window[name] = _random_words((shape.experts // 2, rows, columns), generator)
    return PackedExperts(words, {}, window, _pairs(shape, generator), ())


def _random_words(size: tuple[int, int, int], generator: torch.Generator) -> tuple[torch.Tensor, int]:
    device = generator.device
    magnitude = torch.randn(size, generator=generator, device=device).abs_().mul_(size[-1] ** -0.5)
    largest = magnitude.amax().bfloat16().view(torch.int16)
    top = int(largest) >> layout.FRACTION_BITS  # after rounding, so nothing is clipped
    negative = torch.randint(2, (layout.SLOTS, *size), generator=generator, device=device, dtype=torch.uint8).bool()
    place = torch.rand(size, generator=generator, device=device)
    keep = torch.stack([place < 1 - OWN, place >= OWN])
    return encode(magnitude, negative, keep, top)[0], top


def _pairs(shape: Shape, generator: torch.Generator) -> list[list[int]]:
    order = torch.randperm(shape.experts, generator=generator, device=generator.device)
    pairs: list[list[int]] = order.view(-1, layout.SLOTS).tolist()
    return pairs


def _random_levels(
    shape: Shape, format: str, sizes: Mapping[str, tuple[int, int]], generator: torch.Generator
) -> LeveledExperts:
    """Any bits are words of the few-bit formats: all states and levels as often as one another."""
    device = generator.device
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, (rows, columns) in sizes.items():
        for part, lines in layout_pairs.stored(format, rows, columns).items():
            size = (shape.experts // 2, *lines)
            if part == "scale":
                drawn = torch.rand(size, generator=generator, device=device).add_(0.5).mul_(columns**-0.5)
                made = drawn.bfloat16().view(torch.int16)
            else:
                made = torch.randint(-(2**31), 2**31, size, generator=generator, device=device, dtype=torch.int32)
            parts.setdefault(part, {})[name] = made
    levels = dict.fromkeys(sizes, LEVELS[format])
    rest = format, parts.get("low", {}), parts["scale"], levels, {name: size[1] for name, size in sizes.items()}
    return LeveledExperts(parts["words"], {}, {}, _pairs(shape, generator), (), *rest)
