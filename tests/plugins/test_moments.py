"""Second moments streamed over tokens, against sums written out."""

from __future__ import annotations

import pytest
import torch
from calibrated import first_layer, routed_to
from torch import Tensor

from moefold import Routed
from moefold.errors import InputError
from moefold_plugins import visits as going
from moefold_plugins.moments import Calibration


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "deepseek_v3"])
def layer(request, tmp_path_factory: pytest.TempPathFactory):
    return first_layer(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def routed() -> Routed:
    """No token reaches experts 6 and 7 of 8."""
    return routed_to(6, tokens=200)


def expected(layer, routed: Routed, expert: int, blend: float) -> tuple[Tensor, Tensor, int]:
    """The blended moments of one expert, in float64 and token by token."""
    experts = layer.experts()
    hidden = layer.activate(experts, expert, routed.tokens).double()
    gates = [float(w[i == expert].sum()) for i, w in zip(routed.top_k_index, routed.top_k_weights, strict=True)]
    mine = [t for t, i in enumerate(routed.top_k_index) if expert in i]
    squares = [gates[t] ** 2 for t in mine]
    gate = sum(squares) / len(mine) if mine else float(routed.top_k_weights.square().mean())
    share = len(mine) / (len(mine) + blend) if mine else 0.0
    found = []
    for values in (routed.tokens.double(), hidden):
        own = sum((s * torch.outer(values[t], values[t]) for s, t in zip(squares, mine, strict=True)), torch.zeros(()))
        every = values.T @ values / len(values)
        found.append(share * own / max(len(mine), 1) + (1 - share) * gate * every)
    return found[0], found[1], len(mine)


@pytest.mark.parametrize("blend", [0.0, 256.0])
@pytest.mark.parametrize("chunk", [64, 10_000])
def test_moments_are_what_they_say(layer, routed, blend, chunk, monkeypatch):
    monkeypatch.setattr(going, "CHUNK", chunk)
    members = [5, 0, 7]
    found = Calibration(layer, routed, layer.experts(), blend).moments(members)
    for row, expert in enumerate(members):
        x, h, count = expected(layer, routed, expert, blend)
        assert found.tokens[row] == count
        for got, wanted in ((found.x[row], x), (found.h[row], h)):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=2e-4 * float(wanted.abs().max()))
    assert found.tokens[2] == 0


def test_no_tokens_at_all_are_refused(layer, routed):
    none = Routed(routed.tokens[None, :0], routed.tokens[:0], routed.top_k_index[:0], routed.top_k_weights[:0])
    with pytest.raises(InputError, match="no calibration tokens"):
        Calibration(layer, none, layer.experts(), 256.0)
