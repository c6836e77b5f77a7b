"""Who computes the layer: our kernels, the best stock implementation, and the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from moefold_kernels import layout, layout_pairs, reference
from moefold_kernels.bench import kernel
from moefold_kernels.bench.routing import Batch
from moefold_kernels.reference import PackedExperts

Forward = Callable[[Batch], Tensor]
"""The routed experts' output, [T, H]; without host synchronisation where a CUDA graph is to be captured."""


@dataclass(frozen=True)
class Contender:
    """A way to compute the layer: what it reads, where it can run, and how it takes the weights."""

    name: str
    reads: Literal["pairs", "experts"]
    """What a batch's hits cost it: the words of every pair hit, or the weights of every expert hit."""
    prepare: Callable[[PackedExperts], Forward]
    can: Callable[[torch.device], tuple[bool, str]]
    """Whether it runs there, and why not."""
    format: str = layout.EXPONENT
    """Of the pairs that it computes with, or that its weights are decoded from."""


def _grouped_mm(experts: PackedExperts) -> Forward:
    """transformers' grouped_mm on a stock module, so that its flags and its gate are those of the version installed."""
    from transformers import MixtralConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    gate_up = torch.cat([experts.unpacked("gate_proj"), experts.unpacked("up_proj")], dim=1)
    down = experts.unpacked("down_proj")  # [E, H, I]
    config = MixtralConfig(num_local_experts=len(down), hidden_size=down.shape[1], intermediate_size=down.shape[2])
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(down, requires_grad=False)
    forward = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return lambda batch: forward(module, batch.hidden, batch.top_k_index, batch.top_k_weights)


def _can_transformers(_device: torch.device) -> tuple[bool, str]:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return False, "transformers >= 5.17 is not installed"
    return "grouped_mm" in ALL_EXPERTS_FUNCTIONS, "this transformers has no grouped_mm"


def _reference(experts: PackedExperts) -> Forward:
    def forward(batch: Batch) -> Tensor:
        out = reference.experts(experts, batch.hidden, batch.top_k_index, batch.top_k_weights, _gate)
        return out.to(batch.hidden.dtype)

    return forward


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def _can_reference(device: torch.device) -> tuple[bool, str]:
    return device.type == "cpu", "the definition asks the host for every expert's tokens, which no CUDA graph can hold"


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("packed", "pairs", kernel.packed, kernel.can_run),
        Contender("dense", "experts", kernel.dense, kernel.can_run),
        Contender("grouped_mm", "experts", _grouped_mm, _can_transformers),
        Contender("reference", "pairs", _reference, _can_reference),
        *(Contender(format, "pairs", kernel.packed, kernel.can_run, format) for format in layout_pairs.MAGNITUDE_BITS),
    )
}

BASELINES = ("dense", "grouped_mm")
"""Contenders that the others are compared with, in the same run."""
