"""PuzzleMoE on the shipped model behaves as published; the orderings that docs/methods.md shows, held."""

from __future__ import annotations

from statistics import mean

import pytest
import torch

from quality import VARIANTS, Bench, two_of_four

PUBLISHED = "published (random pairs, 0.4, seed 0)"


@pytest.fixture(scope="module")
def increase(quality_bench: Bench) -> dict[str, dict[str, float]]:
    """The loss increase of each variant on each text."""
    names = [PUBLISHED, "seed 1", "seed 2", "threshold 0", "threshold 0.2", "threshold 0.6", "busy with rare"]
    found = {name: quality_bench.increase(*VARIANTS[name]) for name in names}
    return found | {"wanda": quality_bench.wanda()}


@pytest.fixture(params=["stdlib evaluate", "prose"])
def at(request, increase):
    """The increases on one text, by variant."""
    return {name: losses[request.param] for name, losses in increase.items()}


@pytest.mark.slow
def test_threshold_04_is_best(at):
    assert at[PUBLISHED] < min(at["threshold 0"], at["threshold 0.2"], at["threshold 0.6"])


@pytest.mark.slow
def test_seeds_differ_by_little(at):
    seeds = [at[PUBLISHED], at["seed 1"], at["seed 2"]]
    assert max(seeds) - min(seeds) < 0.25 * mean(seeds)


@pytest.mark.slow
def test_at_most_a_third_of_wanda(at):
    assert 0 < max(at[PUBLISHED], at["seed 1"], at["seed 2"]) <= at["wanda"] / 3


@pytest.mark.slow
def test_busy_with_rare_loses_less_than_random(at):
    assert at["busy with rare"] < mean([at[PUBLISHED], at["seed 1"], at["seed 2"]])


def test_two_of_four_keeps_the_two_largest():
    mask = two_of_four(torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0, 0.0, 8.0, 7.0]]))
    assert mask.tolist() == [[0, 1, 1, 0, 1, 0, 1, 0]]
