"""Which pairs of a layer's experts are cheapest to merge, for several numbers of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import networkx
from torch import Tensor

PARTNERS = 16
"""How many of its cheapest partners each expert may get: 256 experts take 3 s, and 30 s when all may pair with all."""

SHARES = (0.25, 0.5, 0.75)
"""Beside all experts in pairs: fewer pairs, each no dearer than this share of those is."""

_STEPS = 1 << 40
"""Costs become whole numbers, with which the matching is exact."""

Pairs = list[tuple[int, int]]


def perfect(cost: Tensor, free: Sequence[int]) -> Pairs:
    """As many pairs of `free` experts as there can be, of least cost in sum; one expert is in one pair at most."""
    return _full(_edges(cost, free)) if len(free) > 1 else []


def matchings(cost: Tensor, free: Sequence[int]) -> list[Pairs]:
    """Sets of pairs of `free` experts, of least cost in sum for their numbers; one expert is in one pair at most.

    The first is `perfect`. Fewer pairs are not some of those: experts that cost much in any pair are then better left
    alone, and their partners find others.
    """
    if len(free) < 2:
        return []
    edges = _edges(cost, free)
    every = _full(edges)
    ranked = sorted(edges[pair] for pair in every)
    found = [every]
    for share in SHARES:
        most = ranked[int(share * len(ranked))]
        some = _matched({pair: most - value for pair, value in edges.items() if value < most}, full=False)
        if some and some not in found:
            found.append(some)
    return found


def _full(edges: dict[tuple[int, int], int]) -> Pairs:
    highest = max(edges.values())
    return _matched({pair: highest + 1 - value for pair, value in edges.items()}, full=True)


def _edges(cost: Tensor, free: Sequence[int]) -> dict[tuple[int, int], int]:
    """Each expert's cheapest partners, and enough for everyone to be in a pair, with costs as whole numbers."""
    table: list[list[float]] = cost.double().tolist()
    highest = max(table[i][j] for i in free for j in free) or 1.0
    chosen: set[tuple[int, int]] = set()
    for i in free:
        near = sorted((j for j in free if j != i), key=lambda j: table[i][j])[:PARTNERS]
        chosen |= {(min(i, j), max(i, j)) for j in near}
    ranked = sorted(free, key=lambda i: sum(table[i][j] for j in free))
    pairs = zip(ranked[: len(free) // 2], reversed(ranked), strict=False)
    chosen |= {(min(i, j), max(i, j)) for i, j in pairs}
    return {(i, j): round(table[i][j] / highest * _STEPS) for i, j in sorted(chosen)}


def _matched(weights: dict[tuple[int, int], int], full: bool) -> Pairs:
    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, j, weight) for (i, j), weight in weights.items())
    found = networkx.max_weight_matching(graph, maxcardinality=full)
    return sorted((min(i, j), max(i, j)) for i, j in found)
