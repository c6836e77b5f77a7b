"""Where each bit of the few-bit pair formats is: pair4, pair5, pair6 and pair8 (VERSIONS).

A position of a pair of experts is a state of 3 bits, which signs the experts read with and which of them reads it at
all, and a magnitude of b = 1, 2, 3 or 5 bits, a number of a level. A magnitude is levels[number] times a bf16 scale,
which 64 consecutive columns of a row share, and so do both experts; there is no zero. Levels are bf16 numbers. Those
that moefold learns are fp8 numbers times one factor (eighths.py), those of older checkpoints need not be.

    state  0 .. 3   both experts read it: bit 0 is the sign of slot 0, bit 1 that of slot 1
           4, 5     slot 0 alone, with the sign in bit 0
           6, 7     slot 1 alone, with the sign in bit 0

Words have 32 bits and hold positions of one row, in two planes. The nibble plane, `words`, is the same in every format:
the state and the level's highest bit, eight positions a word,

    31 .. 28       ...     7 .. 4         3       2 .. 0
    position 7     ...     position 1     level   state      (of position 0)

and the plane of the w = b - 1 other bits, `low` (pair4 has none), has 32 / w positions a word. In pair5 and pair6
position p of a word begins at bit 4 * (p % 8) + w * (p // 8), so that nibble i always belongs to a position 8 j + i; in
pair8 at bit 8 * (p % 4) + 4 * (p // 4), so that byte i belongs to the positions of nibble i in either half of a nibble
word:

    pair5, w = 1     nibble i: positions i, 8 + i, 16 + i, 24 + i from its lowest bit up
    pair6, w = 2     nibble i: positions i (bits 1, 0) and 8 + i (bits 3, 2)
    pair8, w = 4     byte i: positions i (bits 3 .. 0) and 4 + i (bits 7 .. 4)

Of each 64 columns, position 16 t + 8 s + 4 u + 2 e + h is column 32 s + 16 u + 8 h + 2 t + e (`ORDER`): in a matrix
product of 16 columns, as tensor cores take their operands, a thread t of the four that share a row has columns 2 t,
2 t + 1, 8 + 2 t and 9 + 2 t, so it finds all that it needs of a group in two nibble words of its own. (In versions
before, positions were columns, and kernels had tokens in another order for it.)

Why: `prmt` looks four bytes up in a table of eight by the lower three bits of four nibbles, and the table is two
registers. So `words & 0x77777777` are selectors of states as they are, of a table of bf16 high bytes for +1, -1 and 0
for each slot; and `(low >> w * j) & 0x33333333 | (words >> 1) & 0x44444444` are selectors of eight levels for pair6,
with masks 0x11111111 and (words >> 2) & 0x22222222 for pair5, and 0x11111111 of words >> 3 for pair4. Two look-ups
give the two bytes of four levels. A number of pair8, whose levels are fp8 numbers, is its level's byte: four columns'
lower bits are low & 0x0F0F0F0F, or low >> 4 & 0x0F0F0F0F, in the order in which `prmt` makes bytes of half a word's
nibbles. (In version 1 nibble i was column i's, which took two `prmt` more, and four for bf16 operands.) Levels of pair8
that are no fp8 numbers lie on eight straight pieces of four (`pieces`), as the fp8 numbers of the bytes 0 to 31 do.

Rows are padded to whole groups of 64 columns with clear bits, which decode to what nobody asked for: readers cut. So
each plane's rows are multiples of 8 bytes (the nibble plane's: of 32), and a split between groups cuts no word.

In files and on devices a plane of a matrix whose rows are a number of 16 and whose columns a number of 128 lies in
bands (`banded`): a band is 16 rows, and holds their first 128 columns, one row's words (or bits, or two scales) behind
another's, then the next 128 columns, and so on. What a kernel reads in one step then lies in pieces of 16 x 128
positions, 1 KB of words each; in rows it would be pieces of 64 bytes, which memory gives more slowly (docs/kernels.md).
Such a plane has a line for each band instead of each row, [.., rows / 16, 16 * words], so that a part of the bands is a
part of the rows, and a part of each band's words, where it has whole 128 columns, one of the columns. Other matrices
lie in rows. (In versions before, all did.)

A row that is not in a checkpoint yet is one record of 16-bit integers: the nibble plane's (low halves first), those of
the other plane, the scales' bits. In files and on devices they are three tensors, and the scales are int16 there, too:
no reader casts integers when a model is to have another dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product

import torch
from torch import Tensor

from moefold_kernels.errors import FormatError

MAGNITUDE_BITS = {"pair4": 1, "pair5": 2, "pair6": 3, "pair8": 5}
"""Format -> the bits b of a level's number."""

VERSIONS = {"pair4": 3, "pair5": 3, "pair6": 3, "pair8": 4}
"""Format -> the version of where its bits are."""

GROUP = 64
"""Columns of a row that share a scale, and that change places in words."""

ORDER = tuple(
    32 * s + 16 * u + 8 * h + 2 * t + e for t, s, u, e, h in product(range(4), range(2), range(2), range(2), range(2))
)
"""The column of each position of a group."""

BAND, STEP = 16, 128
"""Rows of a band, and columns of which it holds one piece after another."""

WORD = 32
NIBBLE = 4
STATE_BITS = 3
ALONE = 4
"""The state from which on one slot alone reads: this plus twice the slot, plus its sign."""

PIECES, PER_PIECE = 8, 4
"""Of the levels of pair8."""
NEAR = 64
"""How many bf16 numbers on either side of a mean step are tried to find one that gives a piece's levels."""


def magnitude_bits(format: str) -> int:
    """The bits of a level's number in one of the formats; raises FormatError for another."""
    if format not in MAGNITUDE_BITS:
        raise FormatError(f"format {format!r} is none of {', '.join(MAGNITUDE_BITS)}")
    return MAGNITUDE_BITS[format]


def low_bits(format: str) -> int:
    """Bits of a level's number in the plane `low`: 0 where there is no such plane."""
    return magnitude_bits(format) - 1


def places(format: str, plane: str) -> tuple[int, ...]:
    """The lowest bit of each of a word's first eight positions in `words` or `low`; the next eight are further up."""
    if plane == "low" and low_bits(format) == NIBBLE:
        return tuple(2 * NIBBLE * (position % 4) + NIBBLE * (position // 4) for position in range(WORD // NIBBLE))
    return tuple(range(0, WORD, NIBBLE))


def groups(columns: int) -> int:
    """How many scales a row of so many columns has."""
    return -(-columns // GROUP)


def word_columns(columns: int, bits: int) -> int:
    """The width of a plane of so many bits a position, in 32-bit words."""
    return groups(columns) * GROUP * bits // WORD


def planes(format: str, columns: int) -> dict[str, int]:
    """The widths of one matrix's planes in 32-bit words, `words` and `low` where there is one, and of `scale`."""
    found = {"words": word_columns(columns, NIBBLE)}
    if low_bits(format):
        found["low"] = word_columns(columns, low_bits(format))
    return found | {"scale": groups(columns)}


def banded(rows: int, columns: int) -> bool:
    """Whether a matrix of this shape lies in bands."""
    return rows > 0 and columns > 0 and not (rows % BAND or columns % STEP)


def stored(format: str, rows: int, columns: int) -> dict[str, tuple[int, int]]:
    """The shapes of a matrix's planes as they lie in files and on devices."""
    return {name: _lines(rows, columns, width) for name, width in planes(format, columns).items()}


def layer_sizes(up: Sequence[int], down: Sequence[int]) -> tuple[int, int]:
    """(inner, hidden) by the shapes, as they are stored, of the nibble planes of up and down; FormatError for others.

    A width alone does not tell bands from rows. The two together do: each has the other's rows for its columns, and
    whether either lies in bands follows from both.
    """
    for inner, hidden in product((up[0], BAND * up[0]), (down[0], BAND * down[0])):
        if _words(inner, hidden) == tuple(up) and _words(hidden, inner) == tuple(down):
            return inner, hidden
    raise FormatError(f"{list(up)} and {list(down)} words are no nibble planes of up and down of one layer")


def to_bands(plane: Tensor, columns: int) -> Tensor:
    """A plane [.., rows, width] of a banded matrix as it is stored: [.., rows / BAND, BAND * width], contiguous."""
    pieces = plane.unflatten(-1, (columns // STEP, -1)).unflatten(-3, (-1, BAND))  # [.., band, row, step, words]
    banded: Tensor = pieces.transpose(-3, -2).flatten(-3)
    return banded.contiguous()


def from_bands(plane: Tensor, columns: int) -> Tensor:
    """What `to_bands` was given."""
    pieces = plane.unflatten(-1, (columns // STEP, BAND, -1))  # [.., band, step, row, words]
    rows: Tensor = pieces.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return rows


def _words(rows: int, columns: int) -> tuple[int, int]:
    """`stored` of the nibble plane, which is the same in every format."""
    return _lines(rows, columns, word_columns(columns, NIBBLE))


def _lines(rows: int, columns: int, width: int) -> tuple[int, int]:
    """The shape of a plane of a matrix, which has so many words a row."""
    return (rows // BAND, BAND * width) if banded(rows, columns) else (rows, width)


def record(format: str, columns: int) -> int:
    """The 16-bit integers of a row."""
    found = planes(format, columns)
    return 2 * (found["words"] + found.get("low", 0)) + found["scale"]


def size(format: str, rows: int, columns: int) -> int:
    """Bytes of one matrix of a pair, scales included."""
    return 2 * rows * record(format, columns)


def check_levels(format: str, levels: Sequence[float]) -> tuple[float, ...]:
    """The levels if they are some of the format: bf16 numbers, positive, increasing, and on pieces where it says so."""
    count = 1 << magnitude_bits(format)
    if len(levels) != count or not all(type(level) is float and 0 < level < math.inf for level in levels):
        raise FormatError(f"{format} has {count} positive levels, and these are {list(levels)}")
    if any(larger <= smaller for smaller, larger in pairwise(levels)):
        raise FormatError(f"levels increase, and these are {list(levels)}")
    if torch.tensor(levels, dtype=torch.float64, device="cpu").bfloat16().tolist() != list(levels):
        raise FormatError(f"levels are bf16 numbers, and these are {list(levels)}")
    if count == PIECES * PER_PIECE:
        pieces(levels)
    return tuple(levels)


def pieces(levels: Sequence[float]) -> tuple[list[float], list[float]]:
    """Where the eight straight pieces of 32 levels begin, and their steps, all bf16 numbers.

    Level 4 p + i is `bf16(begin[p] + i * step[p])`. Raises FormatError for levels that are on no such pieces.
    """
    begins: list[float] = []
    steps: list[float] = []
    for piece in range(PIECES):
        four = torch.tensor(levels[PER_PIECE * piece : PER_PIECE * (piece + 1)], dtype=torch.float32, device="cpu")
        middle = ((four[-1] - four[0]) / (PER_PIECE - 1)).bfloat16().view(torch.int16)
        near = (middle + torch.arange(-NEAR, NEAR + 1, dtype=torch.int16, device="cpu")).view(torch.bfloat16)
        made = (four[0] + near.float()[:, None] * torch.arange(PER_PIECE, device="cpu")).bfloat16().float()
        fitting = near[(made == four).all(dim=1)]
        if not len(fitting):
            raise FormatError(f"levels {four.tolist()} lie on no straight line of bf16 numbers, as pair8's have to")
        begins.append(float(four[0]))
        steps.append(float(fitting[len(fitting) // 2]))
    return begins, steps
