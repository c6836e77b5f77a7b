"""A matrix's levels in the few-bit pair formats, as the kernels take them: 32-bit integers for a module's buffer.

The first eight are what triton/leveled_decode.py looks up: the two levels of pair4, each twice; high bytes of eight
levels, then their low bytes (pair5, pair6); those of the eight pieces' beginnings and steps (pair8). The next 32 are
the bf16 bits of all levels. Then comes what triton/leveled_lookup.py looks up (`look_up`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moefold_kernels import layout, layout_pairs
from moefold_kernels.layout_pairs import ALONE, NIBBLE, STATE_BITS

NUMBERS = 40
"""Integers of a matrix before those of `look_up`."""
INTEGERS = NUMBERS + 512
"""Of a matrix in `row_tables`."""
FACTOR = 2.0
"""Of every operand that the kernels for Hopper make: 2 is a bf16 of which the low byte is zero."""
ENTRIES = {"pair4": 256, "pair5": 32, "pair6": 64, "pair8": 256}
"""Of a format's table: pair4 looks two positions up by their byte, the others one by all of its bits."""


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
    row = [*made, *[0] * (8 - len(made)), *bits, *[0] * (32 - len(bits)), *look_up(format, levels)]
    return [*row, *[0] * (INTEGERS - len(row))]


def look_up(format: str, levels: Sequence[float]) -> list[int]:
    """The table of what positions read, FACTOR times their level with their sign, or 0: pairs of bf16 numbers.

    pair4: for each byte of `words`, which is two columns, what slot 0 reads there, and what slot 1 does. The others:
    for each nibble of `words`, with the bits of `low` above it, what slots 0 and 1 read. Multiplied by a scale they are
    FACTOR times the definition's values, rounded once as those are (where nothing is subnormal).
    """
    bits = _bits([FACTOR * level for level in levels])
    low = layout_pairs.low_bits(format)

    def read(slot: int, code: int) -> int:
        state, top = code & ALONE * 2 - 1, code >> STATE_BITS & 1
        if state < ALONE:
            negative = state >> slot & 1
        elif (state - ALONE) >> 1 == slot:
            negative = state & 1
        else:
            return 0
        return bits[top << low | code >> NIBBLE] | negative << 15

    slots, entries = range(layout.SLOTS), range(ENTRIES[format])
    if low:
        return [read(0, code) | read(1, code) << 16 for code in entries]
    return [read(slot, code & 15) | read(slot, code >> NIBBLE) << 16 for code in entries for slot in slots]


def layer_tables(format: str, levels: Mapping[str, Sequence[float]]) -> Tensor:
    """[3, INTEGERS] int32: of gate (without one, of up again), up and down."""
    up, down = levels["up_proj"], levels["down_proj"]
    rows = [row_tables(format, one) for one in (levels.get("gate_proj", up), up, down)]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(torch.int32)


def _bits(values: Sequence[float]) -> list[int]:
    return [one & 0xFFFF for one in torch.tensor(values, dtype=torch.bfloat16, device="cpu").view(torch.int16).tolist()]


def _bytes(bits: Sequence[int]) -> list[int]:
    """High bytes of eight bf16 numbers in two integers, then their low bytes."""
    rows = bytes(one >> 8 for one in bits), bytes(one & 255 for one in bits)
    return [int.from_bytes(row[at : at + 4], "little", signed=True) for row in rows for at in (0, 4)]
