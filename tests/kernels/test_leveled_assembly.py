"""The assembly for the few-bit formats against the definition, bit by bit, by a few instructions of PTX in Python."""

from __future__ import annotations

import pytest
import torch
from leveled import FORMATS, matrix, uneven
from ptx import run

from moefold_kernels import reference_pairs
from moefold_kernels.levels import FACTOR, row_tables

pytest.importorskip("triton", reason="needs triton")
from moefold_kernels.triton import leveled_decode

ROWS = 12


def levels_of(format: str) -> list[float]:
    return torch.tensor(uneven(format)).bfloat16().tolist()


def thread_of(format: str, planes: dict[str, torch.Tensor], row: int, unit: int, thread: int) -> dict[str, list[int]]:
    """What a thread of a group of four has of 16 columns of a row: two words, words of `low`, the scale twice."""
    words = planes["words"][row, 2 * unit : 2 * unit + 2].tolist()
    low = {
        "pair4": lambda plane: [],
        "pair5": lambda plane: [int(plane[unit // 2]) >> 2 * (unit % 2)],
        "pair6": lambda plane: [int(plane[unit])],
        "pair8": lambda plane: plane[2 * unit : 2 * unit + 2].tolist(),
    }[format](planes["low"][row] if "low" in planes else None)
    scale = int(planes["scale"][row, unit // 4]) & 0xFFFF
    return {"words": words, "gather": [thread | (thread + 4) << 4], "low": low, "scale": [scale | scale << 16]}


def same(format: str, planes: dict[str, torch.Tensor], calculate) -> None:
    """Whether `calculate` (what a thread has, row, thread, slots, slot) gives FACTOR times what the slots read."""
    levels = levels_of(format)
    right = [FACTOR * reference_pairs.decode(format, planes, levels, 128, slot) for slot in range(2)]
    for row in range(ROWS):
        for unit, thread in ((unit, thread) for unit in range(8) for thread in range(4)):
            has = thread_of(format, planes, row, unit, thread)
            columns = [16 * unit + 8 * eight + 2 * thread + i for eight in (0, 1) for i in (0, 1)]
            for slots, slot in ((2, 0), (1, 0), (1, 1)):
                found = torch.tensor(calculate(has, row, thread, slots, slot)).to(torch.int32).view(torch.bfloat16)
                wanted = torch.cat([right[slot + i][row, columns] for i in range(slots)])
                assert torch.equal(found, wanted), (row, unit, thread, slots, slot)


def instructions(format: str, table: list[int], scale: list[int], slots: int, slot: int) -> list[int]:
    """What integer instructions look up: for one slot its signs, and the row's levels, those of pair4 scaled."""
    own = table[: leveled_decode.TABLES[format]]
    if format == "pair4":
        factor = torch.tensor(scale).to(torch.int32).view(torch.bfloat16)
        scaled = [torch.tensor([one]).to(torch.int32).view(torch.bfloat16) * factor for one in own]
        own = [int(one.view(torch.int32)) for one in scaled]
    return (list(leveled_decode.SLOT_SIGNS.value[2 * slot : 2 * slot + 2]) if slots == 1 else []) + own


def planes_of(format: str) -> dict[str, torch.Tensor]:
    return reference_pairs.encode(format, *matrix(format, ROWS, 128, seed=3))


@pytest.mark.parametrize("format", FORMATS)
def test_integer_instructions(format):
    table = row_tables(format, levels_of(format))

    def calculate(has, row, thread, slots, slot):
        given = has["words"] + has["gather"] + has["low"] + (has["scale"] if format != "pair4" else [])
        given += instructions(format, table, has["scale"], slots, slot)
        return run(leveled_decode.assembly(format, slots), 2 * slots, given)

    same(format, planes_of(format), calculate)
