"""What compensated merging loses on the shipped model, beside the published rule and GPTQ: docs/methods.md, held."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import pytest

import quality
from quality import Bench

Losses = dict[str, float]
SEEDS = [f"pairs.seed={seed}" for seed in range(3)]
COMPENSATED = quality.PIPELINE.replace("uses: puzzlemoe", "uses: puzzlemoe.compensated")
FEW_BITS = COMPENSATED.replace("{uses: puzzlemoe", "{uses: levels}\n  - {uses: puzzlemoe").replace(
    "{uses: puzzlemoe.compensated}", "{uses: puzzlemoe.compensated, with: {format: FORMAT}}"
)
OBSERVED, SAVED = quality.PIPELINE.index("  - {uses: observe}"), quality.PIPELINE.index("  - {uses: save")
GPTQ = quality.PIPELINE[:OBSERVED] + "  - {uses: gptq, with: {bits: 3}}\n" + quality.PIPELINE[SAVED:]


@pytest.fixture(scope="module")
def increase(quality_bench: Bench) -> Callable[..., Losses]:
    """A pipeline's loss increase on each text."""

    def measured(pipeline: str, pair: str, *settings: str) -> Losses:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quality, "PIPELINE", pipeline)
            return quality_bench.increase(pair, *settings)

    return measured


@pytest.fixture(scope="module")
def published(increase) -> Callable[[int], Losses]:
    """The mean of the published rule with three seeds' random pairs, by the number of calibration samples."""

    def measured(samples: int) -> Losses:
        found = [increase(quality.PIPELINE, "pair.random", f"calibration.samples={samples}", seed) for seed in SEEDS]
        return {text: mean(each[text] for each in found) for text in found[0]}

    return measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "samples", "code", "prose"),
    [("pair.by_error", 64, 0.33, 0.37), ("pair.by_error", 128, 0.32, 0.36), ("pair.by_usage", 64, 0.42, 0.40)],
)
def test_it_loses_a_third_of_what_the_published_rule_does(increase, published, pair, samples, code, prose):
    found, known = increase(COMPENSATED, pair, f"calibration.samples={samples}"), published(samples)
    assert 0 < found["stdlib evaluate"] <= code * known["stdlib evaluate"]
    assert 0 < found["prose"] <= prose * known["prose"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_random_pairs_lose_less_than_half(increase, published, seed):
    found, known = increase(COMPENSATED, "pair.random", seed), published(64)
    assert all(0 < found[text] <= 0.45 * known[text] for text in known)


@pytest.mark.slow
def test_three_bits_lose_less_than_three_bits_of_gptq(increase):
    """pair6 takes 3.125 bits a weight with its scales, GPTQ 3.5."""
    pair6 = FEW_BITS.replace("FORMAT", "pair6").replace("pack.exponent", "pack.pair6")
    found, known = increase(pair6, "pair.by_error"), increase(GPTQ, "")
    assert all(0 < found[text] < known[text] for text in known)
