"""e4m3 operands against the definition: the assembly by PTX's instructions in Python, tokens' terms in Triton."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from leveled import FORMATS, low_of, matrix
from ptx import run
from torch import Tensor

from moefold_kernels import layout_pairs, reference_pairs
from moefold_kernels.bench.weights import LEVELS
from moefold_kernels.levels import E4M3, coded, row_tables

pytest.importorskip("triton", reason="needs triton")
from moefold_kernels.triton import e4m3_decode, e4m3_stage, overlapped, plans
from moefold_kernels.triton.e4m3_launch import between, cut, prepared
from moefold_kernels.triton.layer import in_bf16
from moefold_kernels.triton.plans import Plan, Tile
from moefold_kernels.triton.weights import Leveled, Planes

ROWS, COLUMNS, GROUP = 6, 192, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_levels_of_other_numbers_are_not_coded():
    assert coded("pair4", {"up_proj": LEVELS["pair4"], "down_proj": [1.125, 3.75]})
    assert not coded("pair4", {"up_proj": LEVELS["pair4"], "down_proj": [1.0, 1.9921875]})
    assert not coded("pair4", {})
    assert row_tables("pair4", [1.0, 1.9921875])[E4M3:] == [0] * 44


def test_what_a_launch_takes_of_a_tile():
    tile = Tile("overlapped", 32, 0, 64, 256, 8, 3, terms=2, registers=128)
    none = Planes(torch.empty(0), None, torch.empty(0))
    kind = Leveled("pair6", none, none, torch.empty(0), True, 512, 384)
    assert cut(tile, kind, 512) == {"FORMAT": "pair6", "PLACES": 3, "HALVES": 2, "maxnreg": 128}
    few = Tile("overlapped", 32, 0, 64, 256, 8, 3, terms=2)
    assert cut(few, kind, 384) == {"FORMAT": "pair6", "PLACES": 3, "HALVES": 1}
    plain = Tile("overlapped", 32, 0, 64, 256, 8, 3)
    second = {"rows": 128, "columns": 128}
    assert in_bf16(Plan(tile, replace(tile, **second))) == Plan(plain, replace(plain, **second))


def operands(format: str, planes: dict[str, Tensor], row: int, group: int, slots: int, slot: int) -> Tensor:
    """e4m3 [slots, GROUP] of a row as the threads' registers lie in a product, as float64."""
    table = row_tables(format, LEVELS[format])[E4M3:]
    own = [table[4 * number] for number in range(e4m3_decode.TABLES[format])]
    states = [table[8 + 8 * each + 4 * half] for each in range(2) for half in range(2)]
    made = torch.zeros(slots, GROUP, dtype=torch.uint8)
    each = GROUP * layout_pairs.low_bits(format) // 32
    low = planes["low"][row, each * group : each * (group + 1)] if "low" in planes else torch.empty(0)
    for thread in range(4):
        for step in range(2):
            word = [int(planes["words"][row, 8 * group + 2 * thread + step])]
            moved = low_of(format, low, thread, step) if "low" in planes else []
            given = [*word, *moved, *own, *(states if slots == 2 else states[2 * slot : 2 * slot + 2])]
            found = run(e4m3_decode.assembly(format, slots), 2 * slots, given)
            for number, register in enumerate(found):
                at = 32 * step + 16 * (number % 2) + 4 * thread
                made[number // 2, at : at + 4] = torch.tensor(list(register.to_bytes(4, "little")), dtype=torch.uint8)
    return made.view(torch.float8_e4m3fn).double()


@pytest.mark.parametrize(("slots", "slot"), [(2, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("format", FORMATS)
def test_products_of_groups_are_the_definitions(format, slots, slot):
    """Threads' registers times prepared tokens, in the product's order; then scales and factors."""
    level, scale, negative, keep = matrix(format, ROWS, COLUMNS)
    planes = reference_pairs.encode(format, level, scale, negative, keep)
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    values, factors = (part.cpu() for part in prepared(x.to(DEVICE)))
    terms = values.view(3, COLUMNS // GROUP, 2, GROUP).double().sum(dim=2)
    factor = torch.tensor([row_tables(format, LEVELS[format])[E4M3 + 24]]).to(torch.int32).view(torch.float32).item()
    for number in range(slots):
        total = torch.zeros(3, ROWS, dtype=torch.float64)
        for row in range(ROWS):
            for group in range(COLUMNS // GROUP):
                made = operands(format, planes, row, group, slots, slot)[number]
                total[:, row] += terms[:, group] @ made * scale[row, group].double()
        found = total * factor * factors.double()[:, None]
        right = reference_pairs.decode(format, planes, LEVELS[format], COLUMNS, slot + number).double()
        wanted = x.double() @ right.T
        assert ((found - wanted).norm() / wanted.norm()).item() < 4e-3


def test_terms_are_close_and_the_factor_a_power_of_two():
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(2)) * torch.logspace(-30, 30, 5, base=2)[:, None]
    x[3] = 0
    x[4, 17] = 1000 * x[4].abs().max()
    x = x.bfloat16().to(DEVICE)
    values, factors = prepared(x)
    assert torch.equal(factors.log2().frac(), torch.zeros_like(factors))
    order = torch.arange(GROUP)
    column = order // 16 * 16 + order % 2 * 8 + order % 16 // 4 * 2 + order // 2 % 2
    back = torch.empty(5, 8, GROUP, dtype=torch.float64, device=DEVICE)
    back[..., column] = values.view(5, 8, 2, GROUP).double().sum(dim=2)
    error = back.flatten(1) * factors.double()[:, None] - x.double()
    largest = x.double().abs().amax(dim=1, keepdim=True)
    assert bool((error.norm(dim=1) <= (1e-3 if x.is_cuda else 2e-3) * x.double().norm(dim=1)).all())
    if x.is_cuda:  # the interpreter's e4m3 numbers are not rounded to nearest
        assert bool((error.abs() <= (x.double().abs() * 2**-8).clamp(min=largest * 2**-17)).all())
    assert not back[3].any()


def test_activations_have_a_factor_for_each_group_or_split():
    x = torch.randn(4, 640, generator=torch.Generator().manual_seed(3)).bfloat16().to(DEVICE)
    x[:, 512:] *= 37
    few, many = (Tile("overlapped", tokens, 0, 64, 256, 4, 2, terms=2, splits=2) for tokens in (4, plans.ROUNDED))
    terms, once = between(x, Plan(few, few)), prepared(x)
    assert terms is not None
    assert torch.equal(terms.values.view(torch.uint8), once.values.view(torch.uint8))
    assert torch.equal(terms.factors, once.factors[:, None].expand(4, 10))
    terms = between(x, Plan(many, many))
    assert terms is not None
    assert terms.factors.shape == (4, 2)
    for split, columns in enumerate((slice(0, 512), slice(512, 640))):
        own = prepared(x[:, columns])
        assert torch.equal(terms.factors[:, split], own.factors)
        found = terms.values.view(torch.uint8)[:, 2 * columns.start : 2 * columns.stop]
        assert torch.equal(found, own.values.view(torch.uint8))
    assert bool((terms.factors[:, 0] < terms.factors[:, 1]).all())
    assert between(x, in_bf16(Plan(many, many))) is None


def test_plans_count_shared_memory_as_kernels_take_it():
    """From so many tokens on those of steps of 256 columns have one place; plans.py does without Gluon."""
    assert e4m3_stage.THINLY.value == plans.THINLY >= plans.ROUNDED  # no factors where tokens have one place
    assert overlapped.MOST_WRITING.value == plans.MOST_WRITING
