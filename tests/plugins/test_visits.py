"""Going over tokens by expert: each token once, with all its gate weights, however tokens are cut into visits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibrated import first_layer, routed_to

from moefold import Experts, Routed
from moefold_plugins import visits as going
from moefold_plugins.moments import Calibration
from moefold_plugins.visits import held, visits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory):
    return first_layer("qwen3_moe", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def routed() -> Routed:
    """No token reaches experts 6 and 7 of 8."""
    return routed_to(6, tokens=200)


@pytest.fixture(params=["from the host", "on the device"])
def resident(request, monkeypatch) -> bool:
    """Chunks of 64 tokens from the host; or all on the device, visits of at most 20 (gate and up have 64 rows)."""
    monkeypatch.setattr(going, "CHUNK", 64)
    monkeypatch.setattr(going, "ACTIVATED", 20 * 64)
    monkeypatch.setattr(going, "_resident", lambda _: request.param == "on the device")
    return request.param == "on the device"


def by_token(routed: Routed, experts: Experts, expert: int) -> list[tuple[list[float], float]]:
    """The tokens of one expert, written out one by one."""
    reached = routed.reaches(experts).tolist()
    return [
        (routed.tokens[t].tolist(), sum(float(routed.top_k_weights[t, k]) for k in range(2) if reached[t][k] == expert))
        for t in range(len(routed.tokens))
        if expert in reached[t]
    ]


def merged(experts: Experts) -> Experts:
    """Half as many: two of the model's for each."""
    return replace(experts, gate_up=experts.gate_up[:4], down=experts.down[:4], route=torch.arange(8) // 2)


@pytest.mark.parametrize("only", [None, [3, 0, 2]])
@pytest.mark.parametrize("some", ["the model's", "merged"])
def test_each_token_is_visited_once_with_all_its_weights(layer, routed, resident, some, only):
    experts = layer.experts() if some == "the model's" else merged(layer.experts())
    found: dict[int, list] = {}
    sizes, order = [], []
    for expert, tokens, gates, rows in visits(routed, experts, CPU, only):
        assert torch.equal(tokens, routed.tokens[rows])
        order.append(expert)
        sizes.append(len(tokens))
        found.setdefault(expert, []).extend(zip(tokens.tolist(), gates.tolist(), strict=True))
    members = list(range(experts.count)) if only is None else only
    wanted = {expert: by_token(routed, experts, expert) for expert in members}
    assert found.keys() == {expert for expert, tokens in wanted.items() if tokens}
    for expert, visited in found.items():
        assert [tokens for tokens, _ in visited] == [tokens for tokens, _ in wanted[expert]]
        assert [gate for _, gate in visited] == pytest.approx([gate for _, gate in wanted[expert]])
    assert max(sizes) <= (20 if resident else 64)
    if resident:
        assert order == sorted(order, key=members.index)  # one chunk
        assert len(order) > len(set(order))  # and more than one visit of an expert
    if some == "merged":
        chosen = routed.reaches(experts)
        assert (chosen[:, 0] == chosen[:, 1]).any()  # tokens that reach an expert twice


def test_means_are_the_same_however_tokens_are_cut(layer, routed, monkeypatch):
    def taken() -> list[torch.Tensor]:
        experts, members = layer.experts(), [5, 0, 7]
        calibration = Calibration(layer, routed, experts, 16.0)
        before = Experts(experts.gate_up[members], experts.down[members], gated=experts.gated)
        changed = calibration.changed(members, before, before.gate_up * 0.9)
        return [*calibration.moments(members)[:2], *calibration.inputs(members)[:3], *changed]

    whole = taken()
    monkeypatch.setattr(going, "ACTIVATED", 20 * 64)
    monkeypatch.setattr(going, "_resident", lambda _: True)
    for one, other in zip(whole, taken(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


def test_tokens_that_would_take_much_of_a_gpu_stay_on_the_host(routed, monkeypatch):
    size = routed.tokens.numel() * routed.tokens.element_size()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * size - 8, 16 * size))
    assert held(routed, torch.device("cuda")) is routed
    assert held(routed, CPU) is routed


@pytest.mark.gpu
def test_tokens_that_take_little_of_a_gpu_lie_on_it(layer, routed):
    device = torch.device("cuda")
    there = held(routed, device)
    assert there.tokens.is_cuda
    assert there.top_k_index.is_cuda
    assert there.top_k_weights.is_cuda
    experts = layer.experts()
    found = [list(visits(each, experts.to(device), device)) for each in (routed, there)]
    for one, other in zip(*found, strict=True):
        assert one.expert == other.expert
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.gates, other.gates)
