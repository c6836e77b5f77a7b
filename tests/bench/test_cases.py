"""The registry, and the batches that its cases draw."""

from __future__ import annotations

import pytest
import torch

from moefold_kernels import layout
from moefold_kernels.bench import CASES, CONTENDERS, SHAPES, TINY, Case, Shape, cases, find, published, routing
from moefold_kernels.bench.contenders import BASELINES
from moefold_kernels.bench.weights import random_experts
from moefold_kernels.errors import BenchmarkError
from moefold_kernels.reference import decode


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_names_are_unique_and_published_times_belong_to_cases():
    assert len({case.name for case in CASES}) == len(CASES)
    assert set(BASELINES) <= set(CONTENDERS)
    assert "packed" in CONTENDERS
    hits = {(case.shape.name, case.tokens): case.hit for case in CASES if case.routing == "balanced"}
    for shape, times in published.VLLM.items():
        for tokens, (_, experts) in times.items():
            assert hits[shape, tokens] == experts
    assert hits["deepseek-moe-16b", 16] is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_batches_follow_their_case(case):
    shape = Shape("narrow", case.shape.experts, 2, 2, case.shape.top_k)  # tokens of two numbers: quick
    case = Case(shape, case.tokens, case.routing, case.hit)
    one, other = (routing.draw(case, generator(seed)) for seed in (1, 2))
    assert one.top_k_index.shape == one.top_k_weights.shape == (case.tokens, shape.top_k)
    assert one.top_k_index.dtype == torch.int64
    assert one.top_k_index.min() >= 0
    assert one.top_k_index.max() < shape.experts
    assert all(len(set(token)) == shape.top_k for token in one.top_k_index.tolist())
    torch.testing.assert_close(one.top_k_weights.float().sum(-1), torch.ones(case.tokens), atol=0.02, rtol=0)
    assert not torch.equal(one.hidden, other.hidden)
    if case.hit:
        assert routing.experts_hit(one) == routing.experts_hit(other) == case.hit


def test_skewed_routing_is_skewed_and_balanced_is_not():
    shape = Shape("narrow", 64, 2, 2, 4)
    most = {}
    for kind in ("balanced", "skewed"):
        index = routing.draw(Case(shape, 1024, kind), generator()).top_k_index
        most[kind] = int(index.flatten().bincount(minlength=64).max())
    assert most["balanced"] < 110  # 64 expected
    assert most["skewed"] > 400


def test_pairs_hit_counts_pairs_not_experts():
    index = torch.tensor([[0, 3], [3, 5]])
    batch = routing.Batch(torch.empty(2, 1), index, torch.empty(2, 2))
    assert routing.experts_hit(batch) == 3
    assert routing.pairs_hit(batch, [[0, 3], [1, 2], [4, 5]]) == 2


def test_random_experts_are_canonical_words_of_the_usual_shares():
    shape = Shape("small", 4, 128, 192, 2)
    experts = random_experts(shape, generator())
    assert sorted(expert for pair in experts.pairs for expert in pair) == [0, 1, 2, 3]
    for name, words in experts.words.items():
        keep = [(words >> shift) & 1 == 1 for shift in layout.KEEP_SHIFT]
        signs = [(words >> shift) & 1 == 1 for shift in layout.SIGN_SHIFT]
        assert not any((sign & ~kept).any() for sign, kept in zip(signs, keep, strict=True))
        assert not words[~keep[0] & ~keep[1]].any()
        assert (keep[0] & keep[1]).float().mean() == pytest.approx(0.48, abs=0.01)
        assert (keep[0] & ~keep[1]).float().mean() == pytest.approx(0.26, abs=0.01)
        values = decode(words, experts.window[name], 0).float()
        assert values.std() == pytest.approx((0.74 / words.shape[-1]) ** 0.5, rel=0.03)


def test_what_cannot_be_is_refused():
    with pytest.raises(BenchmarkError, match=r"tiny, 1 tokens, balanced: 3 experts hit are not possible; write 2 to 2"):
        Case(TINY, 1, hit=3)
    with pytest.raises(BenchmarkError, match="balanced routing"):
        Case(TINY, 16, "skewed", hit=8)
    with pytest.raises(BenchmarkError, match="there is no routing balance; did you mean balanced"):
        Case(TINY, 1, "balance")
    with pytest.raises(BenchmarkError, match="0 tokens: write at least 1"):
        Case(TINY, 0)
    with pytest.raises(BenchmarkError, match="shape odd: write an even number"):
        Shape("odd", 7, 2, 2, 2)
    with pytest.raises(BenchmarkError, match=r"there is no shape qwen3; did you mean|known: mixtral"):
        find("shape", "qwen3", SHAPES)
    assert cases([TINY], [4], free=True)[0].hit is None
    assert cases([TINY], [4], hit=5)[0].name == "tiny-4-balanced-5hit"
