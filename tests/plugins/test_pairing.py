"""Pairs: random and repeatable, busy with rare, most alike."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from models import tiny
from moefold import Activity, Checkpoint, Context, Experts, Groups, Routed, Similarity
from moefold_plugins import neurons
from moefold_plugins import pair_errors as pair_errors_module
from moefold_plugins.compensated import compensated
from moefold_plugins.moments import Calibration
from moefold_plugins.pairing import pair_by_error, pair_by_usage, pair_random, pair_similar
from moefold_plugins.similarity import similarity_weights
from moefold_plugins.targets import row_weights


@dataclass(frozen=True)
class Layer:
    """What pairing asks of a layer."""

    number: int = 0
    expert_count: int = 8

    @property
    def checkpoint(self) -> SimpleNamespace:
        return SimpleNamespace(check_layers=lambda _: None)


def activity(counts: list[int]) -> Activity:
    size = len(counts)
    return Activity(torch.tensor(counts), torch.ones(size, 2), torch.ones(size, 2), sum(counts))


def everyone_once(groups, count: int) -> bool:
    return sorted([e for pair in groups.members for e in pair] + groups.alone) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 129])
def test_random_pairs_take_everyone_once(count):
    groups = pair_random(Layer(expert_count=count), None)
    assert everyone_once(groups, count)
    assert len(groups.alone) == count % 2


def test_random_pairs_are_repeatable_and_differ_by_seed_and_layer():
    assert pair_random(Layer(3), None) == pair_random(Layer(3), None)
    assert pair_random(Layer(3), None) != pair_random(Layer(4), None)
    assert pair_random(Layer(3), None, seed=1) != pair_random(Layer(3), None, seed=2)
    # Pinned: the same on every machine and in every version, or stored results would silently change their meaning.
    assert pair_random(Layer(0, 8), None, seed=0).members == PINNED


PINNED = [[0, 6], [1, 7], [2, 5], [3, 4]]


def test_fraction_and_skip():
    half = pair_random(Layer(), None, fraction=0.5)
    assert len(half.members) == 2
    assert everyone_once(half, 8)
    assert pair_random(Layer(2), None, skip=[2]).members == []
    assert pair_random(Layer(2), None, fraction=0.0).alone == list(range(8))
    assert pair_by_usage(Layer(2), activity([1, 2, 3]), skip=[2]).members == []


def test_busy_with_rare():
    groups = pair_by_usage(Layer(), activity([5, 100, 0, 40, 7, 60, 1, 20]))
    # by use: 1 (100), 5 (60), 3 (40), 7 (20), 4 (7), 0 (5), 6 (1), 2 (0)
    assert groups.members == [[0, 3], [1, 2], [4, 7], [5, 6]]
    odd = pair_by_usage(Layer(), activity([3, 2, 1]))
    assert (odd.members, odd.alone) == ([[0, 2]], [1])


def test_most_alike_in_sum_not_greedily():
    matrix = torch.tensor([[1.0, 0.9, 0.8, 0.0], [0.9, 1.0, 0.0, 0.8], [0.8, 0.0, 1.0, -0.9], [0.0, 0.8, -0.9, 1.0]])
    groups = pair_similar(Layer(), Similarity(matrix, "test"))
    assert groups.members == [[0, 2], [1, 3]]  # greedy would take 0-1 and be left with 2-3


def test_similarity_of_weights_is_the_cosine():
    gate_up, down = torch.randn(4, 300, 16), torch.randn(4, 16, 150)
    gate_up[3], down[3] = 2 * gate_up[1], 2 * down[1]
    found = similarity_weights(Experts(gate_up.bfloat16(), down.bfloat16())).matrix
    flat = torch.cat([gate_up.bfloat16().double().flatten(1), down.bfloat16().double().flatten(1)], dim=1)
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=2)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert found[1, 3] == pytest.approx(1.0, abs=1e-4)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A layer whose experts 1 and 6, 2 and 4 are nearly alike but for signs, with routed tokens."""
    layer = Checkpoint.open(str(tiny("qwen3_moe", tmp_path_factory.mktemp("tiny") / "m"))).layers()[0]
    own = layer.experts()
    generator = torch.Generator().manual_seed(3)
    gate_up, down = own.gate_up.clone(), own.down.clone()
    for first, second in ((1, 6), (2, 4)):
        for matrix in (gate_up, down):
            sign = (torch.rand(matrix[0].shape, generator=generator) < 0.5).to(matrix.dtype) * 2 - 1
            matrix[second] = 1.05 * matrix[first] * sign
    tokens = torch.randn(400, gate_up.shape[2], generator=generator).bfloat16()
    index = torch.rand(400, 8, generator=generator).argsort(dim=1)[:, :2]
    return layer, Routed(tokens[None], tokens, index, torch.rand(400, 2, generator=generator)), Experts(gate_up, down)


def test_least_error_pairs_alike_magnitudes(calibrated):
    context = Context(torch.device("cpu"), torch.Generator())
    groups = pair_by_error(*calibrated, context)
    assert everyone_once(groups, 8)
    assert {(1, 6), (2, 4)} < set(map(tuple, groups.members))
    costs = {tuple(pair): float(groups.costs[tuple(pair)]) for pair in groups.members}
    assert groups.costs.shape == (8, 8), "what the choice was made by, for the report"
    assert set(sorted(costs, key=costs.__getitem__)[:2]) == {(1, 6), (2, 4)}
    half = pair_by_error(*calibrated, context, fraction=0.5, sample=7)
    assert half.members == [[1, 6], [2, 4]]
    assert pair_by_error(*calibrated, context, skip=[calibrated[0].number]).alone == list(range(8))


def test_experts_that_are_alike_neuron_by_neuron_keep_their_order(calibrated, monkeypatch):
    """In blocks that are not the whole expert busy neurons meet rare ones only, which are not alike."""
    monkeypatch.setattr(neurons, "BLOCK", 8)
    layer, routed, experts = calibrated
    context = Context(torch.device("cpu"), torch.Generator())
    merge = compensated(layer, routed, experts, Groups([[1, 6], [0, 3]], [2, 4, 5, 7]), None, context)
    assert merge.figures["matched"] == [False, True]
    assert max(merge.figures["damage"]["output"][0]) < 0.1 * max(merge.figures["damage"]["output"][1])


@pytest.mark.parametrize("sample", [5, 1000])
def test_an_errors_table_is_the_least_of_three_choices_in_the_better_order(calibrated, monkeypatch, sample):
    layer, routed, experts = calibrated
    monkeypatch.setattr(pair_errors_module, "AT_ONCE", 2 * 3 * 64 * 32)  # two experts at a time
    calibration = Calibration(layer, routed, experts, 1024.0)
    found = pair_errors_module.pair_errors(experts, calibration, sample, "usage").figures[..., 0]
    seen = calibration.inputs(range(8))
    rows = row_weights(experts, seen).view(8, 2, 32)
    energy = experts.down.float().square().sum(dim=1) * seen.activity
    spaced = torch.arange(0, 32, max(1, 32 // sample))

    def cost(i: int, j: int, one: torch.Tensor, other: torch.Tensor) -> float:
        total = 0.0
        for a, b in zip(one[spaced].tolist(), other[spaced].tolist(), strict=True):
            for part in range(3):
                stack = experts.gate_up.view(8, 2, 32, 64)[:, part] if part < 2 else experts.down.mT
                x, y = stack[i, a].float().abs(), stack[j, b].float().abs()
                c, d = (
                    (seen.tokens[e] + 1024.0)
                    * (rows[e, part, n] * seen.x[e].diagonal() if part < 2 else seen.activity[e, n].expand(64))
                    for e, n in ((i, a), (j, b))
                )
                mean = (c * x + d * y) / (c + d)
                shared = c * (x - mean) ** 2 + d * (y - mean) ** 2
                total += float(torch.minimum(torch.minimum(shared, c * x**2), d * y**2).sum())
        return total

    for i, j in ((0, 3), (1, 6), (5, 7)):
        busy, rare = (energy[e].argsort(descending=True, stable=True) for e in (i, j))
        rare = rare.flip(0)
        least = min(cost(i, j, torch.arange(32), torch.arange(32)), cost(i, j, busy, rare))
        assert float(found[i, j]) == pytest.approx(least, rel=1e-3)
        assert found[i, j] == found[j, i]
