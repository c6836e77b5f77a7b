"""Groupings: who becomes one with whom, and how many remain."""

from __future__ import annotations

import pytest
import torch

from models import samples, tiny
from moefold import Activity, Checkpoint, Context, Experts, Groups, Similarity, Text
from moefold.errors import InputError
from moefold_plugins.align import align, best_first, best_sum
from moefold_plugins.calibrate import forward
from moefold_plugins.grouping import group_by_use, group_hierarchical, group_kmeans, group_random
from moefold_plugins.pairing import pair_random
from moefold_plugins.similarity import similarity_gated_outputs, similarity_outputs, similarity_weights

CONTEXT = Context(torch.device("cpu"), torch.Generator())
FAMILIES = [[0, 4], [1, 5, 6], [2, 3, 7]]


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    return Checkpoint.open(str(tiny("qwen3_moe", tmp_path_factory.mktemp("model")))).layers()[1]


def used(*tokens: int) -> Activity:
    return Activity(torch.tensor(tokens), torch.empty(0), torch.empty(0))


def families() -> Similarity:
    """Eight experts of three kinds."""
    points = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    for direction, members in enumerate(FAMILIES):
        points[members, direction] += 3
    return Similarity((points @ points.T).float(), "toy")


@pytest.mark.parametrize("stage", [group_hierarchical, group_kmeans])
def test_clusterings_find_the_kinds(layer, stage):
    assert sorted(sorted(group) for group in stage(layer, families(), experts=3).all()) == FAMILIES


def test_as_many_groups_as_asked_for_where_all_are_alike(layer):
    """One height for all joins, at which scipy's fcluster would stop at one group."""
    for remain in (1, 3, 7):
        assert len(group_hierarchical(layer, Similarity(torch.ones(8, 8), "toy"), experts=remain).all()) == remain


def test_by_use_the_most_used_are_centres_and_come_first(layer):
    groups = group_by_use(layer, used(1, 2, 9, 0, 8, 7, 3, 4), families(), experts=3)
    assert groups.all() == [[4, 0], [5, 1, 6], [2, 3, 7]]


@pytest.mark.parametrize("remain", [1, 3, 5, 8])
def test_random_groups_are_even_and_repeatable(layer, remain):
    groups = group_random(layer, experts=remain).all()
    assert sorted(expert for group in groups for expert in group) == list(range(8))
    assert len(groups) == remain
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1
    assert groups == group_random(layer, experts=remain).all()
    assert remain in (1, 8) or groups != group_random(layer, experts=remain, seed=1).all()


@pytest.mark.parametrize("stage", [group_hierarchical, group_kmeans])
@pytest.mark.parametrize("remain", [1, 2, 7, 8])
def test_as_many_remain_as_are_wanted(layer, stage, remain):
    assert len(stage(layer, families(), experts=remain).all()) == remain


def test_options_say_how_many_remain_where(layer):
    assert layer.number == 1
    assert len(group_random(layer).all()) == 4
    assert len(group_random(layer, fraction=0.75).all()) == 6
    assert len(group_random(layer, per_layer={1: 2, 2: 7}).all()) == 2
    assert len(group_random(layer, experts=3, per_layer={2: 7}).all()) == 3
    assert group_random(layer, experts=3, skip=[1]) == Groups([], list(range(8)))
    for wrong in ({"skip": [7]}, {"per_layer": {7: 3}}):
        with pytest.raises(InputError, match=r"layer 7 has no routed experts; those that have: 0, 1, 2"):
            group_random(layer, **wrong)
    with pytest.raises(InputError, match=r"layer 9 has no routed experts; those that have: 0, 1, 2"):
        pair_random(layer, None, skip=[1, 9])
    with pytest.raises(InputError, match="9 experts are to remain in layer 1, which has 8; write 1 to 8"):
        group_random(layer, experts=9)


def test_similarity_and_activity_of_different_experts_are_refused(layer):
    with pytest.raises(InputError, match="let both stages read the same experts"):
        group_by_use(layer, used(1, 2, 3, 4), families())


def test_weights_by_chosen_matrices():
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(3, 8, 6, generator=generator), torch.randn(3, 6, 4, generator=generator)
    gate_up[1] = 2 * gate_up[0]
    experts = Experts(gate_up, down)
    assert similarity_weights(experts, matrices=["gate_proj", "up_proj"]).matrix[0, 1].item() == pytest.approx(1)
    assert similarity_weights(experts).matrix[0, 1] < 0.95
    with pytest.raises(InputError, match="none of gate_proj"):
        similarity_weights(Experts(gate_up, torch.randn(3, 6, 8), gated=False), matrices=["gate_proj"])


def test_outputs_know_copies(layer):
    with torch.no_grad():
        routed = forward(layer, Text("random", samples(4, 24).int()), None, None, CONTEXT)
        experts = layer.experts()
        experts.gate_up[5], experts.down[5] = experts.gate_up[2], experts.down[2]
        for metric in ("cosine", "euclidean"):
            matrix = similarity_outputs(layer, routed, experts, CONTEXT, metric=metric).matrix
            others = matrix[2, [0, 1, 3, 4, 6, 7]]
            assert float(matrix[2, 5]) == pytest.approx(float(matrix[2, 2]), abs=1e-6)
            assert others.max() < matrix[2, 5] - 0.01
        gated = similarity_gated_outputs(layer, routed, experts, CONTEXT).matrix
    assert torch.equal(gated, gated.T)
    assert bool(gated.isfinite().all())


def test_gated_outputs_are_what_experts_add(layer):
    with torch.no_grad():
        routed = forward(layer, Text("random", samples(4, 24).int()), None, None, CONTEXT)
        experts = layer.experts()
        added = []
        for expert in range(8):
            gates = (routed.top_k_weights * (routed.top_k_index == expert)).sum(dim=1, keepdim=True)
            added.append((gates * layer.output(experts, expert, routed.tokens).double()).mean(dim=0))
        stacked = torch.stack(added)
        expected = stacked @ stacked.T / (stacked.norm(dim=1, keepdim=True) * stacked.norm(dim=1))
        found = similarity_gated_outputs(layer, routed, experts, CONTEXT, metric="cosine").matrix
    torch.testing.assert_close(found, expected.float(), rtol=1e-2, atol=1e-2)


def test_greedy_matching_takes_the_best_first():
    agreement = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    left, expected = agreement.clone(), torch.zeros(40, dtype=torch.int64)
    for _ in range(40):
        row, column = divmod(int(left.argmax()), 40)
        expected[row] = column
        left[row], left[:, column] = -torch.inf, -torch.inf
    assert torch.equal(best_first(agreement), expected)
    rows = torch.arange(40)
    assert agreement[rows, best_sum(agreement)].sum() >= agreement[rows, expected].sum()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_aligned_experts_compute_what_they_did(tmp_path, family):
    layer = Checkpoint.open(str(tiny(family, tmp_path))).layers()[0]
    experts, x = layer.experts(), torch.randn(7, 64).bfloat16()
    with torch.no_grad():
        aligned = align(experts, Groups([[0, 3, 2]], [1, 4, 5, 6, 7]), CONTEXT)
        assert not torch.equal(aligned.down[3], experts.down[3])
        for expert in range(8):
            expected = layer.output(experts, expert, x).float()
            found = layer.output(aligned, expert, x).float()
            assert (found - expected).norm() / expected.norm() < 5e-3  # sums in another order
