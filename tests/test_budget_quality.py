"""A quarter of the bytes saved by a budget, beside random halves of the pairs, on the shipped model."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

import quality
from quality import Bench

CHOSEN = """
model: demo
stages:
  - {id: calibration, uses: text.stdlib, with: {part: calibrate, samples: 64, length: 512}}
  - {uses: forward, needs: {text: calibration}}
  - {uses: damage.pairs, needs: {text: calibration}}
  - {id: plan, PLAN}
  - {uses: pair.planned}
  - {uses: puzzlemoe.compensated}
  - {uses: pack.planned}
  - {uses: save, with: {to: OUT}}
  - {id: unseen, uses: text.stdlib, with: {part: evaluate, samples: 64, length: 512}}
  - {id: prose, uses: text.prose, with: {samples: 32, length: 512}}
  - {uses: evaluate.baseline, needs: {texts: [unseen, prose]}}
  - {uses: evaluate.perplexity}
"""
BUDGET = "uses: plan.budget, with: {budget: 0.75}"
LAYERS, EXPERTS = 5, 16


def half(seed: int, everywhere: bool) -> dict[str, dict[str, object]]:
    """Half of all pairs of random ones: the same number in every layer, or drawn over the whole model."""
    draw = random.Random(seed)
    pairs = []
    for layer in range(LAYERS):
        order = draw.sample(range(EXPERTS), EXPERTS)
        pairs += [(layer, sorted(pair)) for pair in zip(order[::2], order[1::2], strict=True)]
    taken = draw.sample(pairs, len(pairs) // 2) if everywhere else [p for n, p in enumerate(pairs) if n % 8 < 4]
    return {
        str(layer): {"format": "exponent", "pairs": [pair for number, pair in taken if number == layer]}
        for layer in range(LAYERS)
    }


def increase(bench: Bench, plan: str) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "PIPELINE", CHOSEN.replace("PLAN", plan))
        return bench.increase()


def halves(bench: Bench, seeds: range) -> list[dict[str, float]]:
    found = []
    for seed in seeds:
        file: Path = bench.folder / f"half-{seed}.json"
        file.write_text(json.dumps({"layers": half(seed, everywhere=bool(seed % 2))}))
        found.append(increase(bench, f"uses: plan.read, with: {{path: {file}}}"))
    return found


@pytest.mark.slow
def test_a_budget_loses_less_than_any_random_half_of_the_pairs(quality_bench):
    """Over both texts three quarters of the best, at most: of one it was 0.37 to 0.76, by CPU (docs/methods.md)."""
    chosen, random_ones = increase(quality_bench, BUDGET), halves(quality_bench, range(4))
    for text, loss in chosen.items():
        others = [found[text] for found in random_ones]
        assert 0 < loss < min(*others, 2 / 3 * statistics.mean(others)), text
    assert sum(chosen.values()) < 0.75 * min(sum(found.values()) for found in random_ones)


if __name__ == "__main__":
    import sys

    bench = Bench(Path(sys.argv[1]))
    print("budget", increase(bench, BUDGET), flush=True)
    for seed in range(8):
        print("random half", seed, halves(bench, range(seed, seed + 1)), flush=True)
