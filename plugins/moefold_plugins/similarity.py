"""How alike a layer's experts are."""

from __future__ import annotations

from typing import Any

import torch

from moefold import Experts, Similarity, Stage, hookimpl, stage


@stage("similarity.weights")
def similarity_weights(experts: Experts) -> Similarity:
    """Cosine similarity of the experts' weights, all matrices of an expert taken as one vector."""
    gram = torch.zeros(experts.count, experts.count, dtype=torch.float64, device=experts.down.device)
    for weights in experts.matrices().values():
        for rows in range(0, weights.shape[1], 64):  # in slices: no float32 copy of a layer
            part = weights[:, rows : rows + 64].flatten(1).float()
            gram += (part @ part.T).double()
    length = gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return Similarity((gram / (length[:, None] * length)).float().cpu(), "cosine of weights")


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [similarity_weights]
