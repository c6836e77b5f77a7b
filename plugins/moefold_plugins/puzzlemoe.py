"""PuzzleMoE's dual-mask merge (arXiv 2511.04805, section 3)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from moefold import Activity, Context, DualMask, Experts, Groups, MergedPair, PairMerge, Stage, hookimpl, stage
from moefold.errors import InputError
from moefold_kernels import reference
from moefold_plugins.averaging import check_groups


def merge_pair(weights: Tensor, norms: Tensor, threshold: float) -> MergedPair:
    """Merge two experts' matrices `[2, rows, columns]`, with norms `[2, columns]`, element by element."""
    return MergedPair(*reference.merge_pair(weights, norms, threshold))


@stage("puzzlemoe", keep="never")
def puzzlemoe(
    experts: Experts,
    pairs: Groups,
    activity: Activity,
    context: Context,
    *,
    threshold: Annotated[
        float, Field(ge=0, le=1, description="relative difference up to which two entries are shared")
    ] = 0.4,
) -> PairMerge:
    """Share the entries that agree; where they differ, keep the more salient one (as published)."""
    if any(len(pair) != 2 for pair in pairs.members):
        raise InputError("puzzlemoe merges pairs, and a group of another size came in; use a pair.* stage before it")
    check_groups(pairs.all(), experts.count)
    experts = experts.to(context.device)  # those of another merge, read from the store, are the host's
    matrices = experts.matrices()
    rule = DualMask({matrix: activity.norms(matrix) for matrix in matrices}, threshold)

    def merge(matrix: str, pair: int) -> MergedPair:
        members = pairs.members[pair]
        norms = rule.norms[matrix][members].to(experts.down.device)
        return merge_pair(matrices[matrix][members], norms, rule.threshold)

    return PairMerge(experts, pairs.members, pairs.alone, merge, rule)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [puzzlemoe]
