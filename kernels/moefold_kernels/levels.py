"""A matrix's levels in the few-bit pair formats, as the kernels take them: 32-bit integers for a module's buffer.

The first eight are what triton/leveled_decode.py looks up: the two levels of pair4, each twice; high bytes of eight
levels, then their low bytes (pair5, pair6); those of the eight pieces' beginnings and steps (pair8). The next 32 are
the bf16 bits of all levels. Then comes what triton/e4m3_decode.py takes (`e4m3_table`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moefold_kernels import eighths, layout, layout_pairs
from moefold_kernels.layout_pairs import ALONE

E4M3 = 40
"""Where the 28 integers for e4m3 operands begin (`e4m3_table`)."""
INTEGERS = E4M3 + 28
"""Of a matrix in `row_tables`."""
SIGN = 0x80
"""The bit of an e4m3 number."""
FACTOR = 2.0
"""Of every bf16 operand that leveled.py makes: 2 is a bf16 of which the low byte is zero."""


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
    row = [*made, *[0] * (8 - len(made)), *bits, *[0] * (32 - len(bits))]
    row = [*row, *[0] * (E4M3 - len(row)), *e4m3_table(format, levels)]
    return [*row, *[0] * (INTEGERS - len(row))]


def state_table(format: str, slot: int) -> tuple[int, int]:
    """What a slot looks up by a state in the e4m3 kernels: eight bytes, in two integers.

    A byte is the sign and a mask of magnitude bits, or nothing; pair4's mask is its upper level.
    """
    kept, codes = eighths.UPPER if format == "pair4" else SIGN - 1, []
    for state in range(2 * ALONE):
        shared, own = state < ALONE, (state - ALONE) >> 1 == slot
        negative = state >> (slot if shared else 0) & 1
        codes.append(kept | SIGN * negative if shared or own else 0)
    return _integer(codes[:4]), _integer(codes[4:])


def e4m3_table(format: str, levels: Sequence[float]) -> list[int]:
    """What triton/e4m3_decode.py takes, or nothing where the levels are no e4m3 numbers (eighths.py).

    Six integers, each four times, so that a thread loads one of its own and ptxas does not hold it in a uniform
    register, from which it has to be moved at every use: two of levels, and the `state_table` of either slot. Then the
    factor, a float32's bits.
    """
    found = eighths.codes(format, levels)
    if found is None:
        return []
    codes, factor = [SIGN | byte for byte in found[0]], found[1]
    if format == "pair4":
        own = [_integer(codes[:1] * 4), 0]
    elif format == "pair8":  # a number is its byte: what `prmt` makes 0xFF where the fifth bit is set; it and the sign
        own = [_integer([0x8F] * 4), _integer([0x90] * 4)]
    else:
        own = [_integer(codes[:4]), _integer(codes[4:])]
    each = [*own, *(half for slot in range(layout.SLOTS) for half in state_table(format, slot))]
    return [*(one for one in each for _ in range(4)), *struct.unpack("<i", struct.pack("<f", factor))]


def coded(format: str, levels: Mapping[str, Sequence[float]]) -> bool:
    """Whether every matrix's levels are e4m3 numbers times a factor, as triton/e4m3.py needs them."""
    return bool(levels) and all(eighths.codes(format, each) is not None for each in levels.values())


def layer_tables(format: str, levels: Mapping[str, Sequence[float]]) -> Tensor:
    """[3, INTEGERS] int32: of gate (without one, of up again), up and down."""
    up, down = levels["up_proj"], levels["down_proj"]
    rows = [row_tables(format, one) for one in (levels.get("gate_proj", up), up, down)]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(torch.int32)


def _bits(values: Sequence[float]) -> list[int]:
    return [one & 0xFFFF for one in torch.tensor(values, dtype=torch.bfloat16, device="cpu").view(torch.int16).tolist()]


def _integer(codes: Sequence[int]) -> int:
    return int.from_bytes(bytes([*codes, *[0] * (4 - len(codes))]), "little", signed=True)


def _bytes(bits: Sequence[int]) -> list[int]:
    """High bytes of eight bf16 numbers in two integers, then their low bytes."""
    rows = bytes(one >> 8 for one in bits), bytes(one & 255 for one in bits)
    return [int.from_bytes(row[at : at + 4], "little", signed=True) for row in rows for at in (0, 4)]
