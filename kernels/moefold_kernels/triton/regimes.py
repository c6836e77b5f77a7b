"""What `moefold tune` tries, by hand: cuts of tiles, and which of them for how many entries of an expert.

Products of all sizes would be thousands of kernels of seconds each to compile, so these are what won or came near on an
H200. A cut is (rows, columns, warps, stages); a kind is a mode with a number of entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Cut = tuple[int, int, int, int]

# gate and up, of which a program has `rows` each; then down
FEW: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    (
        (32, 128, 4, 3), (32, 128, 4, 4), (32, 128, 4, 5), (32, 128, 2, 3), (64, 128, 4, 3), (64, 64, 4, 4),
        (64, 64, 4, 5), (32, 64, 4, 4), (32, 64, 4, 5), (32, 64, 4, 6), (64, 128, 8, 3), (64, 128, 8, 4),
        (64, 64, 8, 5),
        (16, 128, 2, 4), (16, 128, 1, 3), (16, 256, 2, 3), (32, 256, 4, 3), (16, 128, 4, 4), (32, 64, 4, 3),
    ),
    (
        (128, 128, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (128, 128, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4),
        (64, 128, 4, 5), (64, 128, 2, 4), (64, 64, 4, 4), (64, 64, 4, 5), (64, 64, 2, 3), (32, 64, 1, 3),
        (32, 128, 2, 3), (128, 64, 8, 5), (128, 64, 8, 6), (128, 64, 4, 4), (64, 256, 4, 3), (32, 256, 2, 3),
        (32, 128, 1, 3), (32, 64, 2, 5),
    ),
)  # fmt: skip
MANY: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    (
        (64, 64, 8, 3), (64, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4),
        (32, 64, 4, 3), (32, 64, 4, 4), (64, 128, 8, 2),
    ),
    (
        (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 2), (128, 64, 4, 3), (256, 64, 8, 3), (256, 32, 8, 4),
        (64, 64, 4, 3), (64, 64, 4, 4), (128, 32, 4, 4), (128, 32, 4, 5),
    ),
)  # fmt: skip
NARROW: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((64, 32, 8, 3), (64, 32, 8, 4), (64, 32, 4, 3), (32, 32, 4, 4)),
    ((128, 32, 8, 3), (128, 32, 8, 4), (64, 32, 4, 4)),
)
"""Beside MANY, where shared memory is as small as Ampere's and Ada's consumer GPUs have it (99 KB)."""
OVERLAPPED: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    (
        (64, 64, 8, 4), (64, 64, 8, 6), (128, 64, 8, 4), (64, 32, 4, 4), (128, 32, 8, 4), (128, 32, 8, 6),
        (64, 32, 8, 6), (64, 32, 8, 8), (32, 64, 4, 4),
    ),
    (
        (128, 64, 8, 4), (128, 64, 8, 6), (256, 64, 8, 4), (128, 32, 4, 4), (256, 32, 8, 4), (256, 32, 8, 6),
        (128, 32, 8, 6), (128, 32, 8, 8), (64, 64, 4, 4),
    ),
)  # fmt: skip
"""Even numbers of places: odd ones are unrolled twice."""
OVERLAPPED_PAIR: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((64, 64, 8, 4), (64, 64, 8, 6), (32, 64, 4, 4), (32, 64, 4, 6), (64, 32, 8, 6), (64, 32, 8, 5)),
    ((128, 64, 8, 4), (128, 64, 8, 6), (64, 64, 4, 4), (64, 64, 4, 6), (128, 32, 8, 6), (128, 32, 8, 5)),
)

LEVELED: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((64, 64, 8, 2), (32, 64, 4, 2), (64, 64, 8, 3), (64, 64, 4, 4), (128, 64, 8, 2)),
    ((128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 4), (256, 64, 8, 2)),
)
"""For the few-bit formats on Hopper with bf16 operands (leveled.py), where every step is of 128 columns."""
E4M3: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((64, 256, 8, 2), (64, 256, 4, 2), (64, 256, 8, 3), (64, 256, 8, 4)),
    ((64, 256, 4, 2), (64, 128, 4, 3), (128, 256, 8, 2), (64, 256, 4, 3)),
)
"""The same with e4m3 operands (e4m3.py), and"""
E4M3_MANY: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((64, 128, 8, 2), (64, 256, 8, 2), (64, 128, 8, 4), (64, 128, 8, 3)),
    ((64, 256, 4, 2), (128, 256, 8, 2), (64, 128, 4, 2), (128, 128, 8, 2), (64, 128, 4, 3)),
)
"""from 32 tokens on, which take more of shared memory than words where they have as many places."""
BY_ENTRY: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((4, 256, 2, 1), (2, 512, 1, 2), (2, 256, 1, 4)),
    (
        (8, 256, 8, 1), (16, 256, 8, 1), (2, 512, 2, 1), (4, 512, 4, 1), (8, 512, 8, 1), (4, 256, 4, 1), (2, 256, 2, 1),
    ),
)  # fmt: skip
"""For each entry by itself (by_entry.py): every one of gate and up with every one of down."""
BY_ENTRY_DOWN: tuple[dict[str, Any], ...] = ({}, {"splits": 2}, {"registers": 128})
"""What each of down is tried with: its choices in two sums, or so few registers that 16 warps run at once."""
BY_ENTRY_LEVELED: tuple[tuple[Cut, ...], tuple[Cut, ...]] = (
    ((2, 256, 1, 2), (4, 256, 1, 1), (4, 256, 1, 2), (2, 512, 1, 1)),
    ((2, 256, 1, 1), (4, 256, 2, 1), (4, 256, 4, 1)),
)
"""The same in few bits."""
REGISTERS_SHARED = {4: 64, 32: 128, 64: 128}
"""Tokens of a tile -> a limit it is tried with, too: four, or two, programs of eight warps then share a processor."""


class Kind(NamedTuple):
    """One way to serve entries: `cuts` for gate and up, and for down."""

    mode: str
    tokens: int
    extra: int = 0
    few: bool = False
    terms: int = 0


class Regime(NamedTuple):
    """What is tried up to some number of entries per expert; a number of groups is tried with everything."""

    load: float
    kinds: tuple[Kind, ...]
    groups: tuple[int, ...] = (1,)


REGIMES = (
    Regime(1, (Kind("pair", 16, few=True), Kind("slot", 16, few=True))),
    Regime(6, (Kind("pair", 16, few=True),)),
    Regime(14, (Kind("pair", 16, few=True), Kind("pair", 32, few=True))),
    Regime(
        26,
        (Kind("pair", 32, few=True), Kind("pair", 32, 16, few=True), Kind("overlapped_pair", 32)),
    ),
    Regime(
        48,
        (
            Kind("pair", 32, 16, few=True), Kind("pair", 64, few=True), Kind("overlapped_pair", 32, 16),
            Kind("overlapped_pair", 64), Kind("overlapped", 32, 16), Kind("overlapped", 64),
        ),
    ),
    Regime(
        110,
        (
            Kind("pair", 64, 16), Kind("pair", 64, 32), Kind("slot", 64, 16), Kind("overlapped_pair", 64, 16),
            Kind("overlapped", 64, 16), Kind("overlapped", 64, 32), Kind("overlapped", 128),
            Kind("overlapped_pair", 128),
        ),
        (1, 4),
    ),
    Regime(
        200,
        (Kind("slot", 128, 32), Kind("overlapped", 128, 32), Kind("overlapped", 128), Kind("overlapped", 256)),
        (2, 8),
    ),
    Regime(
        float("inf"),
        (
            Kind("slot", 128, 32), Kind("slot", 128), Kind("overlapped", 256), Kind("overlapped", 256, 32),
            Kind("overlapped", 128),
        ),
        (2, 4, 16),
    ),
)  # fmt: skip
LEVELED_REGIMES = (
    Regime(1, (Kind("overlapped", 4, terms=2), Kind("overlapped_pair", 4, terms=2))),
    Regime(6, (Kind("overlapped_pair", 8, terms=2), Kind("overlapped_pair", 4, terms=2))),
    Regime(14, (Kind("overlapped_pair", 16, terms=2), Kind("overlapped_pair", 32, terms=2))),
    Regime(
        26,
        (Kind("overlapped_pair", 32, terms=2), Kind("overlapped_pair", 16, terms=2), Kind("overlapped_pair", 32)),
    ),
    Regime(
        48,
        (
            Kind("overlapped_pair", 32, terms=2), Kind("overlapped", 64, terms=2), Kind("overlapped_pair", 64),
            Kind("overlapped_pair", 32, 16),
        ),
    ),
    Regime(
        110,
        (
            Kind("overlapped_pair", 64, 16), Kind("overlapped_pair", 64, 32), Kind("overlapped", 64, terms=2),
            Kind("overlapped", 64, 16, terms=2), Kind("overlapped", 128),
        ),
        (1, 2),
    ),
    Regime(200, (Kind("overlapped", 128, 32), Kind("overlapped", 128), Kind("overlapped", 256)), (2, 8)),
    Regime(float("inf"), (Kind("overlapped", 256, 32), Kind("overlapped", 128), Kind("overlapped", 256)), (2, 4, 8)),
)  # fmt: skip
"""REGIMES of the few-bit formats."""
FEW_TOKENS = 4
"""So few tokens are of the first regime, whatever their experts: few pairs have both slots in use."""
STREAMED: tuple[tuple[float, tuple[tuple[int, int], ...]], ...] = (
    (10, ((16, 0),)), (24, ((32, 0), (32, 8), (16, 16))), (48, ((64, 0), (32, 16), (32, 32))),
    (130, ((64, 16), (64, 32))),
)  # fmt: skip
"""Entries of a tile, and extra ones, that are tried with both projections as one stream, up to so many an expert."""
STREAMED_CUTS = ((64, 8), (64, 7), (64, 6), (64, 5), (64, 4), (128, 5), (128, 4))
"""Columns and places, as far as they fit."""
