"""The dual-mask merge against its definition (PuzzleMoE, arXiv 2511.04805), element by element."""

from __future__ import annotations

import math
import random

import pytest
import torch

from moefold import Activity, Context, Experts, Groups
from moefold.errors import InputError
from moefold_plugins.puzzlemoe import merge_pair, puzzlemoe


def by_hand(wi: float, wj: float, ni: float, nj: float, threshold: float) -> tuple[float, bool, bool]:
    """Magnitude, keep of i, keep of j for one position, as the paper writes it."""
    total = abs(wi) + abs(wj)
    similar = total == 0 or abs(abs(wi) - abs(wj)) / total <= threshold
    own = abs(wi) * ni >= abs(wj) * nj
    magnitude = total / 2 if similar else (abs(wi) if own else abs(wj))
    return magnitude, similar or own, similar or not own


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_every_element_as_defined(threshold):
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(2, 23, 17, generator=generator).bfloat16()
    weights[0, 0, 0] = weights[1, 0, 0] = 0.0
    weights[0, 1, 1] = 0.0
    weights[1, 2, 2] = -weights[0, 2, 2]
    norms = torch.rand(2, 17, generator=generator) + 0.1
    merged = merge_pair(weights, norms, threshold)
    for row in range(23):
        for column in range(17):
            wi, wj = (float(weights[s, row, column]) for s in (0, 1))
            magnitude, keep_i, keep_j = by_hand(wi, wj, float(norms[0, column]), float(norms[1, column]), threshold)
            relative = abs(abs(wi) - abs(wj)) / (abs(wi) + abs(wj) or 1)
            if math.isclose(relative, threshold, rel_tol=1e-5):
                continue  # decided by rounding
            assert math.isclose(float(merged.magnitude[row, column]), magnitude, rel_tol=1e-6, abs_tol=1e-12)
            assert (bool(merged.keep[0, row, column]), bool(merged.keep[1, row, column])) == (keep_i, keep_j)
            assert [bool(merged.negative[s, row, column]) for s in (0, 1)] == [wi < 0, wj < 0]


def test_threshold_one_shares_everything_and_zero_only_equals():
    weights = torch.randn(2, 8, 8)
    weights[1, 0] = -weights[0, 0]
    norms = torch.ones(2, 8)
    assert bool(merge_pair(weights, norms, 1.0).keep.all())
    shared = merge_pair(weights, norms, 0.0).keep.all(dim=0)
    assert shared[0].all()
    assert not shared[1:].any()


def test_mask_shares_of_gaussian_weights():
    """Expected at 0.4 for independent Gaussian weights and equal norms: 48.5 % shared, 25.8 % each alone."""
    weights = torch.randn(2, 1000, 1000, generator=torch.Generator().manual_seed(0))
    keep = merge_pair(weights, torch.ones(2, 1000), 0.4).keep
    shared = float(keep.all(dim=0).float().mean())
    own = float((keep[0] & ~keep[1]).float().mean())
    assert shared == pytest.approx(0.485, abs=0.002)
    assert own == pytest.approx(0.258, abs=0.002)


def test_equal_experts_are_merged_without_loss():
    weights = torch.randn(1, 6, 5).expand(2, 6, 5)
    merged = merge_pair(weights, torch.rand(2, 5), 0.4)
    for slot in (0, 1):
        read = torch.where(merged.negative[slot], -1.0, 1.0) * merged.keep[slot] * merged.magnitude
        assert torch.equal(read, weights[slot])


CONTEXT = Context(torch.device("cpu"), torch.Generator())


def layer(count: int = 4) -> tuple[Experts, Activity]:
    experts = Experts(torch.randn(count, 12, 8), torch.randn(count, 8, 6))
    return experts, Activity(torch.arange(count), torch.rand(count, 8), torch.rand(count, 6), 10)


def test_the_stage_uses_the_norms_that_belong_to_each_matrix():
    experts, activity = layer()
    pairs = [[3, 1], [0, 2]]
    recipe = puzzlemoe(experts, Groups(pairs, []), activity, CONTEXT, threshold=0.3)
    for matrix, weights in experts.matrices().items():
        norms = activity.inner_norm if matrix == "down_proj" else activity.input_norm
        for index, merged in enumerate(recipe.merged(matrix)):
            expected = merge_pair(weights[pairs[index]], norms[pairs[index]], 0.3)
            assert all(torch.equal(a, b) for a, b in zip(merged, expected, strict=True))


def test_experts_of_another_merge_are_merged_on_the_runs_device():
    """Those that come from the store are the host's."""
    experts, activity = layer()
    meta = Context(torch.device("meta"), torch.Generator())
    recipe = puzzlemoe(experts, Groups([[3, 1], [0, 2]], []), activity, meta, threshold=0.3)
    assert {weights.device.type for weights in recipe.experts.matrices().values()} == {"meta"}


def test_groups_that_are_no_pairs_are_refused():
    experts, activity = layer()
    with pytest.raises(InputError, match="merges pairs"):
        puzzlemoe(experts, Groups([[0, 1, 2]], [3]), activity, CONTEXT)


def test_a_dead_expert_with_no_norm_loses_every_contest_it_can():
    random.seed(0)
    weights = torch.randn(2, 4, 4)
    merged = merge_pair(weights, torch.stack([torch.zeros(4), torch.ones(4)]), 0.0)
    contested = merged.keep[0] != merged.keep[1]
    assert not merged.keep[0][contested].any()
