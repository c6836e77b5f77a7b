"""Which experts become one: every expert of a layer in one of as many groups as experts are to remain."""

from __future__ import annotations

import random
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from moefold import Activity, Groups, Layer, Similarity, Stage, hookimpl, stage
from moefold.errors import InputError

Count = Annotated[int | None, Field(ge=1, description="experts that remain in a layer (default: by `fraction`)")]
Fraction = Annotated[float, Field(gt=0, le=1, description="share of a layer's experts that remains")]
PerLayer = Annotated[
    dict[int, int], Field(description="decoder layer -> experts that remain there, for layers that differ")
]
Skip = Annotated[list[int], Field(description="decoder layers that stay as they are")]


class Remaining(NamedTuple):
    """How many experts are to remain, as the options of every group.* stage say it."""

    experts: int | None
    fraction: float
    per_layer: dict[int, int]
    skip: list[int]

    def of(self, layer: Layer, count: int) -> int:
        """For one decoder layer with `count` experts; raises InputError when it has fewer, or names no such layer."""
        layer.checkpoint.check_layers((*self.per_layer, *self.skip))
        number = layer.number
        if number in self.skip:
            return count
        wanted = self.per_layer.get(number, self.experts) or max(1, round(count * self.fraction))
        if not 1 <= wanted <= count:
            raise InputError(f"{wanted} experts are to remain in layer {number}, which has {count}; write 1 to {count}")
        return wanted


@stage("group.by_use")
def group_by_use(
    layer: Layer,
    activity: Activity,
    similarity: Similarity,
    *,
    experts: Count = None,
    fraction: Fraction = 0.5,
    per_layer: PerLayer = {},  # noqa: B006  (pydantic copies defaults)
    skip: Skip = [],  # noqa: B006
) -> Groups:
    """The most used experts are centres; each other joins the centre most like it (MergeMoE, arXiv 2510.14436)."""
    count = len(activity.tokens)
    remain = Remaining(experts, fraction, per_layer, skip).of(layer, count)
    order = torch.argsort(activity.tokens, descending=True, stable=True).tolist()
    groups = {centre: [centre] for centre in order[:remain]}
    matrix = _square(similarity, count)
    for expert in sorted(order[remain:]):
        groups[max(groups, key=lambda centre: float(matrix[expert, centre]))].append(expert)
    return _as_groups(groups.values())


@stage("group.hierarchical", version=2)
def group_hierarchical(
    layer: Layer,
    similarity: Similarity,
    *,
    experts: Count = None,
    fraction: Fraction = 0.5,
    per_layer: PerLayer = {},  # noqa: B006
    skip: Skip = [],  # noqa: B006
) -> Groups:
    """Join the two most alike groups, by the mean over their members, until enough are left (HC-SMoE, 2410.08589)."""
    from scipy.cluster.hierarchy import cut_tree, linkage  # slow to import, and plugins load with every command
    from scipy.spatial.distance import squareform

    count = len(similarity.matrix)
    remain = Remaining(experts, fraction, per_layer, skip).of(layer, count)
    matrix = similarity.matrix.double()
    distance = (matrix.max() - (matrix + matrix.T) / 2).clamp(min=0).fill_diagonal_(0)
    if remain == count:
        return _as_groups([expert] for expert in range(count))
    tree = linkage(squareform(distance.numpy(), checks=False), method="average")
    return _labelled(cut_tree(tree, remain)[:, 0])  # fcluster would stop at fewer groups where distances are equal


@stage("group.kmeans")
def group_kmeans(
    layer: Layer,
    similarity: Similarity,
    *,
    experts: Count = None,
    fraction: Fraction = 0.5,
    per_layer: PerLayer = {},  # noqa: B006
    skip: Skip = [],  # noqa: B006
    seed: Annotated[int, Field(description="of the first centres")] = 0,
) -> Groups:
    """k-means in the space in which the similarity is an inner product (its eigenvectors; negative ones left out)."""
    from sklearn.cluster import KMeans  # as above

    count = len(similarity.matrix)
    remain = Remaining(experts, fraction, per_layer, skip).of(layer, count)
    points = _points(similarity.matrix).numpy()
    tries: Any = 10  # the type of its default, "auto", is all that pyright sees
    return _labelled(KMeans(remain, n_init=tries, random_state=seed).fit_predict(points))


@stage("group.random")
def group_random(
    layer: Layer,
    *,
    experts: Count = None,
    fraction: Fraction = 0.5,
    per_layer: PerLayer = {},  # noqa: B006
    skip: Skip = [],  # noqa: B006
    seed: Annotated[int, Field(description="with the layer's number, decides the groups")] = 0,
) -> Groups:
    """Random groups of sizes that differ by at most one: what every other choice has to beat."""
    count = layer.expert_count
    remain = Remaining(experts, fraction, per_layer, skip).of(layer, count)
    order = random.Random(f"{seed} {layer.number}").sample(range(count), count)
    return _as_groups(order[start::remain] for start in range(remain))


def _square(similarity: Similarity, count: int) -> Tensor:
    if len(similarity.matrix) != count:
        raise InputError(
            f"the similarity is of {len(similarity.matrix)} experts and the activity of {count}; "
            "let both stages read the same experts (needs: {experts: ID})"
        )
    return similarity.matrix


def _points(matrix: Tensor) -> Tensor:
    """Points whose inner products are the doubly centred similarities (classical multidimensional scaling)."""
    symmetric = ((matrix + matrix.T) / 2).double()
    centred = symmetric - symmetric.mean(dim=0) - symmetric.mean(dim=1, keepdim=True) + symmetric.mean()
    values, vectors = torch.linalg.eigh(centred)
    points: Tensor = vectors * values.clamp(min=0).sqrt()
    return points.contiguous()


def _labelled(labels: Any) -> Groups:
    groups: dict[int, list[int]] = {}
    for expert, label in enumerate(labels):
        groups.setdefault(int(label), []).append(expert)
    return _as_groups(groups.values())


def _as_groups(groups: Any) -> Groups:
    """Members in the order given (a centre comes first), the groups by their lowest expert."""
    found = sorted((list(group) for group in groups), key=min)
    return Groups([group for group in found if len(group) > 1], [group[0] for group in found if len(group) == 1])


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [group_by_use, group_hierarchical, group_kmeans, group_random]
