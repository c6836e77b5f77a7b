"""transformers' experts implementation `moefold`: packed experts by the kernels, which read the words themselves.

A packed checkpoint takes it by default. Whether the kernels can is asked at each call, of the device that the tokens
are on: a model may be loaded on one device and moved to another, or spread over several. Where they cannot, and nobody
asked for `moefold` by name, the stock implementation runs over decoded weights, and the reason is logged once.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moefold_kernels import layout
from moefold_kernels.activation import OTHER, between
from moefold_kernels.backend import Need
from moefold_kernels.errors import BackendError
from moefold_kernels.grouped import runnable
from moefold_kernels.module import PackedModule, part_names
from moefold_kernels.routed import RoutedModule
from moefold_kernels.triton.backend import Triton

NAME = "moefold"

_log = logging.getLogger(__name__)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The routed experts' output [token, hidden] of a module of transformers' experts interface.

    Tokens and activations are computed with as bfloat16 whatever the model's dtype, which the output has again. Experts
    that are not packed, in a checkpoint where others are, are run by the stock implementation. Raises BackendError
    where `moefold` was asked for by name and cannot be had, with the reason.
    """
    batch = (hidden_states, top_k_index, top_k_weights)
    if not isinstance(module, PackedModule):
        return _stock(module, *batch)
    reason = _refusal(module, hidden_states)
    if not reason:
        return _run(module, *batch)
    if module.fallback is None:
        raise BackendError(
            f"experts_implementation={NAME!r} cannot run {module.stock_class.__name__}: {reason}. Name another one: "
            f'model.set_experts_implementation("{runnable(module, "grouped_mm", hidden_states.dtype)}")'
        )
    stock = runnable(module, module.fallback, hidden_states.dtype)
    _say(f"{module.stock_class.__name__}: {stock} over decoded weights, because {NAME} cannot: {reason}")
    return _stock(module, *batch)


def _refusal(module: PackedModule, hidden: Tensor) -> str:
    """Why the kernels cannot run this module on these tokens; empty where they can."""
    flags: Any = module
    by_default = module.fallback is not None
    if getattr(flags, "has_post_expert_norm", False):
        return "each expert's output is normalised (has_post_expert_norm)"
    if getattr(flags, "_is_expert_parallel", False):
        return "the experts of a pair stay together (expert parallelism)"
    if flags.has_bias and _biases(module)[0].shape[1] != module.inner * (1 + flags.has_gate):  # type: ignore[union-attr]
        return "the words are split over devices (tensor parallelism) and the biases are not"
    if module.packed_layer.format != layout.EXPONENT and module.split:
        return "the words of a few-bit format are split over devices (tensor parallelism)"
    if by_default and hidden.requires_grad and torch.is_grad_enabled():
        return "the kernels have no gradient (run under torch.no_grad() to use them)"
    return str(_device_refusal(hidden.device, hidden.dtype, module.packed_layer.format, not by_default))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _device_refusal(device: torch.device, dtype: torch.dtype, format: str, named: bool) -> str:
    return _ask(device, dtype, format, named)


@functools.cache
def _ask(device: torch.device, dtype: torch.dtype, format: str, named: bool) -> str:
    able, said = Triton(interpret=named).can(Need(format, device, dtype))
    if able:
        import moefold_kernels.triton.ops  # noqa: F401  (registers the operations, outside of any tracing)
    return "" if able else said


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _say(message: str) -> None:
    _say_once(message)


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def _run(module: PackedModule, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    operands, known = _operands(module), module.known_activation
    if known != OTHER:
        return torch.ops.moefold.experts(hidden, top_k_index, top_k_weights, *operands, *known, hidden.dtype)  # type: ignore[no-any-return]
    rows = torch.ops.moefold.gate_up(hidden, top_k_index, *operands)
    rows = between(module, rows.to(hidden.dtype))
    return torch.ops.moefold.down(rows, top_k_index, top_k_weights, *operands, hidden.dtype)  # type: ignore[no-any-return]


def _operands(module: PackedModule) -> tuple[Any, ...]:
    """The fields of triton/operands.py; the module's own tensors, this rank's part of them where they are split."""
    layer = module.packed_layer
    dense = (module.gate_up_dense, module.down_dense) if layer.dense else (None, None)
    top = layer.window
    tops = [top.get("gate_proj", top["up_proj"]), top["up_proj"], top["down_proj"]] if top else [127, 127, 127]
    words = (module.gate_up_packed, module.down_packed)
    tables = (module.places, module.placed)
    parts = [getattr(module, name, None) for part in ("low", "scale") for name in part_names(part)]
    few = (layer.format, *parts, getattr(module, "levels", None), module.coded)
    return (*words, *dense, *_biases(module), *tables, tops, layer.gated, not module.is_concatenated, *few)


def _biases(module: Any) -> tuple[Tensor | None, Tensor | None]:
    if not module.has_bias:
        return None, None
    return (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias), module.down_proj_bias


def _stock(module: Any, *batch: Tensor) -> Tensor:
    if not isinstance(getattr(module, "fallback", None), str):
        raise BackendError(
            f"{type(module).__name__} is not packed, and experts_implementation={NAME!r} is for packed checkpoints; "
            'name another one: model.set_experts_implementation("grouped_mm")'
        )
    stock: Any = module.stock_class if isinstance(module, RoutedModule) else type(module)
    eager = stock.forward.__wrapped__  # what transformers' decorator has wrapped
    name = runnable(module, str(module.fallback), batch[0].dtype)
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)(module, *batch)  # type: ignore[no-any-return]


def register() -> None:
    """Make transformers know the implementation by its name; done at import, and harmless when repeated."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
