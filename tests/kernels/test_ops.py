"""The operations of torch: what torch asks of them, what they refuse, and that compiling keeps them whole."""

from __future__ import annotations

import pytest
import torch
from layers import assert_near, batch, expected, leveled_layer, operands, random_layer
from torch import library

from moefold_kernels import BackendError, FormatError

ops = pytest.importorskip("moefold_kernels.triton.ops", reason="needs triton")

SILU = ("silu", 0.0, 0.0)


@pytest.fixture
def made(device):
    """(operands, batch on the device, batch) of a small layer with pairs and one expert alone."""
    layer = random_layer(5, 40, 24, 1, biased=True)
    arguments = batch(4, 40, 2, 5)
    return operands(layer.to(device)), [t.to(device) for t in arguments], expected(layer, *arguments)


def by_columns(matrices):
    """The same values, as gpt-oss keeps weights: a column's numbers side by side."""
    return matrices.transpose(1, 2).contiguous().transpose(1, 2)


def spread(tensor):
    """The same values, with as much between any two."""
    return torch.stack([tensor, tensor * 0], dim=-1)[..., 0]


def test_rows_and_units_may_lie_as_they_like(made):
    given, arguments, right = made
    wider = {}
    for name in ("gate_up_packed", "down_packed", "gate_up_dense", "down_dense"):
        matrices = getattr(given, name)
        unit, rows, columns = matrices.shape
        held = matrices.new_ones(unit + 1, rows + 2, columns + 6)
        wider[name] = held[1:, 1 : rows + 1, :columns].copy_(matrices)
    assert_near(torch.ops.moefold.experts(*arguments, *given._replace(**wider), *SILU, torch.float32), right)


def test_torch_checks_them(made):
    given, (x, index, weights), _ = made
    library.opcheck(ops.experts, (x, index, weights, *given, *SILU, torch.float32))
    library.opcheck(ops.gate_up, (x, index, *given))
    rows = torch.ops.moefold.gate_up(x, index, *given)[:, :24].contiguous()
    library.opcheck(ops.down, (rows, index, weights, *given, torch.bfloat16))


@pytest.mark.parametrize(("hidden", "inner"), [(128, 256), (128, 192), (64, 192)])
def test_few_bits_are_registered_as_they_should_be(hidden, inner, device):
    """In bands, gate and up in bands, and by rows: the fake implementation has as many columns as there are."""
    layer = leveled_layer("pair5", 6, hidden, inner, device=device)
    x, index, weights = (t.to(device) for t in batch(5, hidden, 2, 6))
    given = operands(layer)
    library.opcheck(ops.experts, (x, index, weights, *given, *SILU, torch.float32))
    library.opcheck(ops.gate_up, (x, index, *given))
    rows = torch.randn(10, inner, device=device).bfloat16()
    library.opcheck(ops.down, (rows, index, weights, *given, torch.bfloat16))


def test_fakes_have_the_shapes_and_types(made):
    given, (x, index, weights), _ = made
    layer = random_layer(4, 40, 24, gated=False)
    for operation, arguments in (
        (ops.experts, (x, index, weights, *given, *SILU, torch.float16)),
        (ops.gate_up, (x, index, *given)),
        (ops.gate_up, (x, index, *operands(layer.to(x.device)))),
    ):
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        real, fake = operation(*arguments), operation(*meta)
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(made, dynamic):
    given, arguments, right = made

    def layer(x, index, weights):
        return torch.ops.moefold.experts(x * 1, index, weights, *given, *SILU, torch.float32) + 0

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_near(compiled(*arguments), right)
    assert compiled(*(t[:3] for t in arguments)).shape == (3, 40)


def test_no_gradient(made):
    given, (x, index, weights), _ = made
    out = torch.ops.moefold.experts(x.requires_grad_(), index, weights, *given, *SILU, torch.float32)
    with pytest.raises(BackendError, match=r"no gradient: run under torch.no_grad\(\)"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"hidden": a["hidden"][:, 1:]}, r"hidden is \[4, 39\] torch.bfloat16.*want \[4, 40\]"),
        (lambda a: a | {"top_k_weights": a["top_k_weights"][:2]}, r"top_k_weights is \[2, 2\].*want \[4, 2\]"),
        (lambda a: a | {"top_k_index": a["top_k_index"].float()}, "top_k_index: .* of int32 or int64"),
        (lambda a: a | {"down_packed": a["down_packed"][:1]}, r"down_packed is .*want \[2, 40, 24\]"),
        (lambda a: a | {"gate_up_packed": a["gate_up_packed"].float()}, "words are int16"),
        (lambda a: a | {"places": a["places"].long()}, "tables of places int32"),
        (lambda a: a | {"placed": a["placed"][1:]}, r"placed is \[4\]"),
        (lambda a: a | {"gate_up_dense": None, "down_dense": None}, "places has 5 experts, which"),
        (lambda a: a | {"down_bias": None}, "biases are those of both projections"),
        (lambda a: a | {"gate_up_packed": None, "gate_up_dense": None}, "a layer needs gate_up and down"),
        (lambda a: a | {"activation": "gelu"}, "activation 'gelu': write one of silu, clamped"),
        *(
            (
                lambda a, name=name: a | {name: by_columns(a[name])},
                rf"{name} has strides .*: give {name}.contiguous\(\)",
            )
            for name in ("gate_up_packed", "down_packed", "gate_up_dense", "down_dense")
        ),
        (lambda a: a | {"places": spread(a["places"])}, r"places has strides \(2,\): give places.contiguous\(\)"),
        (lambda a: a | {"placed": spread(a["placed"])}, r"placed has strides \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(made, change, message):
    given, (x, index, weights), _ = made
    arguments = {"hidden": x, "top_k_index": index, "top_k_weights": weights, **given._asdict()}
    arguments |= {"activation": "silu", "limit": 0.0, "alpha": 0.0, "dtype": torch.float32}
    with pytest.raises(FormatError, match=message):
        torch.ops.moefold.experts(**change(arguments))
