"""Merged pairs to try codecs on, and what experts read of them when nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moefold.artifacts import MergedPair
from moefold.errors import InputError

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LARGEST = torch.finfo(torch.bfloat16).max
SUBNORMAL = 2.0**-133
"""The smallest positive bfloat16."""
SMALLEST = 2.0**-126
"""The smallest normal one."""
HUGE = 2.0**63
"""From here on a codec may refuse: squares are no float32 any more, and no model has such weights."""


def pair_of(magnitude: Tensor, negative: Tensor | None = None, keep: Tensor | None = None) -> MergedPair:
    """A pair that both read as it is, unless told otherwise."""
    shape = (2, *magnitude.shape)
    none, every = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    return MergedPair(magnitude.float(), none if negative is None else negative, every if keep is None else keep)


def normal(rows: int, columns: int, spread: float = 0.02, seed: int = 0, neither: bool = True) -> MergedPair:
    """Magnitudes of normal weights, half of them shared; `neither`: some that no expert keeps."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randn(rows, columns, generator=generator).abs() * spread
    negative = torch.rand(2, rows, columns, generator=generator) < 0.5
    state = torch.randint(9 if neither else 8, (rows, columns), generator=generator)
    return MergedPair(magnitude, negative, torch.stack([(state < 6) | (state == 8), state > 3]) & (state != 8))


def edges() -> Iterator[MergedPair]:
    """What rounding goes wrong at: halves between two bfloat16, which round to even; subnormal numbers alone.

    And numbers that are bfloat16 already, of which no format may say that they were lost when they were not.
    """
    exact = 1 + torch.arange(16) / 128
    halves = 1 + (2 * torch.arange(16) + 1) * 2.0**-8  # between 1 + k / 128 and 1 + (k + 1) / 128
    subnormal = (torch.arange(16) + 1) * SUBNORMAL
    around = SMALLEST * torch.tensor([0.5, 0.984375, 0.99609375, 1.0, 1.00390625, 1.5, 2.0, 4.0] * 2)
    for values in (exact, halves, subnormal, around, halves * SMALLEST):
        negative = torch.stack([torch.arange(16) % 2 == 0, torch.arange(16) % 3 == 0])
        yield pair_of(values.view(2, 8), negative.view(2, 2, 8))


def reads(pair: MergedPair) -> Tensor:
    """What the two experts read, [2, rows, columns] bfloat16, each value rounded once."""
    signed = torch.where(pair.negative, -pair.magnitude, pair.magnitude)
    return torch.where(pair.keep, signed, 0).bfloat16()


def merges(neither: bool) -> SearchStrategy[MergedPair]:
    """Pairs of every kind: odd sizes, zeros, subnormal numbers of float32 and bfloat16, the largest bfloat16."""
    st = strategies()
    special = st.sampled_from([0.0, 1e-45, SUBNORMAL, SMALLEST, 1.0, 1.00390625, 1.99609375, float(LARGEST)])
    value = st.one_of(st.floats(0, 4, width=32), st.floats(0, float(LARGEST), width=32), special)
    state = st.integers(0, 15).filter(lambda bits: neither or bits & 3 != 0)

    def build(rows: int, columns: int) -> Any:
        cells = st.lists(st.tuples(value, state), min_size=rows * columns, max_size=rows * columns)
        return cells.map(lambda found: _pair(found, rows, columns))

    small = st.tuples(st.integers(1, 4), st.integers(1, 7)).flatmap(lambda shape: build(*shape))
    sizes = st.tuples(st.integers(1, 5), st.integers(1, 150), st.integers(-20, 3), st.integers(0, 9))
    large = sizes.map(lambda n: normal(n[0], n[1], 2.0 ** n[2], n[3], neither))
    found: SearchStrategy[MergedPair] = st.one_of(small, large)
    return found


def _pair(cells: list[tuple[float, int]], rows: int, columns: int) -> MergedPair:
    magnitude = torch.tensor([value for value, _ in cells]).view(rows, columns)
    bits = torch.tensor([state for _, state in cells]).view(rows, columns)
    keep, negative = (torch.stack([bits >> at & 1, bits >> (at + 1) & 1]).bool() for at in (0, 2))
    return MergedPair(magnitude, negative, keep)


def strategies() -> Any:
    """hypothesis's strategies; raises InputError where it is not installed."""
    try:
        import hypothesis.strategies
    except ImportError as error:
        raise InputError("check_codec needs hypothesis: pip install 'moefold[testing]' (or hypothesis)") from error
    return hypothesis.strategies
