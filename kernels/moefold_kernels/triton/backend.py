"""The Triton kernels as a backend: whether they can, and why not. Triton itself is imported when it is asked."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moefold_kernels import activation, layout, layout_pairs, reference
from moefold_kernels.backend import Need
from moefold_kernels.errors import FormatError
from moefold_kernels.levels import coded as levels_coded
from moefold_kernels.levels import layer_tables
from moefold_kernels.places import tables
from moefold_kernels.reference import PackedExperts
from moefold_kernels.reference_pairs import LeveledExperts

if TYPE_CHECKING:
    from moefold_kernels.triton.weights import Leveled, Projections, Weights

OLDEST = (8, 0)
"""The compute capability from which on there are bf16 products."""
FORMATS = (layout.EXPONENT, *layout_pairs.MAGNITUDE_BITS)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Triton:
    """Fused kernels for GPUs: activations and weights of experts left alone are computed with as bfloat16."""

    interpret: bool = False
    """Whether to take any device where Triton interprets (TRITON_INTERPRET=1): for tests, it is the slowest."""
    name: str = "triton"

    def can(self, need: Need) -> tuple[bool, str]:
        if need.format not in FORMATS:
            return False, f"knows formats {', '.join(FORMATS)}, not {need.format}"
        if need.device.type == "meta":
            return False, "meta tensors hold no values"
        if need.dtype not in FLOATS:
            return False, f"tokens are {need.dtype}, not one of {', '.join(map(str, FLOATS))}"
        able, said = self._device(need.device)
        if able and need.format != layout.EXPONENT:
            said += _few_bit(need)
        if able and need.dtype != torch.bfloat16:
            said += f"; casts {need.dtype} to bfloat16 and back"
        return able, said

    def _device(self, device: torch.device) -> tuple[bool, str]:
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            if self.interpret:
                return _interprets()
            return False, "TRITON_INTERPRET is set, and interpretation is for tests; unset it, or ask by name"
        if device.type != "cuda":
            return False, f"compiles for CUDA devices, not for {device.type}"
        if not torch.cuda.is_available():
            return False, "torch finds no CUDA device"
        if importlib.util.find_spec("triton") is None:
            return False, "triton is not installed"
        if torch.version.hip is not None:
            return True, "Triton kernels; never tried on ROCm"
        found = torch.cuda.get_device_capability(device)
        if found < OLDEST:
            return False, f"compute capability {found[0]}.{found[1]} is older than {OLDEST[0]}.{OLDEST[1]}"
        return True, f"Triton kernels for compute capability {found[0]}.{found[1]}"

    def decode(self, words: Tensor, top: int, slot: int) -> Tensor:
        return reference.decode(words, top, slot)  # kernels decode in registers; nobody waits for this

    def experts(
        self,
        packed: PackedExperts,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        activate: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        from moefold_kernels.triton.layer import Activation, forward
        from moefold_kernels.triton.ops import on

        known = activation.recognise(activate)
        fused = Activation(known.name, known.limit, known.alpha, lambda rows: activate(*rows.chunk(2, dim=-1)))
        with on(hidden):
            return forward(_weights(packed), hidden, top_k_index, top_k_weights, fused, torch.float32)


def _interprets() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    from triton.runtime.interpreter import InterpretedFunction

    from moefold_kernels.triton import project

    if not isinstance(project.project_in, InterpretedFunction):
        return False, "TRITON_INTERPRET was set after the kernels were imported: set it before"
    return True, "Triton's interpreter, for tests"


def _few_bit(need: Need) -> str:
    """What becomes of the few-bit formats, which are fast on Hopper only."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return ""
    from moefold_kernels.triton.portability import plain_because

    why = plain_because(need.device)
    return f"; {need.format} by plain kernels, not by the fast ones: {why}" if why else ""


def _weights(packed: PackedExperts) -> Weights:
    from moefold_kernels.triton.weights import Weights

    places, placed = tables(packed.pairs, packed.alone)
    alone = {name: weights.to(torch.bfloat16) for name, weights in packed.dense.items()} if packed.alone else {}
    device = packed.words["down_proj"].device
    words = leveled(packed) if isinstance(packed, LeveledExperts) else _projections(packed.words, packed)
    return Weights(words, _projections(alone, packed), places.to(device), placed.to(device))


def leveled(packed: LeveledExperts) -> Leveled:
    """The pairs of a layer in a few-bit format; gate and up are copied behind one another."""
    from moefold_kernels.triton.weights import Leveled, Planes, contiguous

    def fused(part: Mapping[str, Tensor]) -> Tensor:
        gated = "gate_proj" in part
        return torch.cat([part["gate_proj"], part["up_proj"]], dim=1) if gated else part["up_proj"]

    low = packed.low or None
    wide = Planes(fused(packed.words), fused(low) if low else None, fused(packed.scale))
    narrow = Planes(packed.words["down_proj"], low["down_proj"] if low else None, packed.scale["down_proj"])
    levels = layer_tables(packed.format, packed.levels).to(narrow.words.device)
    coded, gated = levels_coded(packed.format, packed.levels), "gate_proj" in packed.words
    sizes = packed.shape("up_proj")
    return Leveled(packed.format, contiguous(wide), contiguous(narrow), levels, gated, *sizes, coded)


def _projections(matrices: Mapping[str, Tensor], packed: PackedExperts) -> Projections | None:
    from moefold_kernels.triton.weights import Projections, check_rows

    if not matrices or not len(matrices["down_proj"]):
        return None
    for name, matrix in matrices.items():
        check_rows(name, matrix)
    strides = [matrices[name].stride() for name in ("gate_proj", "up_proj") if name in matrices]
    if len(set(strides)) > 1:
        raise FormatError(f"gate_proj and up_proj have strides {strides}, and the kernels want them alike")
    top = packed.window or dict.fromkeys(("up_proj", "down_proj"), 127)  # experts alone have none
    tops = (top.get("gate_proj", top["up_proj"]), top["up_proj"], top["down_proj"])
    return Projections(matrices.get("gate_proj"), matrices["up_proj"], matrices["down_proj"], tops)
