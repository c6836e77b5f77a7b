"""A matrix's levels in the few-bit pair formats, as the kernels take them: 32-bit integers for a module's buffer.

The first eight are what triton/leveled_decode.py looks up: the two levels of pair4, each twice; high bytes of eight
levels, then their low bytes (pair5, pair6); those of the eight pieces' beginnings and steps (pair8). The other 32 are
the bf16 bits of all levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moefold_kernels import layout_pairs

INTEGERS = 40
"""Of a matrix in `row_tables`."""


def row_tables(format: str, levels: Sequence[float]) -> list[int]:
    """One matrix's levels as the kernels' 32-bit integers: for the assembly, then all levels' bf16 bits."""
    bits = _bits(levels)
    if format == "pair4":
        made = [low | low << 16 for low in bits]
    elif format == "pair8":
        begins, steps = layout_pairs.pieces(levels)
        made = [*_bytes(_bits(begins)), *_bytes(_bits(steps))]
    else:
        made = _bytes(bits + [0] * (8 - len(bits)))
    return [*made, *[0] * (8 - len(made)), *bits, *[0] * (32 - len(bits))]


def layer_tables(format: str, levels: Mapping[str, Sequence[float]]) -> Tensor:
    """[3, 40] int32: of gate (without one, of up again), up and down."""
    up, down = levels["up_proj"], levels["down_proj"]
    rows = [row_tables(format, one) for one in (levels.get("gate_proj", up), up, down)]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(torch.int32)


def _bits(values: Sequence[float]) -> list[int]:
    return [one & 0xFFFF for one in torch.tensor(values, dtype=torch.bfloat16, device="cpu").view(torch.int16).tolist()]


def _bytes(bits: Sequence[int]) -> list[int]:
    """High bytes of eight bf16 numbers in two integers, then their low bytes."""
    rows = bytes(one >> 8 for one in bits), bytes(one & 255 for one in bits)
    return [int.from_bytes(row[at : at + 4], "little", signed=True) for row in rows for at in (0, 4)]
