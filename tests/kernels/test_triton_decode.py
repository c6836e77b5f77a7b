"""All 65,536 words in the kernels' registers against the definition, bit by bit."""

from __future__ import annotations

import pytest
import torch

from moefold_kernels import layout, reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from moefold_kernels.triton.decode import RESTORE, decode_both, decode_cell, decode_slot, rescale  # noqa: E402
from moefold_kernels.triton.portability import Target  # noqa: E402

TOPS = [1, 31, 32, 100, 127, 200, 254]


@triton.jit
def both_slots(words, first, second, shift, ASM: tl.constexpr, SIZE: tl.constexpr):
    """Both slots' values [SIZE] of a block, put in place by the accumulator's scale."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a, b = decode_both(tl.load(words + at), ASM)
    tl.store(first + at, rescale(a.to(tl.float32), shift))
    tl.store(second + at, rescale(b.to(tl.float32), shift))


@triton.jit
def one_slot(words, out, shift, ASM: tl.constexpr, SIZE: tl.constexpr):
    """The values of the slot that is the program number's lowest bit, [slot, ...]."""
    slot = tl.program_id(0) % 2
    at = tl.program_id(0) // 2 * SIZE + tl.arange(0, SIZE)
    value = decode_slot(tl.load(words + at), slot, ASM)
    tl.store(out + slot * 65536 + at, rescale(value.to(tl.float32), shift))


@triton.jit
def one_cell(cells, out, slot, SIZE: tl.constexpr):
    """Two words an integer, and their operands of a slot."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, decode_cell(tl.load(cells + at), slot))


@pytest.mark.parametrize("slot", [0, 1])
def test_two_words_an_integer(slot, device):
    """The operands of `decode_slot`, side by side."""
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    cells, size = torch.stack([words, words.flip(0)], 1).view(torch.int32).flatten().to(device), 2048
    out = torch.zeros_like(cells)
    one_cell[(65536 // size,)](cells, out, slot, SIZE=size)
    exact = rescaled(out.view(torch.bfloat16).view(-1, 2).cpu())
    assert_same(exact[:, 0], reference.decode(words, 127, slot))
    assert_same(exact[:, 1], reference.decode(words.flip(0), 127, slot))


def rescaled(operands):
    """Operands of a matrix whose window's top is 127, put in place."""
    return (operands.double() * RESTORE.value * 2.0 ** (layout.low(127) - 96)).bfloat16()


@pytest.mark.parametrize("top", TOPS)
def test_all_words(top, device):
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    shift, size = 2.0 ** (layout.low(top) - 96), 2048
    settings = {"ASM": Target.of(words.to(device)).assembly, "SIZE": size}
    found = torch.full((4, 65536), torch.nan, device=device)
    both_slots[(65536 // size,)](words.to(device), found[0], found[1], shift, **settings)
    one_slot[(2 * 65536 // size,)](words.to(device), found[2:], shift, **settings)
    for row, slot in enumerate((0, 1, 0, 1)):
        exact = found[row].cpu()
        assert torch.equal(exact, exact.bfloat16().float())
        assert_same(exact.bfloat16(), reference.decode(words, top, slot), top)
        assert not exact[words == 0].any()  # that neither slot keeps


def assert_same(found: torch.Tensor, right: torch.Tensor, top: int = 127) -> None:
    """The same bits; what a slot does not keep is next to nothing beside the smallest weight that it could."""
    zero = right == 0
    assert torch.equal(found[~zero].view(torch.int16), right[~zero].view(torch.int16))
    smallest = 2.0 ** (layout.low(top) - 127)
    assert bool((found[zero].double().abs() <= 2.0**-32 * smallest).all())
