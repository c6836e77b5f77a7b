"""What down is to become, what is left of an expert's output, and what rows weigh: against tokens one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calibrated import first_layer, routed_to
from torch import Tensor

from moefold import Experts, Routed
from moefold_plugins.compensation import factor
from moefold_plugins.moments import Calibration
from moefold_plugins.targets import left, pulled, row_weights

MEMBERS = [2, 7, 0]


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "deepseek_v3"])
def layer(request, tmp_path_factory: pytest.TempPathFactory):
    return first_layer(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def routed() -> Routed:
    """No token reaches experts 6 and 7 of 8."""
    return routed_to(6, tokens=300)


def some(experts: Experts) -> Experts:
    bias = None if experts.gate_up_bias is None else experts.gate_up_bias[MEMBERS]
    return Experts(experts.gate_up[MEMBERS], experts.down[MEMBERS], bias, gated=experts.gated)


def seen_by(routed: Routed, expert: int) -> tuple[Tensor, Tensor]:
    """The tokens of one expert and their gate weights; of one that no token reaches all tokens, with the mean gate."""
    hits = routed.top_k_index == expert
    if not bool(hits.any()):
        gate = float(routed.top_k_weights.square().mean()) ** 0.5
        return routed.tokens, torch.full((len(routed.tokens),), gate)
    rows = hits.any(dim=1)
    return routed.tokens[rows], (routed.top_k_weights * hits).sum(dim=1)[rows]


@pytest.fixture
def coded(layer) -> tuple[Experts, Tensor]:
    """Three experts, and their gate and up with errors."""
    before = some(layer.experts())
    noise = torch.randn(before.gate_up.shape, generator=torch.Generator().manual_seed(1))
    return before, (before.gate_up.float() * (1 + 0.3 * noise)).bfloat16()


def activations(layer, routed: Routed, before: Experts, gate_up: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """g h and g h' of one member's tokens, float64."""
    tokens, gates = seen_by(routed, MEMBERS[row])
    both = (layer.activate(each, row, tokens).double() for each in (before, replace(before, gate_up=gate_up)))
    h, now = (values * gates[:, None].double() for values in both)
    return h, now


def test_what_coding_changes_is_what_it_says(layer, routed, coded):
    before, gate_up = coded
    found = Calibration(layer, routed, layer.experts(), 0.0).changed(MEMBERS, before, gate_up)
    for row in range(len(MEMBERS)):
        h, now = activations(layer, routed, before, gate_up, row)
        lost = ((h - now) @ before.down[row].double().T).square().sum(dim=1).mean()
        for got, wanted in (
            (found.h[row], now.T @ now / len(h)),
            (found.cross[row], (h - now).T @ now / len(h)),
            (found.lost[row], lost),
        ):
            torch.testing.assert_close(got.double(), wanted, rtol=0.02, atol=0.01 * float(wanted.abs().max()))


def test_down_becomes_the_best_for_what_it_multiplies(layer, routed, coded):
    """The solution of the normal equations in float64, with the damping that draws it towards D."""
    before, gate_up = coded
    found = Calibration(layer, routed, layer.experts(), 0.0).changed(MEMBERS, before, gate_up)
    target = pulled(before.down.mT, found.cross, factor(found.h.clone(), 0.01)).mT
    for row in range(len(MEMBERS)):
        h, now = activations(layer, routed, before, gate_up, row)
        down, moment = before.down[row].double(), now.T @ now / len(h)
        damping = 0.01 * moment.diagonal().mean()
        damped = moment + damping * torch.eye(len(moment))
        wanted = (down @ (h.T @ now / len(h)) + damping * down) @ torch.linalg.inv(damped)
        torch.testing.assert_close(target[row].double(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
        error = [(h @ down.T - now @ each.T).square().sum() for each in (down, target[row].double())]
        assert error[1] < 0.9 * error[0]


def test_what_is_left_is_the_error_of_the_outputs(layer, routed, coded):
    before, gate_up = coded
    changed = Calibration(layer, routed, layer.experts(), 0.0).changed(MEMBERS, before, gate_up)
    noise = torch.randn(before.down.shape, generator=torch.Generator().manual_seed(2))
    read = (before.down.float() * (1 + 0.2 * noise)).bfloat16()
    found = left(before.down, read, changed)
    for row in range(len(MEMBERS)):
        h, now = activations(layer, routed, before, gate_up, row)
        error = (h @ before.down[row].double().T - now @ read[row].double().T).square().sum(dim=1).mean()
        torch.testing.assert_close(found[row].double(), error, rtol=0.02, atol=0)


def test_rows_weigh_what_their_errors_do_to_outputs(layer, routed):
    """A small error of one row, measured in the output."""
    experts = layer.experts()
    before = some(experts)
    before = replace(before, gate_up=before.gate_up.float(), down=before.down.float(), gate_up_bias=None)
    seen = Calibration(layer, routed, replace(experts, gate_up_bias=None), 0.0).inputs(MEMBERS)
    weights = row_weights(before, seen)
    generator = torch.Generator().manual_seed(3)
    for row in range(2):
        tokens, gates = seen_by(routed, MEMBERS[row])
        tokens = tokens.float()
        for number in (3, before.inner + 5):
            step = 1e-3 * torch.randn(64, generator=generator)
            gate_up = before.gate_up.clone()
            gate_up[row, number] += step
            h, now = (layer.activate(replace(before, gate_up=g), row, tokens) for g in (before.gate_up, gate_up))
            error = (((h - now) @ before.down[row].T) * gates[:, None]).square().sum(dim=1).mean()
            # the error of the row, whatever the token: its mean square is what weights multiply
            each = (gates * (tokens @ step)).square()
            inputs = each.mean()
            slope = layer.slopes(before, row, tokens)[1][:, number]
            joint = (each * slope.square()).mean() * before.down[row][:, number % before.inner].square().sum()
            torch.testing.assert_close(error, joint, rtol=0.05, atol=0)
            expected = inputs * weights[row, number]
            assert 0.4 * float(error) < float(expected) < 2.5 * float(error)  # as if slope and input were independent
