"""The assembly for the few-bit formats against the definition, bit by bit, by a few instructions of PTX in Python."""

from __future__ import annotations

import pytest
import torch
from leveled import FORMATS, matrix, uneven
from ptx import run

from moefold_kernels import layout_pairs, reference_pairs
from moefold_kernels.levels import ENTRIES, FACTOR, NUMBERS, layer_tables, look_up, row_tables

pytest.importorskip("triton", reason="needs triton")
from moefold_kernels.triton import leveled_decode, leveled_lookup

ROWS, BASE = 12, 1024
ODD = 0x7632


def levels_of(format: str) -> list[float]:
    return torch.tensor(uneven(format)).bfloat16().tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_every_entry_of_the_table_is_the_definitions(format):
    """Every code that an entry is for, as columns of a row."""
    levels, low, entries = levels_of(format), layout_pairs.low_bits(format), ENTRIES[format]
    positions = 2 * entries if low == 0 else entries
    words = torch.zeros(1, 8 * layout_pairs.groups(positions), dtype=torch.int64)
    lows = torch.zeros(1, layout_pairs.planes(format, positions).get("low", 1), dtype=torch.int64)
    for column in range(positions):
        code = (column // 2 >> 4 * (column % 2) & 15) if low == 0 else column
        words[0, column // 8] |= (code & 15) << 4 * (column % 8)
        if low:
            across = 32 // low
            lows[0, column // across] |= code >> 4 << 4 * (column % 8) + low * (column % across // 8)
    planes = {"words": words.to(torch.int32), "scale": torch.ones(1, layout_pairs.groups(positions)).bfloat16()}
    planes |= {"scale": planes["scale"].view(torch.int16)} | ({"low": lows.to(torch.int32)} if low else {})
    found = torch.tensor(look_up(format, levels)).to(torch.int32).view(torch.bfloat16).view(entries, -1, 2)
    for slot in range(2):
        right = FACTOR * reference_pairs.decode(format, planes, levels, positions, slot)[0]
        assert torch.equal(found[:, 0, slot] if low else found[:, slot].flatten(), right)


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


@pytest.mark.parametrize("looked", [1, 2, 3, 4])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_look_ups(format, apart, looked):
    """Where gate and up have other levels (`apart`), the rows of the second half of 16 read the second copies.

    Of what one piece of assembly makes each part is tried with the same operands, and gives the same.
    """
    levels = levels_of(format)
    other = [2 * level for level in levels] if apart else levels
    table = layer_tables(format, {"gate_proj": levels, "up_proj": other, "down_proj": levels})
    lists = table[:, NUMBERS:].tolist()
    memories = {(slots, slot): filled(format, lists, slots, slot) for slots, slot in ((2, 0), (1, 0), (1, 1))}
    times = leveled_lookup.PACK[looked]

    def calculate(has, row, thread, slots, slot):
        up = apart and row % 16 >= 8
        lane, number = thread + 4 * (row % 8), 16 if format == "pair4" and slots == 2 else 32
        own = lane % (number // 2) + (number // 2 if up else 0) if apart else lane % number
        given = has["words"] + ([128 << 8 * thread] if format == "pair4" else [has["gather"][0] * 0x101])
        given += has["low"] + has["scale"] + [BASE + own * (128 // number)]
        given += [ODD if slot else 0x5410] if slots == 1 and format != "pair4" else []
        if looked < 4:
            given += has["gather"] + instructions(format, table[1 if up else 0].tolist(), has["scale"], slots, slot)
        given = [one for one in given for _ in range(times)]
        assert len(given) + 2 * slots * times == len(leveled_lookup.constraints(format, slots, looked).split(","))
        code = leveled_lookup.assembly(format, slots, looked)
        found = run(code, 2 * slots * times, given, memories[slots, slot])
        assert all(found[times * i : times * (i + 1)] == [found[times * i]] * times for i in range(2 * slots))
        return [halved(one) if up else one for one in found[::times]]

    same(format, planes_of(format), calculate)


@pytest.mark.parametrize("looked", [1, 2, 3])
def test_so_many_quarters_are_looked_up(looked):
    made = leveled_lookup.assembly("pair6", 2, looked)
    parts, pieces = made.count("ld.shared") // 4, made.count(".reg")
    assert (pieces, 4 * parts) == (leveled_lookup.PACK[looked], looked * pieces)


def filled(format: str, table: list[list[int]], slots: int, slot: int) -> dict[int, int]:
    """Shared memory as leveled_lookup.fill leaves it: eight parts of 16 bytes for each entry."""
    words, memory = 2 if format == "pair4" else 1, {}
    for entry in range(ENTRIES[format]):
        for part in range(8):
            own = table[part // 4]
            first = own[entry * words + (slot if words == 2 and slots == 1 else 0)]
            second = own[entry * words + 1] if words == 2 and slots == 2 else first
            for number, value in enumerate((first, second, first, second)):
                memory[BASE + 128 * entry + 16 * part + 4 * number] = value & 0xFFFFFFFF
    return memory


def halved(pair: int) -> int:
    """Two bf16 numbers, by 2."""
    return int((torch.tensor([pair]).to(torch.int32).view(torch.bfloat16) / 2).view(torch.int32)) & 0xFFFFFFFF
