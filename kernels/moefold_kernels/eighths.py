"""Levels as fp8 numbers times one factor: what Hopper's tensor cores take as they are.

An fp8 number (e4m3) has a sign, four bits of exponent (bias 7) and three of fraction; below 2 ** -6 it goes on in steps
of 2 ** -9. Its significand is a number of eighths, and so is a factor's, `eighths / 8 * 2 ** exponent` with 8 to 15
eighths. The product of two such has eight significant bits, as a bf16 number has. So bytes and a factor can be the
format's levels exactly, and a kernel multiplies bytes, and applies scales and the factor to the sums.

A format's kernel makes the bytes of a position's level by its own short way, so it says which bytes there are:

    pair5, pair6   any from 0x01 to 0x7E
    pair4          0x3F (1.875) for the upper level, any from 0x01 to 0x3E for the lower: fewer bits of the same
    pair8          0x00 to 0x1F, the level's number: 0, 1, ..., 16, 18, ..., 32, 36, ..., 60 in units of 2 ** -9

Levels are positive, and byte 0x00 is zero. So level 0 of pair8 stands for zero: it is 2 ** -9 of level 1, a thirty
thousandth of the largest level, where bf16 resolves a 256th of a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

from moefold_kernels import layout_pairs

FRACTION_BITS, BIAS = 3, 7
EIGHTHS = range(8, 16)
"""Of a factor, and of the significand of an fp8 number that is not subnormal."""
LARGEST = 0x7E
"""448; the next byte is NaN."""
UPPER = 0x3F
"""The byte of pair4's upper level: the largest of the exponent field HOME."""
HOME = BIAS
"""The exponent field of the largest level, if all levels are numbers then: that of 1 to 1.875."""
SMALLEST = 2.0**-9
"""Of the fp8 numbers; and of pair8's level 1, level 0."""


def value(byte: int) -> float:
    """The fp8 number of a byte without a sign, 0x00 to 0x7E."""
    exponent, fraction = byte >> FRACTION_BITS, byte & 7
    if exponent == 0:
        return fraction * SMALLEST
    return math.ldexp(8 + fraction, exponent - BIAS - FRACTION_BITS)


def scaled(numbers: Iterable[int], factor: float) -> tuple[float, ...]:
    """The levels of bytes and a factor; where the byte is 0x00, the smallest one, which stands for zero."""
    return tuple(factor * (value(byte) or SMALLEST * value(1)) for byte in numbers)


def codes(format: str, levels: Sequence[float]) -> tuple[tuple[int, ...], float] | None:
    """The bytes of a format's levels, without signs, and the factor; None where the levels are no such numbers.

    `levels[n] == factor * value(bytes[n])`, exactly, for each but level 0 of pair8, whose byte is 0x00 (`scaled` gives
    all levels back). Where pair5 or pair6 leave a choice, the largest level has the exponent field 7, or the smallest
    above it with which all levels are numbers, and then the factor has the fewest eighths. Raises FormatError for what
    are no levels of the format.
    """
    checked = layout_pairs.check_levels(format, levels)
    if format == "pair4":
        return _coded(checked, checked[-1] / value(UPPER), UPPER)
    if format == "pair8":
        if checked[0] != SMALLEST * checked[1]:
            return None
        made = _coded(checked[1:], checked[1] / SMALLEST, len(checked) - 1)
        return ((0, *made[0]), made[1]) if made and made[0] == tuple(range(1, len(checked))) else None
    for field in range(HOME, 16):
        for eighths in EIGHTHS:
            exponent = (
                math.frexp(checked[-1] * 8 / eighths)[1] - 1
            )  # of the quotient, which the largest level's byte is
            if made := _coded(checked, math.ldexp(eighths / 8, exponent + BIAS - field), LARGEST):
                return made
    return None


def _coded(levels: Sequence[float], factor: float, largest: int) -> tuple[tuple[int, ...], float] | None:
    """The bytes, up to `largest`, with this factor; None where one level is no number or the factor none of eighths."""
    if math.frexp(factor)[0] * 2 * len(EIGHTHS) % 1:  # frexp's is from 1/2 to 1
        return None
    known = {factor * number: byte for number, byte in _numbers().items() if byte <= largest}
    found = tuple(known.get(level, 0) for level in levels)
    return (found, factor) if all(found) else None


@cache
def _numbers() -> dict[float, int]:
    return {value(byte): byte for byte in range(1, LARGEST + 1)}
