"""Experts rounded to fp8, int8 or int4, in compressed-tensors' formats: a baseline, or what follows a merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moefold import Context, Experts, Json, Layer, Quantized, Scheme, Stage, Unpacked, hookimpl, stage
from moefold.errors import InputError

_GROUP = 128


@stage("quantize", keep="until read")
def quantize(
    experts: Experts,
    layer: Layer,
    *,
    scheme: Annotated[
        Literal["fp8", "int8", "int4"], Field(description="fp8 and int8: a scale for each row; int4: for each group")
    ],
    group: Annotated[
        int | None, Field(ge=8, description=f"columns that share a scale, int4 only ({_GROUP} by default)")
    ] = None,
) -> Quantized:
    """Round each weight to the nearest value of the scheme; scales span the largest weight, nothing is calibrated."""
    chosen, matrices = chosen_scheme("quantize", layer, experts, scheme, group), experts.matrices()
    made = {matrix: map(chosen.quantize, weights) for matrix, weights in matrices.items()}
    return quantized(chosen, made, experts)


def chosen_scheme(stage: str, layer: Layer, experts: Experts, scheme: str, group: int | None) -> Scheme:
    """What the options of a stage mean; raises InputError for experts that cannot be stored so."""
    if scheme != "int4" and group is not None:
        raise InputError(f"{stage}: {scheme} has one scale for each row; drop group, or write scheme: int4")
    if experts.gate_up_bias is not None:
        raise InputError(
            f"{stage}: these experts have biases and are fused in the checkpoint's files, for which "
            "compressed-tensors has no form that transformers loads; the model's own 4-bit release may serve"
        )
    if layer.names().fused:  # said here, and not by save, which comes when everything else is done
        raise InputError(
            f"{stage}: the source holds all experts of a layer in one tensor, for which compressed-tensors has no "
            f"form; leave out {stage}, or use pairs"
        )
    chosen = Scheme(scheme, (group or _GROUP) if scheme == "int4" else None)
    chosen.check(*(weights.shape[2] for weights in experts.matrices().values()))
    return chosen


def quantized(
    scheme: Scheme,
    made: Mapping[str, Iterable[Mapping[str, Tensor]]],
    experts: Experts,
    figures: Mapping[str, Json] | None = None,
) -> Quantized:
    """One layer, of what is stored of each expert's matrices."""
    tensors: dict[str, Tensor] = {}
    for matrix, each in made.items():
        stored = list(each)
        tensors |= {f"{matrix}.{end}": torch.stack([one[end] for one in stored]).cpu() for end in scheme.ends}
    route = None if experts.route is None else experts.route.tolist()
    return Quantized(scheme.name, scheme.group, tensors, route, dict(figures or {}))


@stage("dequantize")
def dequantize(quantized: Quantized, context: Context) -> Unpacked:
    """Quantised experts as they read, to calibrate the next layer through them."""
    matrices = {name: _read(quantized, name, context.device) for name in quantized.matrices()}
    up = [matrices[name] for name in ("gate_proj", "up_proj") if name in matrices]
    route = None if quantized.route is None else torch.tensor(quantized.route, device=context.device)
    return Unpacked(torch.cat(up, dim=1), matrices["down_proj"], gated=len(up) > 1, route=route)


def _read(quantized: Quantized, matrix: str, device: torch.device) -> Tensor:
    """What one matrix of every expert reads: [expert, rows, columns]."""
    scheme = Scheme(quantized.scheme, quantized.group)
    experts = range(quantized.count)
    stored = {end: quantized.tensors[f"{matrix}.{end}"].to(device) for end in scheme.ends}
    return torch.stack([scheme.dequantize({end: stored[end][expert] for end in stored}) for expert in experts])


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [quantize, dequantize]
