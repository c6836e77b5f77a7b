"""PuzzleMoE's dual-mask merge (arXiv 2511.04805, section 3)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moefold import Activity, Experts, Groups, MergedPair, PairMerge, Stage, hookimpl, stage
from moefold.errors import InputError


def merge_pair(weights: Tensor, norms: Tensor, threshold: float) -> MergedPair:
    """Merge two experts' matrices element by element.

    `weights` is `[2, rows, columns]`, `norms` `[2, columns]` the L2 norm of each input column over the tokens routed
    to each expert. Entries whose magnitudes differ by at most `threshold`, relative to their sum, are shared as their
    mean; of the others the more salient expert's is kept, saliency being |weight| times norm, and the first expert's
    where both are equal.
    """
    first, second = weights.abs().float()
    total = first + second
    similar = (first - second).abs() <= threshold * total
    own = first * norms[0] >= second * norms[1]
    merged = torch.where(similar, total / 2, torch.where(own, first, second))
    keep = torch.stack((similar | own, similar | ~own))
    return MergedPair(merged, weights < 0, keep)


@stage("puzzlemoe", keep="never")
def puzzlemoe(
    experts: Experts,
    pairs: Groups,
    activity: Activity,
    *,
    threshold: Annotated[
        float, Field(ge=0, le=1, description="relative difference up to which two entries are shared")
    ] = 0.4,
) -> PairMerge:
    """Share the entries that agree; where they differ, keep the more salient one (as published)."""
    if any(len(pair) != 2 for pair in pairs.members):
        raise InputError("puzzlemoe merges pairs, and a group of another size came in; use a pair.* stage before it")
    matrices = experts.matrices()

    def merge(matrix: str, pair: int) -> MergedPair:
        members = pairs.members[pair]
        norms = torch.stack([activity.norm(matrix, e) for e in members]).to(experts.down.device)
        return merge_pair(torch.stack([matrices[matrix][e] for e in members]), norms, threshold)

    return PairMerge(experts, pairs.members, pairs.alone, merge)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [puzzlemoe]
