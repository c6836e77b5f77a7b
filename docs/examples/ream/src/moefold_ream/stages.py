"""Who is salient, who is alike, and who goes with whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moefold import Artifact, Context, Experts, Groups, Json, Layer, Routed, Similarity, stage


@dataclass(frozen=True)
class Saliency(Artifact):
    """What each of a layer's experts adds; larger is more."""

    values: Tensor  # [expert] float64

    def facts(self) -> dict[str, Json]:
        return {"saliency": self.values.tolist()}


@stage("saliency.reap")
def saliency_reap(layer: Layer, routed: Routed, experts: Experts, context: Context) -> Saliency:
    """Mean of gate weight times output norm over an expert's routed tokens (REAP, arXiv 2510.13999); 0 without any."""
    experts, reached = experts.to(context.device), routed.reaches(experts)
    values = torch.zeros(experts.count, dtype=torch.float64)
    for expert in range(experts.count):
        hits = reached == expert
        rows = hits.any(dim=1)
        if bool(rows.any()):
            gates = (routed.top_k_weights * hits).sum(dim=1)[rows].to(context.device)
            norms = layer.output(experts, expert, routed.tokens[rows].to(context.device)).float().norm(dim=1)
            values[expert] = (gates * norms).double().mean().cpu()
    return Saliency(values)


@stage("similarity.ream")
def similarity_ream(
    layer: Layer,
    routed: Routed,
    experts: Experts,
    context: Context,
    *,
    tokens: Annotated[int, Field(ge=1, description="tokens, evenly spaced, that every expert sees")] = 1024,
) -> Similarity:
    """REAM's similarity (arXiv 2604.04356): of mean router-weighted outputs and of router logits, half each, 0 to 1."""
    experts = experts.to(context.device)
    sample = routed.tokens[:: max(1, len(routed.tokens) // tokens)].to(context.device)
    weight, bias = layer.checkpoint.skeleton.router(layer.number, context.device)
    logits = F.linear(sample.float(), weight.float(), None if bias is None else bias.float())  # [token, expert]
    gates = logits.softmax(dim=1)
    means = [gates[:, e] @ layer.output(experts, e, sample).float() / len(sample) for e in range(experts.count)]
    return Similarity(combine(torch.stack(means).cpu(), logits.T.cpu()), "REAM")


def combine(outputs: Tensor, logits: Tensor) -> Tensor:
    """The two similarities as one, of mean outputs [expert, hidden] and router logits [expert, token]."""
    unit = F.normalize(outputs.double(), dim=1)
    by_output = (unit @ unit.T + 1) / 2
    profile = F.normalize(logits.double(), dim=1)
    apart = torch.cdist(profile, profile, compute_mode="donot_use_mm_for_euclid_dist")
    by_router = 1 - apart / apart.max().clamp(min=torch.finfo(torch.float64).tiny)
    return ((by_output + by_router) / 2).float()


@stage("pair.ream")
def pair_ream(
    saliency: Saliency,
    similarity: Similarity,
    *,
    fraction: Annotated[float, Field(ge=0, le=1, description="share of the experts that take part")] = 1.0,
) -> Groups:
    """The most salient expert takes the most similar of those that go, then the next (REAM with groups of two)."""
    order = saliency.values.argsort(descending=True, stable=True).tolist()
    go = int(len(order) * fraction) // 2
    centroids, free = order[: len(order) - go], set(order[len(order) - go :])
    pairs = []
    for centroid in centroids[:go]:
        partner = max(sorted(free), key=lambda expert: float(similarity.matrix[centroid, expert]))
        free.remove(partner)
        pairs.append(sorted((centroid, partner)))
    return Groups(sorted(pairs), sorted(centroids[go:]))
