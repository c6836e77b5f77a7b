"""Levels as fp8 numbers times a factor: every one that there can be comes back, and others are said to be none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leveled import FORMATS, levels_of

from moefold_kernels import FormatError, layout_pairs
from moefold_kernels.eighths import HOME, LARGEST, SMALLEST, UPPER, codes, scaled

FP8 = torch.arange(LARGEST + 1, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
"""What torch reads of the bytes without a sign."""
FACTORS = [eighths / 8 * 2.0**exponent for eighths in range(8, 16) for exponent in (-30, -3, 0, 7)]


def times(factor: float, numbers: tuple[int, ...]) -> list[float]:
    """Levels of bytes, as `codes` defines them; byte 0 stands for 2 ** -9 of byte 1."""
    return [factor * (FP8[byte] if byte else SMALLEST * FP8[1]) for byte in numbers]


@pytest.mark.parametrize("factor", FACTORS)
def test_all_levels_of_pair4_and_pair8_come_back(factor):
    for lower in range(1, UPPER):
        assert codes("pair4", times(factor, (lower, UPPER))) == ((lower, UPPER), factor)
    assert codes("pair8", times(factor, tuple(range(32)))) == (tuple(range(32)), factor)
    assert list(scaled(range(LARGEST + 1), factor)) == times(factor, tuple(range(LARGEST + 1)))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["pair5", "pair6"]), st.sampled_from(FACTORS), st.data())
def test_any_bytes_of_pair5_and_pair6_come_back_as_equal_levels(format, factor, data):
    count = 1 << layout_pairs.magnitude_bits(format)
    numbers = data.draw(st.sets(st.integers(1, LARGEST), min_size=count, max_size=count).map(sorted))
    levels = times(factor, tuple(numbers))
    found, chosen = codes(format, levels) or ((), 0.0)
    assert times(chosen, found) == levels
    field = found[-1] >> 3
    assert HOME <= field <= max(HOME, numbers[-1] >> 3)
    if field > HOME:  # one octave more for the factor, one exponent less for the bytes: some level is no number then
        assert not {level / chosen / 2 for level in levels} <= set(FP8)


@pytest.mark.parametrize("format", FORMATS)
def test_the_products_are_bf16_numbers(format):
    """The definition and the other kernels read the levels, not the bytes."""
    for factor in FACTORS:
        numbers = tuple(range(1 << layout_pairs.magnitude_bits(format))) if format == "pair8" else range(1, LARGEST + 1)
        levels = torch.tensor(times(factor, tuple(numbers)), dtype=torch.float64)
        assert torch.equal(levels.bfloat16().double(), levels)


def test_which_of_several_choices_is_taken():
    """The fewest eighths, and the field of 1 to 1.875 for the largest, unless the smallest would be no number then."""
    assert codes("pair5", [0.75, 1.5, 3.0, 6.0]) == ((0x24, 0x2C, 0x34, 0x3C), 4.0)  # 12 eighths and powers of two, too
    assert codes("pair5", [9 * SMALLEST, 0.03125, 1.0, 2.0]) == ((0x09, 0x10, 0x38, 0x40), 1.0)
    assert codes("pair5", [8 * SMALLEST, 0.03125, 1.0, 2.0]) == ((0x04, 0x08, 0x30, 0x38), 2.0)


@pytest.mark.parametrize(
    ("format", "levels"),
    [
        ("pair4", [0.5, 1.0]),  # 1.0 is 1.875 times no number of eighths
        ("pair4", [1.0625, 1.875]),  # the upper is, the lower has five significant bits
        ("pair4", [2.0**-10, 1.875]),  # below the smallest
        ("pair5", [0.5, 1.0625, 1.125, 1.5]),
        ("pair5", [2.0**-9, 2.0**-8, 1.0, 512.0]),  # too wide
        ("pair6", torch.arange(20, 28).div(16).tolist()),  # 21 is 3 times 7, and 23 a prime
        ("pair8", list(levels_of("pair8"))),  # evenly spaced
        ("pair8", [2.0**-10, *torch.arange(1, 17).tolist(), *range(18, 33, 2), *range(36, 61, 4)]),  # level 0
        ("pair8", [2.0**-9, *torch.arange(1, 17).tolist(), *range(18, 33, 2), *range(36, 48, 4), *range(48, 64, 5)]),
        ("pair8", (torch.tensor(times(1.0, tuple(range(32)))) * 1.0625).tolist()),  # 17 sixteenths
    ],
)
def test_other_levels_have_none(format, levels):
    levels = [float(level) for level in levels]
    assert layout_pairs.check_levels(format, levels)
    assert codes(format, levels) is None


def test_what_are_no_levels_is_an_error():
    for format, levels, message in [
        ("pair7", [1.0], "'pair7' is none of"),
        ("pair4", [1.0], "has 2 positive levels"),
        ("pair4", [0.0, 1.875], "has 2 positive levels"),
        ("pair5", [1.0, 0.5, 2.0, 3.0], "levels increase"),
    ]:
        with pytest.raises(FormatError, match=message):
            codes(format, levels)
