"""What a stage's result has to be like, whatever the stage: what the stages that read it take for granted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from moefold.artifact import Artifact
from moefold.artifacts import Groups, Similarity
from moefold.testing.failures import require


def sound(value: Artifact, what: str, counts: Collection[int]) -> None:
    """Raise CheckError for NaN, for groups that are no partition, for similarities that are not of all experts.

    `counts`: how many experts there may be.
    """
    for name, tensor in _tensors(value):
        bad = tensor.is_floating_point() and not tensor.is_meta and bool(tensor.isnan().any())
        require(not bad, what, f"its {name} holds NaN; say what an expert without tokens, or a sum of zero, is to give")
    if isinstance(value, Groups):
        _partition(value, what)
    if isinstance(value, Similarity):
        shape = list(value.matrix.shape)
        fits = len(shape) == 2 and shape[0] == shape[1] and shape[0] in counts
        require(fits, what, f"its matrix is {shape}; it is [expert, expert], of {min(counts)} experts here")


def _partition(groups: Groups, what: str) -> None:
    named = [expert for group in groups.all() for expert in group]
    twice = next((expert for expert in named if named.count(expert) > 1), None)
    require(twice is None, what, f"expert {twice} is in two groups, or alone and in one; every expert is in one place")
    missing = sorted(set(range(len(named))) - set(named))
    told = f"its groups name {len(named)} experts and not expert {missing[0] if missing else ''}"
    require(not missing, what, f"{told}; every expert is in a group or in `alone`, counted from 0")


def _tensors(value: Artifact) -> Iterator[tuple[str, Tensor]]:
    for item in dataclasses.fields(value):
        held: Any = getattr(value, item.name)
        if isinstance(held, Tensor):
            yield item.name, held
        elif isinstance(held, Mapping):
            yield from ((f"{item.name}[{key}]", one) for key, one in held.items() if isinstance(one, Tensor))
