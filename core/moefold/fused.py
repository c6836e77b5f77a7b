"""A family's fused experts module: recognised by its flags, read and written in canonical order.

transformers gives 65 of its experts classes one interface (`use_experts_implementation`): fused parameters, flags that
say how they lie, and `_apply_gate`. Everything here is a permutation, hence exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moefold.artifacts import Experts


def is_fused(module: nn.Module) -> bool:
    """Whether transformers' own experts implementations can run the module."""
    return all(hasattr(module, flag) for flag in ("is_concatenated", "has_gate", "_apply_gate"))


def parameters(module: Any) -> list[str]:
    """The module's own names for (gate and) up weights, down weights, and their biases, in this order."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return [up, "down_proj", *([f"{up}_bias", "down_proj_bias"] if module.has_bias else [])]


def matrices(module: Any) -> list[str]:
    """The standard names of the module's weight matrices."""
    return ["gate_proj", "up_proj", "down_proj"] if module.has_gate else ["up_proj", "down_proj"]


def canonical(module: Any, own: dict[str, Tensor]) -> Experts:
    """The module's parameters, by its own names and in its own layout, as `Experts`; copies only what must move."""
    up, down, *biases = (own[name] for name in parameters(module))
    if module.is_transposed:
        up, down = _transposed(up), _transposed(down)
    weights = Experts(_blocked(up) if _interleaves(module) else up, down, gated=bool(module.has_gate))
    return with_biases(module, weights, biases)


def with_biases(module: Any, weights: Experts, biases: list[Tensor]) -> Experts:
    """Canonical weights with the module's biases in its own layout, if it has any."""
    if not biases:
        return weights
    up, down = biases
    return replace(weights, gate_up_bias=_blocked(up) if _interleaves(module) else up, down_bias=down)


def in_own_layout(module: Any, experts: Experts) -> dict[str, Tensor]:
    """`Experts` as the module's parameters: the inverse of `canonical`."""
    up, down = experts.gate_up, experts.down
    if _interleaves(module):
        up = _interleaved(up)
    values = [_transposed(up), _transposed(down)] if module.is_transposed else [up, down]
    biases = biases_in_own_layout(module, experts.gate_up_bias, experts.down_bias)
    return dict(zip(parameters(module), values, strict=False)) | biases


def biases_in_own_layout(module: Any, gate_up: Tensor | None, down: Tensor | None) -> dict[str, Tensor]:
    """The biases of `Experts` as the module's parameters, if it has any."""
    if not module.has_bias:
        return {}
    if gate_up is None or down is None:
        raise ValueError(f"{type(module).__name__} has biases and these experts have none; keep the source's")
    return dict(
        zip(parameters(module)[2:], [_interleaved(gate_up) if _interleaves(module) else gate_up, down], strict=True)
    )


def activate(module: Any, experts: Experts, expert: int, tokens: Tensor) -> Tensor:
    """The hidden activations h_e(x) of one expert, `[token, inner]`, through the module's own gate."""
    return _gated(module, _before(experts, expert, tokens))


def slopes(module: Any, experts: Experts, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """h_e(x) `[token, inner]`, and how it changes with each row of `W x + b`, gate before up, `[token, rows]`; float32.

    Every gate works neuron by neuron, so that one derivative of the sum over neurons is all of them.
    """
    before = _before(experts, expert, tokens)
    with torch.inference_mode(False), torch.enable_grad():
        free = before.float().clone().requires_grad_()  # a clone: what was made in inference mode takes no gradient
        inner = _gated(module, free)
        (found,) = torch.autograd.grad(inner.sum(), free)
    return inner.detach(), found


def _before(experts: Experts, expert: int, tokens: Tensor) -> Tensor:
    bias = None if experts.gate_up_bias is None else experts.gate_up_bias[expert]
    return nn.functional.linear(tokens, experts.gate_up[expert], bias)  # [token, 2 * inner]


def _gated(module: Any, before: Tensor) -> Tensor:
    if not module.has_gate:
        activated: Tensor = module.act_fn(before)
        return activated
    gated: Tensor = module._apply_gate(_interleaved(before) if _interleaves(module) else before)
    return gated


def _interleaves(module: Any) -> bool:
    """Whether gate and up rows alternate (gpt-oss)."""
    return bool(module.has_gate) and not module.is_concatenated


def _transposed(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2).contiguous()


def _blocked(tensor: Tensor) -> Tensor:
    """g0 u0 g1 u1 ... -> g0 g1 ... u0 u1 ... along dimension 1."""
    return torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)


def _interleaved(tensor: Tensor) -> Tensor:
    """g0 g1 ... u0 u1 ... -> g0 u0 g1 u1 ... along dimension 1."""
    return torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
