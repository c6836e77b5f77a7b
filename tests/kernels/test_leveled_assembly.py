"""bf16 operands of the few-bit formats against the definition, bit by bit, by PTX's instructions in Python."""

from __future__ import annotations

import pytest
import torch
from leveled import FORMATS, low_of, matrix, uneven
from ptx import run
from torch import Tensor

from moefold_kernels import layout_pairs, reference_pairs
from moefold_kernels.bench.weights import LEVELS
from moefold_kernels.levels import E4M3, FACTORS, row_tables

pytest.importorskip("triton", reason="needs triton")
from moefold_kernels.triton import leveled_decode

ROWS, COLUMNS, GROUP = 6, 192, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [("pair4", "uneven"), ("pair5", "uneven"), ("pair6", "uneven"), *((format, "fp8") for format in FORMATS)]


def levels_of(format: str, kind: str) -> list[float]:
    return torch.tensor(uneven(format)).bfloat16().tolist() if kind == "uneven" else list(LEVELS[format])


def bf16(registers: list[int]) -> Tensor:
    """The two of each register, lower half first."""
    return torch.tensor([half for one in registers for half in (one & 0xFFFF, one >> 16)]).short().view(torch.bfloat16)


def operands(
    format: str,
    table: list[int],
    planes: dict[str, Tensor],
    place: tuple[int, int],
    slots: int,
    slot: int,
    scaled: bool = True,
):
    """bf16 [slots, GROUP] of a row and a group as the threads' registers lie in a product."""
    row, group = place
    first = 2 * slot if format == "pair8" else 0  # a slot's own; the levels are both slots'
    own = [table[4 * (first + number)] for number in range(leveled_decode.tables_of(format, slots))]
    begins = FACTORS if format == "pair8" and slots == 2 else 16
    states = [table[begins + 8 * each + 4 * half] for each in range(2) for half in range(2)]
    one = int(planes["scale"][row, group]) & 0xFFFF
    both = one << 16 | 0x1234 if group % 2 else 0x12340000 | one
    scale = run(leveled_decode.scale_assembly(format, group % 2, slots), 1, [both]) if scaled else []
    made = torch.zeros(slots, GROUP, dtype=torch.bfloat16)
    each = GROUP * layout_pairs.low_bits(format) // 32
    low = planes["low"][row, each * group : each * (group + 1)] if "low" in planes else torch.empty(0)
    for thread in range(4):
        for word in range(2):
            given = [int(planes["words"][row, 8 * group + 2 * thread + word])]
            given += low_of(format, low, thread, word) if "low" in planes else []
            given += [*scale, *own, *(states if slots == 2 else states[2 * slot : 2 * slot + 2])]
            found = run(leveled_decode.assembly(format, slots, scaled), 4 * slots, given)
            for number, register in enumerate(found):
                four, half = number // 2 % 2, number % 2
                at = 32 * word + 16 * four + 8 * half + 2 * thread
                made[number // 4, at : at + 2] = bf16([register])
    return made


@pytest.mark.parametrize(("slots", "slot"), [(2, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize(("format", "kind"), CASES)
def test_registers_are_the_definitions(format, kind, slots, slot):
    """In the order of columns; what a slot does not read is next to nothing."""
    levels = levels_of(format, kind)
    planes = reference_pairs.encode(format, *matrix(format, ROWS, COLUMNS, seed=3))
    table = row_tables(format, levels)
    factor = 1.0
    if format == "pair8":  # what leveled.py multiplies sums with
        factor = torch.tensor([table[E4M3 + 24]]).to(torch.int32).view(torch.float32).item()
        factor *= 2.0 ** (120 - leveled_decode.SCALE_EXPONENT)
    for number in range(slots):
        right = reference_pairs.decode(format, planes, levels, COLUMNS, slot + number)
        for row in range(ROWS):
            for group in range(COLUMNS // GROUP):
                found = operands(format, table, planes, (row, group), slots, slot)[number].double() * factor
                wanted = right[row, GROUP * group : GROUP * (group + 1)].double()
                if format == "pair8":  # the factor is not rounded with them, and level 0 stands for zero
                    scale = planes["scale"].view(torch.bfloat16)[row, group].double()
                    assert bool(((found - wanted).abs() <= wanted.abs() * 2**-7 + levels[0] * scale).all())
                    assert not found[wanted == 0].any()
                    continue
                assert torch.equal(found[wanted != 0], wanted[wanted != 0])
                assert bool((found[wanted == 0].abs() < 2.0**-124).all())


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize(("format", "kind"), CASES)
def test_registers_without_scales(format, kind, slot):
    """Levels, or pair8's numbers, for sums that are multiplied with a scale."""
    levels = levels_of(format, kind)
    planes = reference_pairs.encode(format, *matrix(format, ROWS, COLUMNS, seed=3))
    table = row_tables(format, levels)
    factor = 1.0
    if format == "pair8":
        factor = torch.tensor([table[E4M3 + 24]]).to(torch.int32).view(torch.float32).item()
        factor *= 2.0 ** (120 - leveled_decode.SCALE_EXPONENT)
    right = reference_pairs.decode(format, planes, levels, COLUMNS, slot).double()
    scales = planes["scale"].view(torch.bfloat16).double()
    for row in range(ROWS):
        for group in range(COLUMNS // GROUP):
            made = operands(format, table, planes, (row, group), 1, slot, scaled=False)[0].double()
            found, wanted = made * factor * scales[row, group], right[row, GROUP * group : GROUP * (group + 1)]
            least = levels[0] * scales[row, group] if format == "pair8" else 2.0**-124
            assert bool(((found - wanted).abs() <= wanted.abs() * 2**-8 + least).all())
            assert made.any()
