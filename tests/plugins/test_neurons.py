"""The order of neurons: it changes nothing, and neurons that are alike, or that complement each other, meet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibrated import first_layer, routed_to
from torch import Tensor

from moefold import Experts, Routed
from moefold_plugins import neurons
from moefold_plugins.moments import Calibration
from moefold_plugins.neurons import matched, reorder


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def layer(request, tmp_path_factory: pytest.TempPathFactory):
    return first_layer(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def routed() -> Routed:
    return routed_to(8, tokens=400)


def shuffled(experts: Experts, expert: int, seed: int) -> tuple[Experts, Tensor]:
    """The experts with one's neurons in a random order, and the order."""
    bias = None if experts.gate_up_bias is None else experts.gate_up_bias.clone()
    found = replace(experts, gate_up=experts.gate_up.clone(), down=experts.down.clone(), gate_up_bias=bias)
    order = torch.randperm(experts.inner, generator=torch.Generator().manual_seed(seed))
    reorder(found, expert, order)
    return found, order


def test_another_order_computes_the_same(layer, routed):
    experts = layer.experts()
    other, order = shuffled(experts, 3, 0)
    assert not torch.equal(other.down[3], experts.down[3])
    torch.testing.assert_close(
        layer.activate(other, 3, routed.tokens), layer.activate(experts, 3, routed.tokens)[:, order]
    )
    assert all(torch.equal(other.down[e], experts.down[e]) for e in range(8) if e != 3)


def in_order(layer, routed: Routed, experts: Experts, members: list[int]) -> tuple[Tensor, Tensor]:
    """The orders of some experts' neurons, and each neuron's energy."""
    seen = Calibration(layer, routed, experts, 0.0).inputs(members)
    some = Experts(experts.gate_up[members], experts.down[members], gated=experts.gated)
    return matched(some, seen, torch.ones(len(members))), some.down.float().square().sum(dim=1) * seen.activity


def test_equal_neurons_meet(layer, routed):
    """An expert and the same one with its neurons shuffled: whatever their order, what is merged is equal."""
    experts = layer.experts()
    for stack in (experts.gate_up, experts.down):
        stack[5] = stack[2]
    other, _ = shuffled(experts, 5, 1)
    orders, _ = in_order(layer, routed, other, [2, 5])
    assert all(order.sort().values.tolist() == list(range(experts.inner)) for order in orders)
    assert torch.equal(other.down[2][:, orders[0]], other.down[5][:, orders[1]])


def test_the_busiest_neurons_meet_the_rarest(layer, routed, monkeypatch):
    monkeypatch.setattr(neurons, "BLOCK", 1)
    orders, energy = in_order(layer, routed, layer.experts(), [0, 4, 6, 1])
    for slot, (order, each) in enumerate(zip(orders, energy, strict=True)):
        ranked = each[order].tolist()
        assert ranked == sorted(ranked, reverse=slot % 2 == 0)


def test_the_assignment_costs_least_of_all(layer, routed):
    """Of every two neurons the cost written out; no other permutation that was tried is cheaper."""
    experts, members = layer.experts(), [1, 6]
    seen = Calibration(layer, routed, experts, 0.0).inputs(members)
    some = Experts(experts.gate_up[members], experts.down[members], gated=experts.gated)
    usage = torch.tensor([3.0, 0.5])
    rows = neurons.row_weights(some, seen)

    def cost(order: Tensor, other: Tensor) -> float:
        total = 0.0
        inner = some.inner
        pieces = [(some.gate_up[:, part * inner : (part + 1) * inner], part) for part in (0, 1)]
        for weights, part in pieces:
            c = rows.view(2, 2, inner)[:, part][:, :, None] * seen.x.diagonal(dim1=1, dim2=2)[:, None]
            total += float(best(weights.float().abs(), c * usage[:, None, None], order, other))
        c = (seen.activity * usage[:, None])[:, :, None].expand(-1, -1, 64)
        return total + float(best(some.down.float().abs().mT, c, order, other))

    def best(size: Tensor, c: Tensor, order: Tensor, other: Tensor) -> Tensor:
        a, b, d, e = size[0][order], size[1][other], c[0][order], c[1][other]
        mean = (d * a + e * b) / (d + e)
        costs = [d * (a - mean) ** 2 + e * (b - mean) ** 2, d * a**2, e * b**2]
        return torch.stack(costs).amin(dim=0).sum()

    found = matched(some, seen, usage)
    least = cost(*found)
    for seed in range(20):
        swap = found[1].clone()
        one, two = torch.randperm(len(swap), generator=torch.Generator().manual_seed(seed))[:2].tolist()
        swap[[one, two]] = swap[[two, one]]
        assert least <= cost(found[0], swap) * (1 + 1e-6)
    assert least < 0.97 * cost(torch.arange(some.inner), torch.arange(some.inner))


@pytest.mark.parametrize("block", [32, 12])
def test_pairs_are_matched_as_if_each_were_alone(layer, routed, monkeypatch, block):
    """Costs of all blocks go to the host at once, whole blocks and the rest (32 neurons), and come back in place."""
    monkeypatch.setattr(neurons, "BLOCK", block)
    monkeypatch.setattr(neurons, "AT_ONCE", 3 * 64 * 40)  # some neurons, and some columns, at a time
    experts = layer.experts()
    together, _ = in_order(layer, routed, experts, [0, 4, 6, 1, 2, 2])
    for first in (0, 2, 4):
        alone, _ = in_order(layer, routed, experts, [[0, 4], [6, 1], [2, 2]][first // 2])
        assert torch.equal(together[first : first + 2], alone)
    assert all(order.sort().values.tolist() == list(range(experts.inner)) for order in together)
    assert not torch.equal(together[1], torch.arange(experts.inner))
    assert torch.equal(together[4], torch.arange(experts.inner))  # equal experts: their own order costs nothing
