"""Levels of magnitudes, their scales, and rounding to them in a loop over columns."""

from __future__ import annotations

import pytest
import torch

from moefold import LevelLoop, Levels
from moefold.errors import FormatError
from moefold_kernels import layout_pairs

BITS = tuple(layout_pairs.MAGNITUDE_BITS.values())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_near_the_best_for_a_normal_distribution(bits):
    """Lloyd-Max distortion of |Gaussian| in 1, 2, 3, 5 bits: that of a Gaussian in 2, 3, 4, 6 (Max, 1960, table I)."""
    found = Levels.learn(normal(200_000), bits)
    grid, values = found.on("cpu"), normal(200_000, seed=1).abs()
    error = (grid.round(values, torch.ones(()))[1] - values).square().mean()
    assert error == pytest.approx({1: 0.1175, 2: 0.03454, 3: 0.009497, 5: 0.00090}[bits], rel=0.15)
    assert found == Levels.learn(normal(200_000), bits)
    layout_pairs.check_levels({bits: name for name, bits in layout_pairs.MAGNITUDE_BITS.items()}[bits], found.values)


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_is_better_than_the_root_mean_square(bits):
    values = normal(64, 64).abs()
    grid = Levels.learn(normal(100_000), bits).on("cpu")
    rms, best = values.square().mean(1).sqrt().bfloat16(), grid.scale(values)
    errors = [(grid.round(values, scale[:, None])[1] - values).square().sum() for scale in (rms, best)]
    assert errors[1] < 0.99 * errors[0]


def test_a_loop_over_columns_rounds_as_the_whole_matrix():
    found, values = Levels.learn(normal(100_000), 3), normal(3, 10, 150).abs()
    loop, out = LevelLoop(found, "cpu"), torch.empty(3, 10, 150)
    for column in range(150):
        if column % LevelLoop.group == 0:
            loop.open(column, values[:, :, column : column + LevelLoop.group].mT)
        out[:, :, column] = loop.round(values[:, None, :, column])[:, 0]
    grid = found.on("cpu")
    assert torch.equal(loop.scales(), grid.scales(values))
    level, whole = grid.round(values, loop.scales().repeat_interleave(64, 2)[..., :150])
    assert torch.equal(out, whole)
    assert torch.equal(loop.numbers(out), level)
    with pytest.raises(FormatError, match="begins no group"):
        loop.open(64, values.mT)


@pytest.mark.parametrize(
    ("values", "message"),
    [((1.0, 1.0078125), "times the one before"), ((0.0, 1.0), "positive"), ((0.5, 0.7), "bf16"), ((1.0,), "1 levels")],
)
def test_wrong_levels_are_refused(values, message):
    with pytest.raises(FormatError, match=message):
        Levels(1, values)
