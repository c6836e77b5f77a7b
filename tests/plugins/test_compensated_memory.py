"""What compensated merging holds at a time, counted tensor by tensor, beside what its chunks are measured by."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from calibrated import first_layer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moefold import Experts, Groups, Routed
from moefold_plugins import compensated
from moefold_plugins.lost import Lost
from moefold_plugins.moments import Calibration
from moefold_plugins.pair_merging import Merge, Rules

PAIRS = [[0, 3], [5, 1], [2, 4], [7, 6]]
ONE = 5 * 8
"""Bytes of an entry of one matrix: what its factor takes in float64, one after the other, for any number of pairs."""


class Held(TorchDispatchMode):
    """Bytes of the tensors made inside that are not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage, 0)


@pytest.mark.parametrize(("hidden", "inner"), [(512, 256), (256, 512)])
@pytest.mark.parametrize("together", [False, True])
def test_a_chunk_fits_what_it_is_measured_by(tmp_path: Path, hidden, inner, together):
    generator = torch.Generator().manual_seed(6)
    shapes = (8, 2 * inner, hidden), (8, hidden, inner), (64, hidden)
    gate_up, down, tokens = (torch.randn(shape, generator=generator).bfloat16() / 16 for shape in shapes)
    experts, index = Experts(gate_up, down), torch.rand(64, 8, generator=generator).argsort(dim=1)[:, :2]
    routed = Routed(tokens[None], tokens, index, torch.rand(64, 2, generator=generator))
    calibration = Calibration(first_layer("qwen3_moe", tmp_path), routed, experts, 1024.0)
    merge = Merge(experts, Groups(PAIRS, []), Rules(neurons="natural"))
    lost = Lost(calibration) if together else None
    with Held() as found:
        merge.add(PAIRS, calibration, lost)
    taken = found.peak - ONE * max(hidden, inner) ** 2
    assert 0.7 * 8 * compensated.bytes_in_hand(experts) < taken <= 8 * compensated.bytes_in_hand(experts)
