"""`check_family`: known architectures pass, a new one needs no code, and what is broken is told by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from models import _COMMON, ARCHITECTURES, tiny
from moefold import Checkpoint
from moefold.testing import CheckError, check_family


def config(architecture: str, **more: Any) -> Any:
    chosen = {} if architecture == "qwen3" else {"num_experts_per_tok": 2}
    return AutoConfig.for_model(architecture, **(_COMMON | chosen | ARCHITECTURES.get(architecture, {}) | more))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures_pass(name):
    check_family(config(name))


def test_a_checkpoint_is_checked_as_it_is(tmp_path):
    check_family(Checkpoint.open(str(tiny("mixtral", tmp_path / "model", num_local_experts=5))))


def test_sizes_that_the_default_implementation_refuses_pass():
    check_family(config("qwen3_moe", moe_intermediate_size=20))


class NewConfig(Qwen3MoeConfig):
    model_type = "a_new_one"


class NewExperts(qwen.Qwen3MoeExperts):
    """Gate and up through another activation than any known family's, in transformers' fused interface."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.tanh(gate) * (up + 1)


class NewModel(Qwen3MoeForCausalLM):
    config_class = NewConfig

    def __init__(self, config: NewConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.experts = NewExperts(config)
        self.post_init()


@pytest.fixture(scope="module")
def registered() -> None:
    AutoConfig.register("a_new_one", NewConfig, exist_ok=True)
    AutoModelForCausalLM.register(NewConfig, NewModel, exist_ok=True)


def new(**more: Any) -> NewConfig:
    return NewConfig(**(_COMMON | ARCHITECTURES["qwen3_moe"] | {"num_experts_per_tok": 2} | more))


def test_a_new_architecture_needs_no_code(registered):
    check_family(new())


def broken(monkeypatch, owner: Any, name: str, made: Any) -> str:
    monkeypatch.setattr(owner, name, made(getattr(owner, name)))
    with pytest.raises(CheckError) as raised:
        check_family(config("qwen3_moe"))
    return str(raised.value)


def test_state_between_layers_is_told(monkeypatch):
    """Each layer adds what an earlier one left on the class."""
    left: list[torch.Tensor] = []

    def made(forward):
        def leaking(self, hidden_states, *args, **kwargs):
            out = forward(self, hidden_states, *args, **kwargs)
            if not hidden_states.is_meta and hidden_states.shape[1] == 17:
                out = out + 0.5 * left[-1] if left and left[-1].shape == out.shape else out
                left.append(out.detach())
            return out

        return leaking

    told = broken(monkeypatch, qwen.Qwen3MoeDecoderLayer, "forward", made)
    assert told.startswith("family qwen3_moe, layer 0: what leaves it, run alone is not what the whole model has")


def test_chance_is_told(monkeypatch):
    noise = torch.Generator().manual_seed(0)

    def made(forward):
        return lambda self, *given: forward(self, *given) * (1 + 0.02 * torch.rand((), generator=noise))

    assert "or something is left to chance" in broken(monkeypatch, qwen.Qwen3MoeExperts, "forward", made)


def test_flags_that_lie_are_told(monkeypatch):
    """The forward takes up for gate, and `_apply_gate` is as it was."""

    def made(_):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = torch.zeros_like(hidden_states)
            for slot in range(top_k_index.shape[1]):
                for token, expert in enumerate(top_k_index[:, slot].tolist()):
                    up, gate = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                    inner = self.act_fn(gate) * up
                    out[token] += top_k_weights[token, slot].to(out.dtype) * (self.down_proj[expert] @ inner)
            return out

        return forward

    told = broken(monkeypatch, qwen.Qwen3MoeExperts, "forward", made)
    assert "family qwen3_moe, layer 0: its experts' own gate, up and down give another output than the module" in told
    assert "is_concatenated" in told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3", "family qwen3: moefold cannot read it: .*has no routed experts"),
        ("jetmoe", "family jetmoe: moefold cannot read it: .*keeps its routed experts in a form of its own"),
    ],
)
def test_what_has_no_fused_experts_is_told(name, message):
    settings = {"num_local_experts": 4, "intermediate_size": 32, "kv_channels": 16} if name == "jetmoe" else {}
    with pytest.raises(CheckError, match=message):
        check_family(config(name, **settings))


def test_weights_that_are_not_finite_are_told(tmp_path):
    path = tiny("mixtral", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] = float("inf")
    model.save_pretrained(tmp_path / "infinite")
    with pytest.raises(CheckError, match="layer 1: some expert weights are NaN or infinite"):
        check_family(Checkpoint.open(str(tmp_path / "infinite")))
