"""How alike a layer's experts are: in their weights, in what they give, in what chooses them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moefold import Context, Experts, Layer, Routed, Similarity, Stage, hookimpl, stage
from moefold.errors import InputError
from moefold_plugins.visits import visits

Matrix = Literal["gate_proj", "up_proj", "down_proj"]
Metric = Annotated[
    Literal["cosine", "euclidean"], Field(description="euclidean: the negative distance, in units of the mean length")
]
CHUNK = 16384
"""Tokens whose router logits are on the device at a time."""


@stage("similarity.weights", version=2)
def similarity_weights(
    experts: Experts,
    *,
    matrices: Annotated[
        list[Matrix], Field(min_length=1, description="which matrices (MergeMoE compares gate_proj and up_proj)")
    ] = ["gate_proj", "up_proj", "down_proj"],  # noqa: B006  (pydantic copies defaults)
) -> Similarity:
    """Cosine similarity of the experts' weights, the chosen matrices of an expert taken as one vector."""
    gram = torch.zeros(experts.count, experts.count, dtype=torch.float64, device=experts.down.device)
    chosen = {name: weights for name, weights in experts.matrices().items() if name in matrices}
    if not chosen:
        raise InputError(f"these experts have {', '.join(experts.matrices())}, none of {', '.join(matrices)}")
    for weights in chosen.values():
        for rows in range(0, weights.shape[1], 64):  # in slices: no float32 copy of a layer
            part = weights[:, rows : rows + 64].flatten(1).float()
            gram += (part @ part.T).double()
    return Similarity(_cosine(gram), f"cosine of weights ({', '.join(chosen)})")


@stage("similarity.outputs")
def similarity_outputs(
    layer: Layer,
    routed: Routed,
    experts: Experts,
    context: Context,
    *,
    tokens: Annotated[
        int, Field(ge=1, description="tokens, evenly spaced over the layer's, that every expert sees")
    ] = 4096,
    metric: Metric = "euclidean",
) -> Similarity:
    """By the experts' mean outputs over the layer's tokens, routed to them or not (HC-SMoE, arXiv 2410.08589)."""
    sample = routed.tokens[:: max(1, len(routed.tokens) // tokens)].to(context.device)
    experts = experts.to(context.device)
    all_alike = torch.full((len(sample),), 1 / len(sample), device=context.device)
    means = [_summed_output(layer, experts, expert, sample, all_alike) for expert in range(experts.count)]
    return Similarity(_compared(torch.stack(means), metric), f"{metric}, mean outputs")


@stage("similarity.gated_outputs")
def similarity_gated_outputs(
    layer: Layer, routed: Routed, experts: Experts, context: Context, *, metric: Metric = "euclidean"
) -> Similarity:
    """By what each expert adds to the layer on average: gate weight times output, summed over its own routed tokens."""
    experts = experts.to(context.device)
    added = torch.zeros(experts.count, experts.down.shape[1], dtype=torch.float64, device=context.device)
    for visit in visits(routed, experts, context.device):
        added[visit.expert] += _summed_output(layer, experts, visit.expert, visit.tokens, visit.gates)
    return Similarity(_compared(added / len(routed.tokens), metric), f"{metric}, mean gate-weighted outputs")


@stage("similarity.router")
def similarity_router(layer: Layer, routed: Routed, context: Context) -> Similarity:
    """Cosine of the experts' router logits over the layer's calibration tokens (M-SMoE, arXiv 2310.01334)."""
    weight, bias = layer.checkpoint.skeleton.router(layer.number, context.device)
    weight, bias = weight.float(), None if bias is None else bias.float()
    gram = torch.zeros(len(weight), len(weight), dtype=torch.float64, device=context.device)
    for tokens in routed.tokens.split(CHUNK):
        logits = torch.nn.functional.linear(tokens.to(context.device).float(), weight, bias).double()  # [token, expert]
        gram += logits.T @ logits
    return Similarity(_cosine(gram), "cosine of router logits")


def _summed_output(layer: Layer, experts: Experts, expert: int, tokens: Tensor, gates: Tensor) -> Tensor:
    """The sum of g f_e(x) over tokens, [hidden] float64."""
    return (gates @ layer.output(experts, expert, tokens).float()).double()


def _compared(vectors: Tensor, metric: str) -> Tensor:
    """The similarity of every two rows, [row, row] float32 on the CPU."""
    if metric == "cosine":
        return _cosine(vectors @ vectors.T)
    scale = vectors.norm(dim=1).mean().clamp(min=torch.finfo(torch.float64).tiny)
    distances: Tensor = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist") / scale
    return -distances.float().cpu()


def _cosine(gram: Tensor) -> Tensor:
    length = gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    cosine: Tensor = gram / (length[:, None] * length)
    return cosine.float().cpu()


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [similarity_weights, similarity_outputs, similarity_gated_outputs, similarity_router]
