"""Recognising activations by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations.moe import use_experts_implementation

from moefold_kernels.activation import OTHER, Known, between, clamped, recognise, recognise_module, silu


def experts(act_fn=F.silu, apply_gate=None, *, gate=True, joined=True, **attributes):
    """A module of the interface that has an activation and nothing else."""

    class Toy(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.act_fn = act_fn
            for name, value in attributes.items():
                setattr(self, name, value)

        def forward(self):
            raise NotImplementedError

    if apply_gate:
        Toy._apply_gate = apply_gate
    return use_experts_implementation(has_gate=gate, is_concatenated=joined)(Toy)(PreTrainedConfig())


def test_the_common_ones():
    assert recognise(silu) == Known("silu")
    assert recognise(lambda gate, up: clamped(gate, up, 7.0, 1.702), [(7.0, 1.702)]) == Known("clamped", 7.0, 1.702)
    assert recognise_module(experts(torch.nn.SiLU())) == Known("silu")
    assert recognise_module(experts(apply_gate=lambda s, x: (F.silu(x.float().chunk(2, -1)[0]) * x.float().chunk(2, -1)[1]).to(x))) == Known("silu")  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    "other",
    [
        lambda gate, up: F.gelu(gate) * up,
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
        lambda gate, up: F.silu(up) * gate,
        lambda gate, up: F.silu(gate.clamp(max=1000.0)) * up,
        lambda gate, up: F.silu(gate) * (up + 1),
        lambda gate, up: F.silu(gate) * up * 1.001,
        lambda gate, up: clamped(gate, up, 7.0, 1.7),
        lambda gate, up: F.silu(gate),
        lambda gate, up: (F.silu(gate) * up)[..., :1],
    ],
)
def test_what_is_nearly_the_same_is_another(other):
    assert recognise(other, [(7.0, 1.702)]) == OTHER


def test_models_of_transformers():
    """The class of gpt-oss itself, in its own layout."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    small = AutoConfig.for_model("gpt_oss", hidden_size=8, intermediate_size=4, num_local_experts=2)
    with torch.device("meta"):  # as it is while a model loads
        module = GptOssExperts(small)
        assert recognise_module(module) == Known("clamped", 7.0, 1.702)
    module.limit = 6.0  # the one that it computes with
    assert recognise_module(module) == Known("clamped", 6.0, 1.702)


def test_modules_that_no_kernel_knows():
    assert recognise_module(experts(gate=False)) == OTHER
    weighted = torch.nn.PReLU()
    assert recognise_module(experts(weighted)) == OTHER
    assert recognise_module(experts(weighted.to("meta"))) == OTHER


def test_the_modules_own_function_gets_its_own_layout():
    rows = torch.randn(5, 12)
    gate, up = rows.chunk(2, dim=-1)
    by_pairs = lambda s, x: F.gelu(x[..., ::2]) * x[..., 1::2]  # noqa: E731
    assert torch.equal(between(experts(F.gelu), rows), F.gelu(gate) * up)
    assert torch.equal(between(experts(apply_gate=by_pairs, joined=False), rows), F.gelu(gate) * up)
    assert torch.equal(between(experts(F.relu, gate=False), rows), rows.relu())
