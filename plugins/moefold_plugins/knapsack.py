"""One option for each layer, of least damage in sum, within a number of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

STEPS = 20000
"""Bytes are counted in steps, at most so many: each layer's are rounded up to one."""


class Option(NamedTuple):
    """What a layer may become."""

    bytes: int
    damage: float
    what: Any


def worth(options: Sequence[Option]) -> list[Option]:
    """Without those that another beats in bytes and in damage, by bytes."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: option[:2]):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept


def choose(layers: Sequence[Sequence[Option]], budget: int) -> list[Option] | None:
    """The best choice of all, but for the rounding of bytes to steps; None when even the smallest do not fit."""
    layers = [worth(options) for options in layers]
    least = [options[0].bytes for options in layers]
    room = budget - sum(least)
    if room < 0:
        return None
    extra = [[option.bytes - start for option in options] for options, start in zip(layers, least, strict=True)]
    unit = max(math.gcd(*(size for sizes in extra for size in sizes)), -(-room // STEPS), 1)
    steps = [[-(-size // unit) for size in sizes] for sizes in extra]
    taken: list[NDArray[numpy.int32]] = []
    best = numpy.zeros(room // unit + 1)
    for options, sizes in zip(layers, steps, strict=True):
        best, which = _with_layer(best, [option.damage for option in options], sizes)
        taken.append(which)
    return _walk_back(layers, steps, taken, int(best.argmin()))


def _with_layer(
    best: NDArray[Any], damages: Sequence[float], sizes: Sequence[int]
) -> tuple[NDArray[Any], NDArray[numpy.int32]]:
    """The least damage within each number of steps, with one more layer, and the option that it takes for that."""
    total = numpy.full(len(best), numpy.inf)
    which = numpy.zeros(len(best), numpy.int32)
    for number, (damage, size) in enumerate(zip(damages, sizes, strict=True)):
        if size < len(best):
            tried = best[: len(best) - size] + damage
            better = tried < total[size:]
            total[size:][better] = tried[better]
            which[size:][better] = number
    return total, which


def _walk_back(
    layers: Sequence[Sequence[Option]], steps: Sequence[Sequence[int]], taken: Sequence[NDArray[Any]], place: int
) -> list[Option]:
    found: list[Option] = []
    for options, sizes, which in zip(reversed(layers), reversed(steps), reversed(taken), strict=True):
        number = int(which[place])
        found.append(options[number])
        place -= sizes[number]
    return found[::-1]
