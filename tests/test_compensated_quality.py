"""What compensated merging loses on the shipped model, beside the published rule: what docs/methods.md shows, held."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

import quality
from quality import Bench

SEEDS = [f"pairs.seed={seed}" for seed in range(3)]


@pytest.fixture(scope="module")
def increase(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """The loss increase on each text."""
    folder: Path = tmp_path_factory.mktemp("compensated")
    bench = Bench(folder)
    published = [bench.increase("pair.random", seed) for seed in SEEDS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "PIPELINE", quality.PIPELINE.replace("uses: puzzlemoe", "uses: puzzlemoe.compensated"))
        compensated = [bench.increase("pair.random", seed) for seed in SEEDS]
        busy = bench.increase("pair.by_usage")
    return {
        "published": {text: mean(found[text] for found in published) for text in busy},
        "worst random": {text: max(found[text] for found in compensated) for text in busy},
        "busy with rare": busy,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("text", "busy", "random"), [("stdlib evaluate", 0.42, 0.45), ("prose", 0.40, 0.45)])
def test_it_loses_less_than_half_of_what_the_published_rule_does(increase, text, busy, random):
    published = increase["published"][text]
    assert 0 < increase["busy with rare"][text] <= busy * published
    assert 0 < increase["worst random"][text] <= random * published
