"""What merging two experts is predicted to cost a layer: as pairs are chosen, a token, and rounding on top."""

from __future__ import annotations

import itertools

import pytest
import torch

from models import samples, tiny
from moefold import Checkpoint, Context, Experts, Routed, Text
from moefold.errors import InputError
from moefold_plugins import pair_errors as pair_errors_module
from moefold_plugins.calibrate import forward
from moefold_plugins.damage import FORMATS, damage_pairs
from moefold_plugins.moments import Calibration
from moefold_plugins.pair_coding import least_cost, read_cost
from moefold_plugins.pairing import pair_by_error

CONTEXT = Context(torch.device("cpu"), torch.Generator())
TEXT = Text("random", samples(8, 32).int())


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def layer(request, tmp_path_factory):
    return Checkpoint.open(str(tiny(request.param, tmp_path_factory.mktemp("m") / "m"))).layers()[1]


@pytest.fixture(scope="module")
def routed(layer):
    return forward(layer, TEXT, None, None, CONTEXT)


def test_damage_is_what_pairs_are_chosen_by_for_each_token(layer, routed):
    found = damage_pairs(layer, TEXT, routed, layer.experts(), None, CONTEXT)
    chosen = pair_by_error(layer, routed, layer.experts(), CONTEXT).costs
    torch.testing.assert_close(found.damage["exponent"] * len(routed.tokens), chosen, rtol=1e-5, atol=0)
    assert found.damage["exponent"].fill_diagonal_(1).min() > 0


def test_some_neurons_stand_for_all(layer, routed):
    whole, part = (
        damage_pairs(layer, TEXT, routed, layer.experts(), None, CONTEXT, sample=count) for count in (1000, 8)
    )
    assert whole.tokens.tolist() == part.tokens.tolist() == torch.bincount(routed.top_k_index.flatten()).tolist()
    pairs = torch.ones(8, 8).triu(1).bool()
    for name in FORMATS:
        ratio = part.damage[name][pairs] / whole.damage[name][pairs]
        assert ratio.mean() == pytest.approx(1.0, abs=0.1)
        assert not torch.equal(part.damage[name], whole.damage[name])


def test_fewer_bits_cost_more(layer, routed):
    found = damage_pairs(layer, TEXT, routed, layer.experts(), None, CONTEXT)
    pairs = torch.ones(8, 8).triu(1).bool()
    for better, worse in itertools.pairwise(FORMATS):
        assert (found.damage[better][pairs] < found.damage[worse][pairs]).all()


def test_peaks_are_the_largest_outputs(layer, routed):
    found = damage_pairs(layer, TEXT, routed, layer.experts(), None, CONTEXT)
    experts = layer.experts()
    for expert in (0, 5):
        rows = (routed.top_k_index == expert).any(dim=1)
        inner = layer.activate(experts, expert, routed.tokens[rows])
        bias = None if experts.down_bias is None else experts.down_bias[expert]
        output = torch.nn.functional.linear(inner, experts.down[expert], bias)
        assert float(found.peak[expert]) == pytest.approx(float(output.abs().max()))


def test_what_is_read_is_what_the_cheapest_choice_reads():
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.rand(4, 500, generator=generator).unbind()
    both, first, second = (c * a + d * b) / (c + d), a, b
    reads = torch.stack([torch.stack([both, both]), torch.stack([first, 0 * a]), torch.stack([0 * b, second])])
    costs = c * (a - reads[:, 0]).square() + d * (b - reads[:, 1]).square()
    least, which = costs.min(dim=0)
    assert len(which.unique()) == 3
    read = (c * reads[:, 0].square() + d * reads[:, 1].square()).gather(0, which[None])[0]
    torch.testing.assert_close(least_cost(a, b, c, d), least, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(read_cost(a, b, c, d), read, rtol=1e-4, atol=1e-8)


def test_neurons_that_never_fire_cost_nothing(layer, routed):
    """Gate and up of zeros: no activation, so that no error in down or in them counts."""
    own = layer.experts()
    bias = None if own.gate_up_bias is None else torch.zeros_like(own.gate_up_bias)
    dead = Experts(torch.zeros_like(own.gate_up), own.down, bias, own.down_bias)
    found = damage_pairs(layer, TEXT, routed, dead, None, CONTEXT)
    assert all(bool(found.damage[name].isfinite().all()) for name in FORMATS)
    assert len(pair_by_error(layer, routed, dead, CONTEXT).members) == 4


def test_pairs_at_once_change_nothing(layer, routed, monkeypatch):
    calibration = Calibration(layer, routed, layer.experts(), 1024.0)
    options = layer.experts(), calibration, 16, "usage", pair_errors_module.costs_and_reads
    whole = pair_errors_module.pair_errors(*options)
    monkeypatch.setattr(pair_errors_module, "AT_ONCE", 1)
    assert torch.equal(pair_errors_module.pair_errors(*options).figures, whole.figures)


def test_one_expert_has_no_pair(tmp_path):
    checkpoint = Checkpoint.open(str(tiny("qwen3_moe", tmp_path, num_experts=1, num_experts_per_tok=1)))
    layer = checkpoint.layers()[0]
    routed = forward(layer, TEXT, None, None, CONTEXT)
    found = damage_pairs(layer, TEXT, routed, layer.experts(), None, CONTEXT)
    assert {name: float(one) for name, one in found.damage.items()} == dict.fromkeys(FORMATS, 0.0)


def test_no_tokens_and_merged_experts_are_refused(layer, routed):
    none = Routed(routed.layer_input[:0], routed.tokens[:0], routed.top_k_index[:0], routed.top_k_weights[:0])
    with pytest.raises(InputError, match="no calibration tokens; give forward a text"):
        damage_pairs(layer, TEXT, none, layer.experts(), None, CONTEXT)
    own = layer.experts()
    merged = Experts(own.gate_up, own.down, own.gate_up_bias, own.down_bias, route=torch.arange(8))
    with pytest.raises(InputError, match="not for merged ones"):
        damage_pairs(layer, TEXT, routed, merged, None, CONTEXT)
