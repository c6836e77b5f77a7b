"""A packed experts module in every layout that transformers' interface knows."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import PreTrainedConfig
from transformers.integrations.moe import use_experts_implementation

from moefold_kernels import FormatError, PackedLayer, decode
from moefold_kernels.module import PackedModule, pack_module, unpack_module

EXPERTS, HIDDEN, INNER = 5, 8, 6
PAIRS, ALONE = ((4, 0), (1, 3)), (2,)
LAYOUTS = [
    (gate, transposed, joined)
    for gate, transposed, joined in itertools.product([True, False], repeat=3)
    if gate or joined  # without a gate there is nothing to interleave
]


def stock(gate: bool, transposed: bool, joined: bool) -> torch.nn.Module:
    """A module of the interface, with random weights."""

    @use_experts_implementation(has_gate=gate, is_transposed=transposed, is_concatenated=joined)
    class Toy(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            rows = 2 * INNER if gate else INNER
            up, down = (EXPERTS, rows, HIDDEN), (EXPERTS, HIDDEN, INNER)
            up, down = ((e, c, r) if transposed else (e, r, c) for e, r, c in (up, down))
            self.register_parameter(
                "gate_up_proj" if gate else "up_proj", torch.nn.Parameter(torch.randn(up).bfloat16())
            )
            self.down_proj = torch.nn.Parameter(torch.randn(down).bfloat16())
            self.num_experts, self.act_fn = EXPERTS, torch.nn.functional.silu

        def forward(self, hidden, index, weights):
            raise NotImplementedError

    torch.manual_seed(0)
    config = PreTrainedConfig()
    config._experts_implementation = "batched_mm"
    return Toy(config)


def layer(gate: bool = True, **changes) -> PackedLayer:
    """The entry that fits."""
    names = ("gate_proj", "up_proj", "down_proj") if gate else ("up_proj", "down_proj")
    window = dict(zip(names, (127, 125, 126), strict=False))
    values = {"pairs": PAIRS, "dense": ALONE, "matrix": {name: name for name in names}}
    return PackedLayer("model.layers.0.mlp.experts", window, **(values | changes))


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Random words."""
    generator = torch.Generator().manual_seed(1)
    for name in ("gate_up_packed", "down_packed"):
        words = getattr(module, name)
        words.copy_(torch.randint(-(2**15), 2**15, words.shape, generator=generator))
    for name in ("gate_up_dense", "down_dense"):
        dense = getattr(module, name).data
        dense.copy_(torch.randn(dense.shape, generator=generator))
    return module


def expected(module: PackedModule, transposed: bool, joined: bool, gate: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the stock names must give, put together expert by expert."""
    window = module.packed_layer.window
    gate_ups, downs = [], []
    for expert in range(EXPERTS):
        if expert in ALONE:
            gate_up, down = module.gate_up_dense[0].detach(), module.down_dense[0].detach()
        else:
            (pair, slot) = next((p, members.index(expert)) for p, members in enumerate(PAIRS) if expert in members)
            words = module.gate_up_packed[pair]
            parts = {"gate_proj": words[:INNER], "up_proj": words[INNER:]} if gate else {"up_proj": words}
            gate_up = torch.cat([decode(part, window[name], slot) for name, part in parts.items()])
            down = decode(module.down_packed[pair], window["down_proj"], slot)
        if gate and not joined:
            gate_up = torch.stack([gate_up[:INNER], gate_up[INNER:]], dim=1).flatten(0, 1)
        gate_ups.append(gate_up.T if transposed else gate_up)
        downs.append(down.T if transposed else down)
    return torch.stack(gate_ups), torch.stack(downs)


@pytest.mark.parametrize(("gate", "transposed", "joined"), LAYOUTS)
def test_every_layout(gate, transposed, joined):
    module = stock(gate, transposed, joined)
    kind = type(module)
    shapes = {name: value.shape for name, value in module.named_parameters()}
    pack_module(module, layer(gate), "here")
    assert isinstance(module, PackedModule)
    assert isinstance(module, kind)
    filled(module)
    name = "gate_up_proj" if gate else "up_proj"
    want = expected(module, transposed, joined, gate)
    for got, right, stock_name in zip(
        (getattr(module, name), module.down_proj), want, (name, "down_proj"), strict=True
    ):
        assert torch.equal(got, right)
        assert got.is_contiguous()
        assert got.shape == shapes[stock_name]
    x, index, weights = (
        torch.randn(4, HIDDEN).bfloat16(),
        torch.tensor([[0, 1], [2, 4], [3, 0], [1, 2]]),
        torch.rand(4, 2),
    )
    packed_out = module(x, index, weights)
    copied = copy.deepcopy(module)
    unpack_module(module)
    assert type(module) is kind
    assert dict(module.named_parameters()).keys() == shapes.keys()
    assert not list(module.buffers())
    assert torch.equal(getattr(module, name), want[0])
    assert torch.equal(module(x, index, weights), packed_out)
    assert torch.equal(copied(x, index, weights), packed_out)


def test_a_forward_decodes_each_matrix_once(monkeypatch):
    module = stock(True, False, True)
    pack_module(module, layer(), "here")
    filled(module)
    reads = []
    fill = PackedModule.packed_experts
    monkeypatch.setattr(PackedModule, "packed_experts", lambda self: reads.append(1) or fill(self))
    monkeypatch.setattr(type(module).__mro__[2], "forward", lambda self: [self.down_proj, self.down_proj])
    first, second = module()
    assert first is second
    assert module.down_proj is not first  # nothing decoded outlives the forward
    assert module._decoded is None


def test_a_failing_forward_forgets_what_it_decoded(monkeypatch):
    module = stock(True, False, True)
    pack_module(module, layer(), "here")
    monkeypatch.setattr(type(module).__mro__[2], "forward", lambda self: self.down_proj[EXPERTS])
    with pytest.raises(IndexError):
        module()
    assert module._decoded is None


def test_what_does_not_fit_is_refused():
    with pytest.raises(FormatError, match="here: the checkpoint lists 4 experts, the model has 5"):
        pack_module(stock(True, False, True), layer(dense=()), "here")
    with pytest.raises(FormatError, match="here: the checkpoint is not gated, the model is otherwise"):
        pack_module(stock(True, False, True), layer(False), "here")


def test_packing_on_meta_allocates_nothing():
    with torch.device("meta"):
        module = stock(True, False, True)
        pack_module(module, layer(), "here")
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert set(module.state_dict()) == {"gate_up_packed", "down_packed", "gate_up_dense", "down_dense"}
    assert module.gate_up_packed.dtype == torch.int16
