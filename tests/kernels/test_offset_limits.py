"""Kernels whose offsets are 32 bits refuse what does not fit, to the element; tensors without memory tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from moefold_kernels.triton import by_entry_launch, leveled_launch, streamed_launch
from moefold_kernels.triton.weights import Projections

HIDDEN, INNER, ROW = 256, 128, 2**31 // 128


def strided(rows: int, columns: int, stride: int) -> Tensor:
    return torch.empty_strided((2, rows, columns), (rows * stride, stride, 1), dtype=torch.int16, device="meta")


def projections(name: str, stride: int) -> Projections:
    """A pair's matrices, of which one has rows so far apart."""
    sizes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    return Projections(**{one: strided(*size, stride if one == name else size[1]) for one, size in sizes.items()})


def tokens(rows: int, stride: int) -> Tensor:
    return torch.empty_strided((rows, HIDDEN), (stride, 1), dtype=torch.bfloat16, device="meta")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    target = SimpleNamespace(overlap=True, assembly=True, chain=True)
    monkeypatch.setattr(streamed_launch.Target, "of", lambda _: target)


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_stream_takes_units_of_so_many_elements(name: str, hopper: None) -> None:
    most = ROW if name != "down" else ROW // 2
    taken = [streamed_launch.takes(projections(name, row), tokens(8, HIDDEN), 8) for row in (most, most + 8)]
    assert taken == [True, False]


def test_a_stream_takes_tokens_of_so_many_elements(hopper: None) -> None:
    fits = projections("up", HIDDEN)
    assert streamed_launch.takes(fits, tokens(128, ROW), 8)
    assert not streamed_launch.takes(fits, tokens(128, ROW + 8), 8)
    assert streamed_launch.takes(fits, tokens(8, HIDDEN), 2**31 // INNER)  # activations
    assert not streamed_launch.takes(fits, tokens(8, HIDDEN), 2**31 // INNER + 1)


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_by_entry_takes_units_of_so_many_cells(name: str) -> None:
    """Of two elements each; one that reaches 2 ** 31 cells is left to others."""
    most = 2 * ROW if name != "down" else ROW
    assert [by_entry_launch._in_cells(projections(name, row)) for row in (most - 2, most)] == [True, False]


@pytest.mark.parametrize(("row", "apart"), [(ROW, True), (ROW + 8, False)])
def test_few_bits_with_warps_apart_take_tokens_of_so_many_elements(row: int, apart: bool) -> None:
    assert leveled_launch.apart(leveled_launch.MANY, 8, False, tokens(128, row)) is apart
