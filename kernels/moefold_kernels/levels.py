"""A matrix's levels in the few-bit pair formats, as the kernels take them: 32-bit integers for a module's buffer.

The first 32 are what triton/leveled_decode.py looks up (`operand_table`), the next 32 the bf16 bits of all levels. Then
comes what triton/e4m3_decode.py takes (`e4m3_table`), and what triton/leveled_decode.py multiplies pair8's numbers with
where it makes both slots' operands (`factor_table`). Integers that kernels look up stand there four times, so that a
thread loads one of its own and ptxas does not hold it in a uniform register, from which it has to be moved at every
use.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moefold_kernels import eighths, layout
from moefold_kernels.layout_pairs import ALONE

BITS = 32
"""Where the levels' bf16 bits begin."""
E4M3 = BITS + 32
"""Where the 28 integers for e4m3 operands begin (`e4m3_table`)."""
FACTOR = E4M3 + 24
"""Where among them the factor is, a float32's bits."""
FACTORS = E4M3 + 28
"""Where the 16 integers of `factor_table` begin."""
INTEGERS = FACTORS + 16
"""Of a matrix in `row_tables`."""
SIGN = 0x80
"""The bit of an e4m3 number."""


def row_tables(format: str, levels: Sequence[float]) -> list[int]:
    """One matrix's levels as the kernels' 32-bit integers."""
    bits = _bits(levels)
    row = [*operand_table(format, levels), *bits, *[0] * (32 - len(bits)), *e4m3_table(format, levels)]
    row += [0] * (FACTORS - len(row))
    return row + (factor_table() if format == "pair8" else [0] * (INTEGERS - FACTORS))


def operand_table(format: str, levels: Sequence[float]) -> list[int]:
    """What triton/leveled_decode.py takes, each integer four times.

    Two of the high bytes of up to eight levels, two of their low bytes, and the two of the `state_table` of either
    slot, whole numbers kept. Of pair8, whose levels' numbers are their bytes, the first four are what either slot keeps
    of lower bits in an upper nibble, and the next what it keeps of the fifth, and the sign.
    """
    if format == "pair8":
        kept = (half for slot in range(layout.SLOTS) for half in _states(slot, 0xF0, signed=False))
        return _fourfold([*kept, *(half for slot in range(layout.SLOTS) for half in _states(slot, 1))])
    bits = _bits(levels)
    states = (half for slot in range(layout.SLOTS) for half in _states(slot, SIGN - 1))
    return _fourfold([*_bytes(bits + [0] * (8 - len(bits))), *states])


def factor_table() -> list[int]:
    """High bytes of the bf16 factors 2, -2 and 0, by the state: two integers for either slot, each four times."""
    return _fourfold([half for slot in range(layout.SLOTS) for half in _states(slot, 0x40)])


def state_table(format: str, slot: int) -> tuple[int, int]:
    """What a slot looks up by a state in the e4m3 kernels: eight bytes, in two integers.

    A byte is the sign and a mask of magnitude bits, or nothing; pair4's mask is its upper level.
    """
    return _states(slot, eighths.UPPER if format == "pair4" else SIGN - 1)


def _states(slot: int, kept: int, signed: bool = True) -> tuple[int, int]:
    codes = []
    for state in range(2 * ALONE):
        shared, own = state < ALONE, (state - ALONE) >> 1 == slot
        negative = state >> (slot if shared else 0) & 1
        codes.append(kept | SIGN * (negative & signed) if shared or own else 0)
    return _integer(codes[:4]), _integer(codes[4:])


def e4m3_table(format: str, levels: Sequence[float]) -> list[int]:
    """What triton/e4m3_decode.py takes, or nothing where the levels are no e4m3 numbers (eighths.py).

    Six integers, each four times: two of levels, and the `state_table` of either slot. Then the factor, a float32's
    bits.
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
    return [*_fourfold(each), *struct.unpack("<i", struct.pack("<f", factor))]


def coded(format: str, levels: Mapping[str, Sequence[float]]) -> bool:
    """Whether every matrix's levels are e4m3 numbers times a factor, as triton/e4m3.py needs them."""
    return bool(levels) and all(eighths.codes(format, each) is not None for each in levels.values())


def layer_tables(format: str, levels: Mapping[str, Sequence[float]]) -> Tensor:
    """[3, INTEGERS] int32: of gate (without one, of up again), up and down."""
    up, down = levels["up_proj"], levels["down_proj"]
    rows = [row_tables(format, one) for one in (levels.get("gate_proj", up), up, down)]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(torch.int32)


def _fourfold(integers: Sequence[int]) -> list[int]:
    return [one for one in integers for _ in range(4)]


def _bits(values: Sequence[float]) -> list[int]:
    return [one & 0xFFFF for one in torch.tensor(values, dtype=torch.bfloat16, device="cpu").view(torch.int16).tolist()]


def _integer(codes: Sequence[int]) -> int:
    return int.from_bytes(bytes([*codes, *[0] * (4 - len(codes))]), "little", signed=True)


def _bytes(bits: Sequence[int]) -> list[int]:
    """High bytes of eight bf16 numbers in two integers, then their low bytes."""
    rows = bytes(one >> 8 for one in bits), bytes(one & 255 for one in bits)
    return [int.from_bytes(row[at : at + 4], "little", signed=True) for row in rows for at in (0, 4)]
