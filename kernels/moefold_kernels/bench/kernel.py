"""The Triton layer as the benchmarks call it: the one file here that knows its interface."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moefold_kernels.bench.routing import Batch
from moefold_kernels.reference import PackedExperts
from moefold_kernels.reference_pairs import LeveledExperts

if TYPE_CHECKING:
    from moefold_kernels.triton.plans import Plan
    from moefold_kernels.triton.weights import Weights

NAMES = ("gate_proj", "up_proj", "down_proj")


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_run(device: torch.device) -> tuple[bool, str]:
    """Whether the Triton layer runs on this device, and why not."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if device.type == "cuda" or interpreted():
        return True, ""
    return False, f"Triton compiles for a GPU, not for {device.type} (TRITON_INTERPRET=1 interprets, slowly)"


def packed(experts: PackedExperts) -> Callable[[Batch], Tensor]:
    """The layer over the words themselves."""
    return layer(packed_weights(experts))


def dense(experts: PackedExperts) -> Callable[[Batch], Tensor]:
    """The same layer over every expert's own bf16 weights: the packed kernel's twin."""
    return layer(dense_weights(experts))


def packed_weights(experts: PackedExperts) -> Weights:
    """What the kernels take of the words."""
    from moefold_kernels.triton.backend import leveled
    from moefold_kernels.triton.weights import Projections, Weights

    gate, up, down = (experts.words[name] for name in NAMES)
    order = torch.tensor(experts.pairs, device=gate.device, dtype=torch.int32).flatten()  # [2 * pair + slot] -> expert
    places = order.argsort().to(torch.int32)
    if isinstance(experts, LeveledExperts):
        return Weights(leveled(experts), None, places, order)
    tops = experts.window["gate_proj"], experts.window["up_proj"], experts.window["down_proj"]
    return Weights(Projections(gate, up, down, tops), None, places, order)


def dense_weights(experts: PackedExperts) -> Weights:
    """The same of the experts' own weights."""
    from moefold_kernels.triton.weights import Projections, Weights

    gate, up, down = (experts.unpacked(name) for name in NAMES)
    places = torch.arange(len(down), device=down.device, dtype=torch.int32)
    return Weights(None, Projections(gate, up, down), places, places)


def layer(weights: Weights, plan: Plan | None = None) -> Callable[[Batch], Tensor]:
    """The layer over weights, cut as `plan` says, or as one is chosen for each number of tokens."""
    from moefold_kernels.triton.layer import forward

    return lambda batch: forward(weights, batch.hidden, batch.top_k_index, batch.top_k_weights, plan=plan)
