"""Random experts: pairs in words, from which every contender's weights are decoded, so all compute the same layer."""

from __future__ import annotations

import torch

from moefold_kernels import layout
from moefold_kernels.bench.cases import Shape
from moefold_kernels.reference import PackedExperts, encode

OWN = 0.26
"""Share of positions that one expert keeps alone; the other as many, and the rest is shared (Gaussians at tau 0.4)."""


def random_experts(shape: Shape, generator: torch.Generator) -> PackedExperts:
    """A layer of random pairs: half-normal magnitudes of deviation 1 / sqrt(columns), random signs, 48/26/26 % masks.

    They are drawn as merged words rather than merged from two experts: the same bits as far as a kernel can tell, in
    seconds on a GPU. Whole matrices at a time: the largest shape takes about 10 GB while it is made.
    """
    sizes = {
        "gate_proj": (shape.inner, shape.hidden),
        "up_proj": (shape.inner, shape.hidden),
        "down_proj": (shape.hidden, shape.inner),
    }
    words, window = {}, {}
    for name, (rows, columns) in sizes.items():
        words[name], window[name] = _random_words((shape.experts // 2, rows, columns), generator)
    order = torch.randperm(shape.experts, generator=generator, device=generator.device)
    return PackedExperts(words, {}, window, order.view(-1, layout.SLOTS).tolist(), ())


def _random_words(size: tuple[int, int, int], generator: torch.Generator) -> tuple[torch.Tensor, int]:
    device = generator.device
    magnitude = torch.randn(size, generator=generator, device=device).abs_().mul_(size[-1] ** -0.5)
    largest = magnitude.amax().bfloat16().view(torch.int16)
    top = int(largest) >> layout.FRACTION_BITS  # after rounding, so nothing is clipped
    negative = torch.randint(2, (layout.SLOTS, *size), generator=generator, device=device, dtype=torch.uint8).bool()
    place = torch.rand(size, generator=generator, device=device)
    keep = torch.stack([place < 1 - OWN, place >= OWN])
    return encode(magnitude, negative, keep, top)[0], top
