"""Tokens and units so far apart that offsets do not fit 32 bits: memory of which nearly nothing is ever touched."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from layers import assert_near, batch, expected, operands, random_layer
from torch import Tensor

kernels = pytest.importorskip("moefold_kernels.triton.layer", reason="needs triton")
from moefold_kernels.triton.operands import weights as weights_of  # noqa: E402
from moefold_kernels.triton.plans import Plan, Tile, join  # noqa: E402

PLANS = {
    "pair": Plan(Tile("pair", 16, 0, 32, 32, 4, 2), Tile("pair", 16, 0, 32, 32, 4, 2)),
    "slot": Plan(Tile("slot", 16, 0, 32, 32, 4, 2), Tile("slot", 16, 0, 32, 32, 4, 2)),
    "entry": Plan(Tile("entry", 1, 0, 16, 64, 4, 1), Tile("entry", 1, 0, 32, 64, 4, 1)),
    "joined": join(Tile("pair", 16, 0, 16, 32, 4, 2)),
}
REPLACED = {"entry": "route_for", "joined": "gate_up"}
"""What other modes would call."""

TOKEN, UNIT = 2**30 + 8, 3 * 2**29
"""Elements from one token or unit to the next. They fit 32 bits; times 5 or 3 they do not, nor do half as many integers
of two elements each, which by_entry.py reads."""
BEFORE, AFTER = 2**33, 12 * 2**30
"""Bytes before and behind where tensors begin: a kernel whose offsets wrap reads zeros there, and meets no fault."""
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.11 and 3.12 have no name for it


@pytest.fixture
def memory(device) -> Tensor:
    """Zeros, int16; the system keeps what is written."""
    if device.type != "cpu":
        pytest.skip("a GPU's memory is not mapped without being reserved")
    if sys.platform != "linux":
        pytest.skip("needs MAP_NORESERVE of Linux")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    try:
        mapped = mmap.mmap(-1, BEFORE + AFTER, flags=flags)
    except OSError as error:
        pytest.skip(f"20 GiB cannot be mapped without being reserved: {error}")
    return torch.frombuffer(mapped, dtype=torch.int16)


def spread(memory: Tensor, number: int, tensor: Tensor, apart: int) -> Tensor:
    """The tensor as the `number`-th in memory, with so many elements between its rows or matrices."""
    begin = BEFORE // 2 + number * 2**20
    placed = memory.as_strided(tensor.shape, (apart, *tensor.stride()[1:]), begin).view(tensor.dtype)
    return placed.copy_(tensor)


@pytest.mark.parametrize("mode", PLANS)
def test_offsets_beyond_32_bits(mode, memory, monkeypatch):
    """Six tokens, four pairs, and four experts alone where a launch takes both."""
    if mode in REPLACED:
        monkeypatch.delattr(kernels, REPLACED[mode])
    alone = 0 if mode == "joined" else 4
    layer = random_layer(8 + alone, 64, 32, alone)
    x, _, weights = batch(6, 64, 2, 8)
    index = torch.arange(12).reshape(6, 2) % layer.experts
    given = operands(layer)
    matrices = ("gate_up_packed", "down_packed", "gate_up_dense", "down_dense")[: 4 if alone else 2]
    far = {name: spread(memory, 1 + n, getattr(given, name), UNIT) for n, name in enumerate(matrices)}
    made = weights_of(given._replace(**far))
    found = kernels.forward(made, spread(memory, 0, x, TOKEN), index, weights, plan=PLANS[mode], dtype=torch.float32)
    assert_near(found, expected(layer, x, index, weights))
