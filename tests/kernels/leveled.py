"""Random matrices in the few-bit pair formats."""

from __future__ import annotations

import torch

from moefold_kernels import layout_pairs

FORMATS = tuple(layout_pairs.MAGNITUDE_BITS)


def levels_of(format: str) -> tuple[float, ...]:
    """Levels that a format can have: evenly spaced, so on straight pieces as well."""
    return tuple((i + 1) / 16 for i in range(1 << layout_pairs.magnitude_bits(format)))


def uneven(format: str) -> list[float]:
    """Levels as they are learnt: denser where they are small; those of pair8 on pieces that double their steps."""
    count = 1 << layout_pairs.magnitude_bits(format)
    if count == 32:
        steps = [2.0 ** (piece // 2 - 5) for piece in range(8)]
        begins = [0.0625 + sum(4 * step for step in steps[:piece]) for piece in range(8)]
        return [begin + i * step for begin, step in zip(begins, steps, strict=True) for i in range(4)]
    return [0.2 * 1.9**i for i in range(count)]


def matrix(format: str, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random numbers of levels, scales, signs and keep bits."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(1 << layout_pairs.magnitude_bits(format), (rows, columns), generator=generator)
    choice = torch.randint(3, (rows, columns), generator=generator)
    scale = torch.rand(rows, layout_pairs.groups(columns), generator=generator).bfloat16()
    negative = torch.rand(2, rows, columns, generator=generator) < 0.5
    return level.to(torch.uint8), scale, negative, torch.stack([choice != 1, choice != 2])


def low_of(format: str, plane: torch.Tensor, thread: int, word: int) -> list[int]:
    """A thread's word of `low` [words] for eight columns of a group, moved as kernels move it."""
    if format == "pair8":
        return [int(plane[2 * thread + word])]
    if format == "pair6":
        return [int(plane[thread]) >> 2 * word]
    return [int(plane[thread // 2]) >> 2 * (thread % 2) + word]
