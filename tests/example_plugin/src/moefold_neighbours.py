"""A plugin for moefold, whole: one stage, and the function that offers it."""

from typing import Annotated

from moefold import Groups, Layer, Stage, hookimpl, stage
from pydantic import Field


@stage("pair.neighbours")
def pair_neighbours(
    layer: Layer, *, shift: Annotated[int, Field(ge=0, description="where the first pair begins")] = 0
) -> Groups:
    """Pair experts that stand side by side."""
    count = layer.expert_count
    order = [(expert + shift) % count for expert in range(count)]
    return Groups([sorted(order[i : i + 2]) for i in range(0, count - 1, 2)], order[count - count % 2 :])


@hookimpl
def moefold_stages() -> list[Stage]:
    return [pair_neighbours]
