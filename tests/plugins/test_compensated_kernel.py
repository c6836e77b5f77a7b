"""The kernel that codes strips of columns, against the walk column by column."""

from __future__ import annotations

import pytest
import torch

from moefold import Levels
from moefold_kernels import FormatError
from moefold_plugins.compensation import Walk, factor
from moefold_plugins.pair_coding import Grid, Leveled, PairCoder, Window

columns = pytest.importorskip("moefold_kernels.triton.columns", reason="needs triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLES = {1: (0.5, 1.5), 2: (0.25, 0.625, 1.0, 1.75), 3: (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)}


class ByColumn(PairCoder):
    """Without the kernel, wherever it runs."""

    def strip(self, start, target, whole, follow):
        return None


class AtOnce(PairCoder):
    """With the kernel, interpreted where there is no GPU."""

    def __init__(self, grid: Grid, weight: torch.Tensor) -> None:
        super().__init__(grid, weight)
        self.at_once = True


def grid(bits: int) -> Grid:
    if not bits:
        return Window(2.0**-9, 2.5)
    wide = tuple(((torch.arange(32) + 1) / 8).tolist())
    return Leveled(Levels(bits, TABLES.get(bits, wide)), DEVICE)


def problem(pairs: int, width: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, moments of correlated inputs, and what errors in rows weigh."""
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(pairs, 2, 300, width, generator=generator)
    inputs += 2 * torch.randn(pairs, 2, 300, 3, generator=generator) @ torch.randn(3, width, generator=generator)
    weights = torch.randn(pairs, 2, width, rows, generator=generator).bfloat16()
    rows_weigh = torch.rand(pairs, 2, rows, generator=generator) ** 4 + 0.01
    return weights.to(DEVICE), (inputs.mT @ inputs / 300).to(DEVICE), rows_weigh.to(DEVICE)


def walked(kind: type[PairCoder], bits: int, problem: tuple[torch.Tensor, ...]) -> tuple[Walk, list[torch.Tensor]]:
    weights, moments, weight = problem
    walk = Walk(weights, kind(grid(bits), weight), 64, torch.bfloat16)
    return walk, [walk.first(factor(moments.clone(), 1e-6)), walk.again(moments)]


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 40, 5), (2, 70, 33)])
def test_strips_at_once_are_columns_one_by_one(bits, shape):
    case = problem(*shape)
    (one, damage_one), (other, damage_other) = (walked(kind, bits, case) for kind in (ByColumn, AtOnce))
    assert (one.read == other.read).float().mean() > 0.97  # near ties fall otherwise, and what follows from them
    for a, b in zip(damage_one, damage_other, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0)
    assert other.read.isfinite().all()


@pytest.mark.parametrize("bits", [0, 3])
def test_one_column_is_the_same_bit_by_bit(bits):
    weights, _, weight = problem(2, 1, 500)
    coders = [kind(grid(bits), weight) for kind in (ByColumn, AtOnce)]
    reads = []
    for coder in coders:
        coder.weigh(torch.tensor([[[1.0], [3.0]], [[0.5], [0.25]]], device=DEVICE))
        coder.open(0, weights.float()) if bits else None
        target = weights.float().contiguous()
        strip = coder.strip(0, target, target.clone(), torch.zeros(2, 2, 1, 1, device=DEVICE))
        reads.append(coder.code(0, weights[:, :, 0].float()) if strip is None else strip[:, :, 0])
    assert torch.equal(*reads)
    assert len(reads[0].abs().unique()) > (50 if not bits else 8)


def test_other_operands_are_refused():
    weights, moments, weight = problem(1, 33, 4)
    coder = AtOnce(grid(0), weight)
    coder.weigh(moments.diagonal(dim1=-2, dim2=-1))
    with pytest.raises(FormatError, match="at most 32"):
        coder.strip(0, weights.float(), weights.float(), moments)
    part, follow = weights[:, :, :8].float(), moments[:, :, :8, :8]
    with pytest.raises(FormatError, match=r"whole is .* float32"):
        coder.strip(0, part, part.bfloat16(), follow)
    with pytest.raises(FormatError, match="contiguous"):
        coder.strip(0, part, part.mT.contiguous().mT, follow)
