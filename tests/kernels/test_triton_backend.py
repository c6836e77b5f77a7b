"""What the Triton backend says of itself, where it is not the machine that decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import assert_near, batch, expected, random_layer
from torch.nn import functional as F

from moefold_kernels import FormatError, Need, ask, builtin, choose, reference
from moefold_kernels.activation import silu
from moefold_kernels.triton.backend import Triton

CUDA = Need("exponent", torch.device("cuda"))


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU of some capability."""

    def have(capability):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return have


def test_it_is_asked_first():
    assert [backend.name for backend in builtin()] == ["triton", "reference"]


def test_what_it_refuses(gpu):
    gpu((9, 0))
    for change, reason in (
        ({"format": "4bit"}, "knows formats exponent, pair4, pair5, pair6, pair8, not 4bit"),
        ({"device": torch.device("meta")}, "meta tensors hold no values"),
        ({"device": torch.device("cpu")}, "compiles for CUDA devices, not for cpu"),
        ({"dtype": torch.float64}, "tokens are torch.float64"),
    ):
        able, said = Triton().can(replace(CUDA, **change))
        assert not able
        assert reason in said


def test_which_gpus_it_takes(gpu):
    gpu((9, 0))
    assert Triton().can(CUDA) == (True, "Triton kernels for compute capability 9.0")
    assert choose(CUDA, builtin()).name == "triton"
    assert "casts torch.float32 to bfloat16 and back" in Triton().can(replace(CUDA, dtype=torch.float32))[1]
    gpu((7, 5))
    assert Triton().can(CUDA) == (False, "compute capability 7.5 is older than 8.0")
    assert choose(CUDA, builtin()).name == "reference"


def test_without_a_gpu_or_triton(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert Triton().can(CUDA) == (False, "triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Triton().can(CUDA) == (False, "torch finds no CUDA device")


def test_interpretation_is_never_chosen_by_itself(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for device in ("cpu", "cuda"):
        need = replace(CUDA, device=torch.device(device))
        answers = {answer.backend.name: answer for answer in ask(need, builtin())}
        assert "interpretation is for tests" in answers["triton"].reason
        assert choose(need, builtin()).name == "reference"


@pytest.mark.parametrize("activate", [silu, lambda gate, up: F.gelu(gate) * up])
def test_it_does_what_the_reference_does(activate, device):
    backend = Triton(interpret=device.type == "cpu")
    assert backend.can(Need("exponent", device))[0]
    layer = random_layer(7, 40, 24, 1)
    arguments = batch(6, 40, 2, 7)
    found = backend.experts(layer.to(device).packed, *(t.to(device) for t in arguments), activate)
    assert found.dtype == torch.float32
    assert_near(found, expected(layer, *arguments, activate), fused=activate is silu)
    words = layer.packed.words["up_proj"].to(device)
    assert torch.equal(backend.decode(words, 123, 1), reference.decode(words, 123, 1))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("down_proj", lambda m: m.transpose(1, 2).contiguous().transpose(1, 2), "down_proj has strides .*contiguous"),
        ("up_proj", lambda m: torch.cat([m, m], dim=2)[:, :, : m.shape[2]], "gate_proj and up_proj have strides"),
    ],
)
@pytest.mark.parametrize("kind", ["words", "dense"])
def test_matrices_that_it_would_misread_are_refused(kind, name, change, message, device):
    packed = random_layer(7, 40, 24, 1).to(device).packed
    matrices = getattr(packed, kind)
    odd = replace(packed, **{kind: matrices | {name: change(matrices[name])}})
    arguments = [t.to(device) for t in batch(6, 40, 2, 7)]
    with pytest.raises(FormatError, match=message):
        Triton(interpret=device.type == "cpu").experts(odd, *arguments, silu)
