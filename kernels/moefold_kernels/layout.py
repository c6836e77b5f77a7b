"""Where each bit is: the one file that codecs, reference and kernels take positions from.

Format `exponent`, version 1: one 16-bit word holds one position of a pair of experts (slots 0 and 1).

    15      14      13      12      11 .. 7     6 .. 0
    sign 0  sign 1  keep 0  keep 1  exponent    fraction

Signs and keep bits are in the order of PuzzleMoE (arXiv 2511.04805). The exponent field is the bf16 exponent minus
the window's low end, the fraction is bf16's own, and slot 0's keep bit is where a bf16's exponent has 64: with it the
low twelve bits are a bf16 of exponent 64 + field, and a factor of 2 ** (low - 64) puts it where it belongs, exactly.

Words are canonical: a slot that is not kept has a clear sign bit, and a word that keeps neither slot is 0.
"""

from __future__ import annotations

from moefold_kernels.errors import FormatError

EXPONENT = "exponent"
"""The format's name."""

SLOTS = 2
SIGN_SHIFT = (15, 14)
KEEP_SHIFT = (13, 12)
FIELD_SHIFT = 7
FIELD_BITS = 5
FRACTION_BITS = 7
MAGNITUDE_BITS = (1 << (FIELD_BITS + FRACTION_BITS)) - 1
"""Exponent field and fraction: the part of a word that both slots share."""

WINDOW = 1 << FIELD_BITS
"""How many consecutive bf16 exponents a window holds."""

LARGEST_EXPONENT = 254
"""The largest biased exponent of a finite bf16."""


def check_top(top: int) -> int:
    """The window's top if it is one: a biased bf16 exponent of a normal number, 1 to 254."""
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= LARGEST_EXPONENT:
        raise FormatError(f"window top {top!r}: write a biased bf16 exponent from 1 to {LARGEST_EXPONENT}")
    return top


def low(top: int) -> int:
    """The smallest biased exponent of the window whose largest present exponent is `top`."""
    return max(check_top(top) - WINDOW + 1, 1)


def high(top: int) -> int:
    """The largest biased exponent that the window can hold: `top`, or 32 when `top` is below 32."""
    return low(top) + WINDOW - 1


def smallest(top: int) -> int:
    """The bits of the smallest positive bf16 in the window; what is below is flushed to zero."""
    return low(top) << FRACTION_BITS


def largest(top: int) -> int:
    """The bits of the largest bf16 in the window; what is above is clipped to it."""
    return (high(top) << FRACTION_BITS) | ((1 << FRACTION_BITS) - 1)
