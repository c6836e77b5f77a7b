"""Which activation lies between an experts module's projections: found by what it computes, not by what it is called.

Kernels compute the common ones themselves. A module's own gate function is tried on numbers of every size; whatever it
is, it runs between the projections when no formula here gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Gate = Callable[[Tensor, Tensor], Tensor]
"""Of the gate's rows and the up projection's."""

LIMITS = (("limit", "alpha"), ("swiglu_limit", "swiglu_alpha"))
"""What transformers' modules call the numbers of a clamped gate."""


class Known(NamedTuple):
    """An activation that the kernels compute, or "other"."""

    name: str
    limit: float = 0.0
    alpha: float = 0.0


OTHER = Known("other")


def silu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU."""
    return F.silu(gate) * up


def clamped(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """gpt-oss's: the gate is clamped above and the other on both sides, which gets a one added."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def recognise(activate: Gate, limits: Sequence[tuple[float, float]] = ()) -> Known:
    """The known activation that computes the same as `activate`; `limits` are the (limit, alpha) it may have."""
    sizes = torch.logspace(-4, 4, 33, dtype=torch.float32, device="cpu")  # transformers loads with other defaults
    numbers = torch.cat([-sizes.flip(0), torch.zeros_like(sizes[:1]), sizes])  # [67]
    gate, up = (grid.flatten()[None] for grid in torch.meshgrid(numbers, numbers, indexing="ij"))
    found = activate(gate, up)
    if found.shape == gate.shape:
        for known in (Known("silu"), *(Known("clamped", *pair) for pair in limits)):
            right = silu(gate, up) if known.name == "silu" else clamped(gate, up, known.limit, known.alpha)
            if torch.allclose(found.float(), right, rtol=1e-5, atol=1e-7):
                return known
    return OTHER


@torch.no_grad()
def recognise_module(module: Any) -> Known:
    """The activation of a module of transformers' experts interface."""
    if not module.has_gate:
        return OTHER
    pairs = [(getattr(module, limit, None), getattr(module, alpha, None)) for limit, alpha in LIMITS]
    limits = [(float(a), float(b)) for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]
    try:
        with torch.device("cpu"):
            return recognise(lambda gate, up: module._apply_gate(join(gate, up, module.is_concatenated)), limits)
    except (RuntimeError, NotImplementedError):  # a function with weights, which are not here yet or on a GPU
        return OTHER


def join(gate: Tensor, up: Tensor, concatenated: bool) -> Tensor:
    """Rows as the module's own gate function takes them."""
    return torch.cat([gate, up], dim=-1) if concatenated else torch.stack([gate, up], dim=-1).flatten(-2)


def between(module: Any, rows: Tensor) -> Tensor:
    """The module's own activation of `rows`, which are gate before up (or up alone)."""
    if not module.has_gate:
        return module.act_fn(rows)  # type: ignore[no-any-return]
    gate, up = rows.chunk(2, dim=-1)
    return module._apply_gate(rows if module.is_concatenated else join(gate, up, False))  # type: ignore[no-any-return]
