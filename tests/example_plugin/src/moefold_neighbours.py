"""Pair neighbours: expert 0 with 1, 2 with 3, and so on, `shift` places further on."""

from typing import Annotated

from pydantic import Field

from moefold import Groups, Layer, Stage, hookimpl, stage


@stage("pair.neighbours")
def pair_neighbours(
    layer: Layer, *, shift: Annotated[int, Field(ge=0, description="where the first pair begins")] = 0
) -> Groups:
    """Pair experts that stand side by side."""
    count = layer.expert_count
    order = [(expert + shift) % count for expert in range(count)]
    pairs = [sorted(order[i : i + 2]) for i in range(0, count - 1, 2)]
    return Groups(pairs, order[count - count % 2 :])


@hookimpl
def moefold_stages() -> list[Stage]:
    return [pair_neighbours]
