"""Levels of magnitudes, their scales, and rounding to them in a loop over columns."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold import LevelLoop, Levels
from moefold.errors import FormatError
from moefold.level_fitting import Fitting
from moefold.magnitudes import Grid
from moefold_kernels import eighths, layout_pairs

BITS = tuple(layout_pairs.MAGNITUDE_BITS.values())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_near_the_best_for_a_normal_distribution(bits):
    """Lloyd-Max distortion of |Gaussian| in 1, 2, 3 bits: that of a Gaussian in 2, 3, 4 (Max, 1960, table I).

    In 5 bits numbers are spaced as fp8 numbers are: 1.25 times the sqrt(3) pi / 2 / 64 ** 2 of 64 free levels.
    """
    found, values = Levels.learn(normal(200_000), bits), normal(200_000, seed=1).abs()
    grid = found.on("cpu")
    errors = [(grid.round(values, each)[1] - values).square().mean() for each in torch.linspace(0.7, 1.4, 71)]
    best = {1: 0.1175, 2: 0.03454, 3: 0.009497, 5: 1.25 * 3**0.5 * math.pi / 2 / 64**2}[bits]
    assert min(errors) == pytest.approx(best, rel=0.03)
    assert found == Levels.learn(normal(200_000), bits)


SPREADS = {
    "normal": lambda: normal(8192),
    "heavy tails": lambda: normal(8192) / normal(3, 8192, seed=1).square().mean(0).sqrt(),
    "one outlier": lambda: torch.cat([normal(8191), torch.tensor([1e6])]),
    "log-normal": lambda: normal(8192).exp(),
    "even": lambda: torch.linspace(0.01, 3, 8192),
    "half zeros": lambda: normal(8192).relu(),
    "near constant": lambda: 1 + 0.1 * torch.rand(8192, generator=torch.Generator().manual_seed(0)),
    "few": lambda: normal(512),
    "large": lambda: 1e20 * normal(8192),
    "small": lambda: 1e-20 * normal(8192),
}


@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.parametrize("format", layout_pairs.MAGNITUDE_BITS)
def test_learnt_levels_are_fp8_numbers_times_a_factor(format, name):
    bits, samples = layout_pairs.magnitude_bits(format), SPREADS[name]()
    if (format, name) == ("pair6", "near constant"):  # 1.25 % apart
        with pytest.raises(FormatError, match="too much alike for"):
            Levels.learn(samples, bits)
    else:
        assert eighths.codes(format, Levels.learn(samples, bits).values)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([*layout_pairs.MAGNITUDE_BITS]), st.floats(0.5, 4), st.floats(-1, 1), st.integers(0, 99))
def test_whatever_is_learnt_is_on_the_grid(format, power, most, seed):
    samples = normal(2048, seed=seed).abs() ** power
    found = Levels.learn(torch.cat([samples, torch.full((100,), 10**most)]), layout_pairs.magnitude_bits(format))
    assert eighths.codes(format, found.values)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_grid_costs_next_to_nothing_of_free_levels(bits):
    """With scales searched; 0.8 % at most when this was written."""
    for name in ("normal", "heavy tails", "log-normal"):
        groups = SPREADS[name]().view(-1, 64).abs()
        groups /= groups.square().mean(1, keepdim=True).sqrt()
        free = Fitting(groups.double().flatten().sort().values).lloyd_max(1 << bits).float()
        errors = [
            Levels.learn(groups, bits).on("cpu").error(groups),
            Grid(free, (free[1:] + free[:-1]) / 2).error(groups),
        ]
        assert errors[0] < 1.02 * errors[1], name


@pytest.mark.parametrize("format", layout_pairs.MAGNITUDE_BITS)
def test_no_level_and_no_factor_beside_the_learnt_ones_is_better(format):
    groups = normal(512, 64).abs()
    found = Levels.learn(groups, layout_pairs.magnitude_bits(format))
    numbers, factor = eighths.codes(format, found.values)
    beside = [
        eighths.scaled(changed, factor * each) for changed in _beside(format, numbers) for each in (1, 0.9375, 1.0625)
    ]
    least = found.on("cpu").error(groups)
    for values in beside:
        levels = torch.tensor(values)
        other = Grid(levels, (levels[1:] + levels[:-1]) / 2).error(groups)
        assert other > 0.99 * least, values


def _beside(format: str, numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The same bytes, and those with one of them, where the format leaves it free, one more or less."""
    free = {"pair4": [0], "pair8": []}.get(format, range(len(numbers)))
    changed = [(*numbers[:at], numbers[at] + step, *numbers[at + 1 :]) for at in free for step in (-1, 1)]
    return [numbers, *(each for each in changed if sorted(set(each)) == list(each))]


def test_samples_of_which_no_levels_can_be_learnt_are_refused():
    for samples, bits, message in [
        (normal(100), 3, "100 magnitudes are too few for 8 levels"),
        (torch.full((999,), torch.inf), 1, "not all are finite"),
        (torch.zeros(999), 5, "all 999 magnitudes are 0"),
        (torch.ones(999), 1, "too much alike for 2 levels: the best are 1 and 1 among others"),
        (torch.tensor([1.0, 2.0, 4.0]).repeat(99), 2, "too much alike for 4 levels"),
    ]:
        with pytest.raises(FormatError, match=message):
            Levels.learn(samples, bits)
    assert Levels.learn(torch.ones(999), 5).on("cpu").error(torch.ones(9, 64)) < 1e-4  # pair8 has its levels anyway


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
