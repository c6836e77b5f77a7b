"""Random batches: tokens, the experts that they go to, and the gate weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moefold_kernels.bench.cases import Case


@dataclass(frozen=True)
class Batch:
    """What enters the experts: hidden [T, H] bf16, top_k_index [T, K] int64, top_k_weights [T, K] bf16."""

    hidden: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor


def draw(case: Case, generator: torch.Generator) -> Batch:
    """One batch on the generator's device; a token's experts are distinct, its gate weights sum to one."""
    shape, device = case.shape, generator.device
    hidden = torch.randn(case.tokens, shape.hidden, generator=generator, device=device)
    logits = torch.randn(case.tokens, shape.top_k, generator=generator, device=device)
    index = _exactly(case, case.hit, generator) if case.hit else _by_popularity(case, generator)
    return Batch(hidden.bfloat16(), index, logits.softmax(-1).bfloat16())


def _by_popularity(case: Case, generator: torch.Generator) -> Tensor:
    """The top-k of popularity over exponential noise: sampling without replacement, token by token."""
    count, device = case.shape.experts, generator.device
    popularity = torch.ones(count, device=device)
    if case.routing == "skewed":
        popularity /= 1 + torch.randperm(count, generator=generator, device=device)
    noise = torch.empty(case.tokens, count, device=device).exponential_(generator=generator)
    return (popularity / noise).topk(case.shape.top_k, dim=-1).indices


def _exactly(case: Case, hit: int, generator: torch.Generator) -> Tensor:
    """Deal a random subset of `hit` experts to the first tokens until each has one, draw the rest from that subset."""
    top_k, device = case.shape.top_k, generator.device
    subset = torch.randperm(case.shape.experts, generator=generator, device=device)[:hit]
    dealt = -(-hit // top_k)
    first = torch.arange(dealt * top_k, device=device).remainder(hit).view(dealt, top_k)  # distinct: top_k <= hit
    noise = torch.rand(case.tokens - dealt, hit, generator=generator, device=device)
    index = subset[torch.cat([first, noise.topk(top_k, dim=-1).indices])]
    return index[torch.randperm(case.tokens, generator=generator, device=device)]


def experts_hit(batch: Batch) -> int:
    """Distinct experts in one batch."""
    return int(batch.top_k_index.unique().numel())


def pairs_hit(batch: Batch, pairs: Sequence[Sequence[int]]) -> int:
    """Distinct pairs in one batch."""
    hit = set(batch.top_k_index.unique().tolist())
    return sum(not hit.isdisjoint(pair) for pair in pairs)
