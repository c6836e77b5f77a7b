"""The kernels as operations of torch, `torch.ops.moefold`, so that torch.compile and CUDA graphs hold a layer whole.

`experts` is the layer with an activation that the kernels know. For any other, `gate_up` gives the rows before it and
`down` takes those after it; both sort the entries for themselves, which is one short launch more.

All take the same operands (operands.py), plain tensors and numbers, and have a fake implementation. Nothing here waits
for the device or tries configurations: a plan is looked up by the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, library

from moefold_kernels.errors import BackendError, FormatError
from moefold_kernels.triton import layer
from moefold_kernels.triton.layer import Activation
from moefold_kernels.triton.operands import Operands, check, sizes, weights


@library.custom_op("moefold::experts", mutates_args=())
def experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_packed: Tensor | None,
    down_packed: Tensor | None,
    gate_up_dense: Tensor | None,
    down_dense: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    places: Tensor,
    placed: Tensor,
    tops: Sequence[int],
    gated: bool,
    interleaved: bool,
    format: str,
    gate_up_low: Tensor | None,
    down_low: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    levels: Tensor | None,
    coded: bool,
    activation: str,
    limit: float,
    alpha: float,
    dtype: torch.dtype,
) -> Tensor:
    """The routed experts' output [token, hidden] in `dtype`.

    `hidden` [token, hidden] of any float type is computed with as bfloat16; `top_k_index` [token, top_k] is int32 or
    int64, and what is no expert's number contributes nothing; `top_k_weights` [token, top_k] is any float type.
    `activation` is a name of layer.ACTIVATIONS, `limit` and `alpha` are those of "clamped". Sums are float32.
    Raises FormatError when shapes or types do not fit each other, or rows of weights are not contiguous. There is no
    gradient.
    """
    operands = _operands(locals())
    check(operands, hidden, top_k_index, top_k_weights)
    fused = _fused(operands, activation, limit, alpha)
    with on(hidden):
        return layer.forward(weights(operands), hidden, top_k_index, top_k_weights, fused, dtype)


@library.custom_op("moefold::gate_up", mutates_args=())
def gate_up(
    hidden: Tensor,
    top_k_index: Tensor,
    gate_up_packed: Tensor | None,
    down_packed: Tensor | None,
    gate_up_dense: Tensor | None,
    down_dense: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    places: Tensor,
    placed: Tensor,
    tops: Sequence[int],
    gated: bool,
    interleaved: bool,
    format: str,
    gate_up_low: Tensor | None,
    down_low: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    levels: Tensor | None,
    coded: bool,
) -> Tensor:
    """What the first projection gives, bias included: [token * top_k, 2 * inner] bfloat16 (or inner), gate before up.

    Rows are in the order in which `down` reads them, entry by entry of the experts' places; those of indices that are
    no expert's come last and hold anything. Arguments and errors are those of `experts`.
    """
    operands = _operands(locals())
    check(operands, hidden, top_k_index)
    with on(hidden):
        held, x = weights(operands), _rows(hidden)
        plan = layer.apart(held, *top_k_index.shape)
        tables = layer.route_for(held, top_k_index, plan)
        return layer.gate_up(held, x, top_k_index.shape[1], tables, plan, _AS_THEY_ARE).rows


@library.custom_op("moefold::down", mutates_args=())
def down(
    rows: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_packed: Tensor | None,
    down_packed: Tensor | None,
    gate_up_dense: Tensor | None,
    down_dense: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    places: Tensor,
    placed: Tensor,
    tops: Sequence[int],
    gated: bool,
    interleaved: bool,
    format: str,
    gate_up_low: Tensor | None,
    down_low: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    levels: Tensor | None,
    coded: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The output [token, hidden] in `dtype` of activated rows [token * top_k, inner] in the order of `gate_up`.

    Arguments and errors are those of `experts`.
    """
    operands = _operands(locals())
    check(operands, None, top_k_index, top_k_weights, rows)
    with on(rows):
        held, x = weights(operands), rows.to(torch.bfloat16).contiguous()
        plan = layer.apart(held, *top_k_index.shape)
        tables = layer.route_for(held, top_k_index, plan)
        inner = layer.Inner(x)
        return layer.down(held, inner, top_k_index, top_k_weights, tables, plan, dtype, chained=False)


@library.register_fake("moefold::experts")
def _(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest: Any) -> Tensor:
    operands, (activation, limit, alpha, dtype) = Operands(*rest[:-4]), rest[-4:]
    check(operands, hidden, top_k_index, top_k_weights)
    _fused(operands, activation, limit, alpha)
    return hidden.new_empty(hidden.shape, dtype=dtype)


@library.register_fake("moefold::gate_up")
def _(hidden: Tensor, top_k_index: Tensor, *rest: Any) -> Tensor:
    operands = Operands(*rest)
    check(operands, hidden, top_k_index)
    _, inner = sizes(operands)
    return hidden.new_empty(top_k_index.numel(), inner * (1 + operands.gated), dtype=torch.bfloat16)


@library.register_fake("moefold::down")
def _(rows: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest: Any) -> Tensor:
    operands, dtype = Operands(*rest[:-1]), rest[-1]
    check(operands, None, top_k_index, top_k_weights, rows)
    return rows.new_empty(top_k_index.shape[0], sizes(operands)[0], dtype=dtype)


def _refuse_gradients(context: Any, *gradients: Any) -> NoReturn:  # noqa: ARG001  (autograd's interface)
    raise BackendError(
        "moefold's kernels have no gradient: run under torch.no_grad(), or train with another experts implementation, "
        'such as model.set_experts_implementation("grouped_mm")'
    )


for _operation in ("experts", "gate_up", "down"):
    library.register_autograd(f"moefold::{_operation}", _refuse_gradients)

_AS_THEY_ARE = Activation("none", function=lambda rows: rows)


def _operands(arguments: dict[str, Any]) -> Operands:
    return Operands(*(arguments[name] for name in Operands._fields))


def _fused(operands: Operands, activation: str, limit: float, alpha: float) -> Activation:
    if activation not in layer.ACTIVATIONS or not operands.gated:
        known = ", ".join(layer.ACTIVATIONS)
        raise FormatError(f"activation {activation!r}: write one of {known} for gated experts; else gate_up, then down")
    return Activation(activation, limit, alpha)


def _rows(hidden: Tensor) -> Tensor:
    x = hidden.to(torch.bfloat16)
    return x if x.stride(-1) == 1 else x.contiguous()


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors' when a model is spread over several."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
