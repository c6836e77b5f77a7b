"""A layer's experts into words in one pass over each matrix: who can, why not, and how a layer goes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moefold_kernels.errors import FormatError
from moefold_kernels.reference import PACK_COUNTS

DEVICE_WORDS = 1 << 27
"""At most so many words (256 MiB) are on the device at once, or one pair's: they leave for the CPU chunk by chunk."""


class PackedMatrices(NamedTuple):
    """A layer's matrices in format `exponent`, by name."""

    words: dict[str, Tensor]  # [pair, rows, columns] int16 on the CPU
    tops: dict[str, int]
    """The windows' tops; 255 where a weight is not finite as bf16, and words mean nothing."""
    counts: dict[str, list[int]]
    """`reference.PACK_COUNTS`; words mean nothing where `broken` is not 0."""


def can_pack(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, str]:
    """Whether the fused pass takes such weights there, and why not."""
    if device.type != "cuda":
        return False, "the fused pass is for CUDA devices"
    if torch.version.hip is not None:
        return False, "the fused pass was never tried on ROCm"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False, f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    try:
        from moefold_kernels.triton.pack import SOURCES
    except ImportError as error:
        return False, f"triton cannot be imported: {error}"
    if dtype not in SOURCES:
        return False, f"weights are {dtype}, not one of {', '.join(map(str, SOURCES))}"
    return True, "one fused Triton pass"


def pack_matrices(
    matrices: Mapping[str, Tensor],
    pairs: Sequence[Sequence[int]],
    norms: Mapping[str, Tensor],
    threshold: float,
    window: int | None = None,
) -> PackedMatrices:
    """Merge by the dual mask and encode every pair of a layer, as `reference.pack_pairs` defines it.

    `matrices` [expert, rows, columns] by name (views will do), `norms` [expert, columns] float32 by the same names.
    Where `window` is None, a matrix's window ends at the exponent of its largest paired weight. Tops and counts stay on
    the device until everything is launched: one transfer a layer beside the words'.
    """
    from moefold_kernels.triton.pack import largest_exponent, pack_pairs

    some = next(iter(matrices.values()))
    if any(len(pair) != 2 or not all(0 <= expert < len(some) for expert in pair) for pair in pairs):
        raise FormatError(f"pairs are two experts of 0 to {len(some) - 1} each, and these are {pairs}")
    device = some.device
    index = torch.tensor([list(pair) for pair in pairs], dtype=torch.int32, device=device)  # [pair, 2]
    state = torch.zeros(len(matrices), 1 + len(PACK_COUNTS), dtype=torch.int64, device=device)  # a top, then counts
    state[:, 0] = window or 1
    words: dict[str, Tensor] = {}
    for (name, weights), row in zip(matrices.items(), state, strict=True):
        if window is None:
            largest_exponent(weights, index.view(-1), row[:1])
        own = norms[name].to(device).contiguous()
        out = torch.empty(len(pairs), *weights.shape[1:], dtype=torch.int16)
        most = max(DEVICE_WORDS // weights[0].numel(), 1)
        for part, place in zip(index.split(most), out.split(most), strict=True):
            place.copy_(pack_pairs(weights, part, own, threshold, row[:1], counts=row[1:])[0])
        words[name] = out
    found = dict(zip(matrices, state.tolist(), strict=True))
    return PackedMatrices(words, {n: v[0] for n, v in found.items()}, {n: v[1:] for n, v in found.items()})
