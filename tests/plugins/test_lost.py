"""What a layer's tokens have lost and experts could make up for: against tokens one by one; and that it helps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibrated import first_layer, routed_to
from torch import Tensor

from moefold import Context, Experts, Groups, Layer, LevelTable, MergedPairs, Routed
from moefold.codec import pack, unpack
from moefold_plugins import compensated as stage
from moefold_plugins.codecs import Exponent
from moefold_plugins.compensated import compensated
from moefold_plugins.compensation import factor
from moefold_plugins.lost import Change, Lost
from moefold_plugins.moments import Calibration
from moefold_plugins.pair_codecs import Pair6
from moefold_plugins.targets import pulled

CONTEXT = Context(torch.device("cpu"), torch.Generator())
PAIRS = Groups([[0, 6], [1, 7], [2, 5]], [3, 4])
MEMBERS = [0, 6, 2, 5]
BLEND = 50.0


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def layer(request, tmp_path_factory: pytest.TempPathFactory) -> Layer:
    return first_layer(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def routed() -> Routed:
    """No token reaches experts 6 and 7 of 8."""
    return routed_to(6, tokens=600)


def noisy(weights: Tensor, seed: int) -> Tensor:
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed))
    return (weights.float() * (1 + 0.3 * noise)).to(weights.dtype)


@pytest.fixture
def change(layer) -> Change:
    experts = layer.experts()
    bias = None if experts.gate_up_bias is None else experts.gate_up_bias[MEMBERS]
    before = Experts(experts.gate_up[MEMBERS], experts.down[MEMBERS], bias, gated=experts.gated)
    return Change(MEMBERS, before, replace(before, gate_up=noisy(before.gate_up, 1), down=noisy(before.down, 2)))


def by_hand(layer: Layer, routed: Routed, change: Change, row: int) -> tuple[Tensor, Tensor]:
    """What a member makes each token lose [token, hidden], and g h' of each token [token, inner]: float64."""
    gates = (routed.top_k_weights * (routed.top_k_index == change.members[row])).sum(dim=1, keepdim=True).double()
    h, now = (layer.activate(each, row, routed.tokens).double() * gates for each in change.both)
    return h @ change.before.down[row].double().T - now @ change.after.down[row].double().T, now


def test_it_is_what_all_members_lose_and_a_member_is_pulled_by_the_others(layer, routed, change):
    lost = Lost(Calibration(layer, routed, layer.experts(), BLEND))
    lost.add(change.of(slice(0, 2)))
    lost.add(change.of(slice(2, 4)))
    each = [by_hand(layer, routed, change, row) for row in range(4)]
    total = torch.stack([own for own, _ in each]).sum(dim=0)
    torch.testing.assert_close(lost.tokens.double(), total, rtol=0.03, atol=0.03 * float(total.abs().mean()))
    found = lost.pull(change)
    for row, (own, now) in enumerate(each):
        count = int((routed.top_k_index == MEMBERS[row]).any(dim=1).sum())
        known = (total - own).T @ now / (count + BLEND) if count else torch.zeros(own.shape[1], now.shape[1])
        torch.testing.assert_close(
            found[row].double(), known.double(), rtol=0.05, atol=0.05 * float(known.abs().mean())
        )


def test_the_pulled_down_makes_up_for_what_others_lost():
    """D* is the least squares solution of D h' + r, token by token."""
    generator = torch.Generator().manual_seed(3)
    h, down, lost = (torch.randn(*shape, generator=generator) for shape in ((500, 12), (20, 12), (500, 20)))
    moment = h.T @ h / 500
    found = pulled(down.T[None], torch.zeros(1, 12, 12), factor(moment[None].clone(), 1e-9), (lost.T @ h / 500)[None])
    known = torch.linalg.lstsq(h, h @ down.T + lost).solution
    torch.testing.assert_close(found[0], known, rtol=1e-3, atol=1e-4)


def left(layer: Layer, routed: Routed, merged: MergedPairs) -> float:
    """What is missing of the layer's output, squared, over all tokens."""
    now, was = unpack(Exponent(), pack(Exponent(), merged), layer, CONTEXT.device), layer.experts()
    missing = torch.zeros(routed.tokens.shape, dtype=torch.float64)
    for expert in range(was.count):
        gates = (routed.top_k_weights * (routed.top_k_index == expert)).sum(dim=1, keepdim=True).double()
        outputs = (layer.output(each, expert, routed.tokens).double() for each in (was, now))
        missing += gates * (next(outputs) - next(outputs))
    return float(missing.square().sum())


def test_together_experts_leave_less_of_the_layers_output(layer, routed, monkeypatch):
    options = {"blend": BLEND, "damping": 0.01}

    def found(together: bool) -> MergedPairs:
        return compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT, together=together, **options)

    alone, at_once = left(layer, routed, found(together=False)), found(together=True)
    assert left(layer, routed, at_once) < 0.95 * alone
    default = compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT, **options)
    assert torch.equal(default.magnitude["down_proj"], at_once.magnitude["down_proj"])
    monkeypatch.setattr(stage, "BUDGET", 1)  # chunks of one pair make up for those before them
    assert left(layer, routed, found(together=True)) < alone


@pytest.mark.parametrize("options", [{}, {"order": "activation"}, {"neurons": "natural"}, {"format": "pair6"}])
def test_what_is_coded_once_more_packs_exactly(layer, routed, options):
    levels = torch.tensor([0.3, 0.55, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0]).bfloat16().tolist()
    table = LevelTable({"3": levels}) if "format" in options else None
    codec = Pair6() if table else Exponent()
    alone, merged = (
        compensated(layer, routed, layer.experts(), PAIRS, table, CONTEXT, together=together, **options)
        for together in (False, True)
    )
    read = unpack(codec, pack(codec, merged), layer, CONTEXT.device).matrices()
    for matrix, weights in read.items():
        same = torch.equal(alone.magnitude[matrix], merged.magnitude[matrix])
        assert same == (matrix != "down_proj")
        for index, members in enumerate(PAIRS.members):
            for slot, expert in enumerate(members):
                assert torch.equal(weights[expert].bfloat16(), merged.read(matrix, index, slot))
