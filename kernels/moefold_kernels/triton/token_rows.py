"""Tokens as e4m3.py multiplies them: a row rewritten by one program, which routing's kernels do on the way.

Sums of two e4m3 numbers (`split_terms`), for each group of 64 columns 64 first terms and then 64 second ones, and a
factor. Of each 16 columns, column 8 h + 2 t + e is number 4 t + 2 e + h (e4m3_operands.py).

Plain Triton, for routing runs everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_terms(values, largest):
    """First and second terms of float32 `values` whose absolute values are `largest` at most, and the factor.

    The largest gets the exponent 7; it counts as 2 ** -111 at least, so that no scale overflows. Rounding is
    written out (to four significant bits, below 2 ** -6 to steps of 2 ** -9) and not read back from the e4m3 numbers:
    on an H200 (triton 3.6.0, CUDA 13.0) the first two of every four then came back as others.
    """
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 16)
    scale = ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = values * scale
    bits = scaled.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000).to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(scaled) < 2.0**-6, scaled + 24576.0 - 24576.0, normal)
    first, second = rounded.to(tl.float8e4nv), (scaled - rounded).to(tl.float8e4nv)
    return first, second, ((exponent - 7) << 23).to(tl.float32, bitcast=True)


@triton.jit
def terms(values, COLUMNS: tl.constexpr):
    """First and second terms of [COLUMNS] bf16, whole groups, in their order; and the factor."""
    parts = tl.reshape(values, (COLUMNS // 16, 2, 4, 2))  # h, t, e
    values = tl.reshape(tl.permute(parts, (0, 2, 3, 1)), (COLUMNS,)).to(tl.float32)
    return split_terms(values, tl.max(tl.abs(values), axis=0))


@triton.jit
def store_terms(out, row, columns, at, inside, first, second):
    """Terms of columns `at` of a row to `out` [row, group, 2, 64]."""
    to = out + row * (2 * columns) + at // 64 * 128 + at % 64
    tl.store(to, first, mask=inside)
    tl.store(to + 64, second, mask=inside)


@triton.jit
def prepare_row(row, x, out, factors, columns, x_row, COLUMNS: tl.constexpr):
    """One token: `x` [token, columns] bf16 to `out` [token, group, 2, 64] and `factors` [token] float32."""
    row = row.to(tl.int64)
    at = tl.arange(0, COLUMNS)
    inside = at < columns
    values = tl.load(x + row * x_row + at, mask=inside, other=0.0)
    first, second, factor = terms(values, COLUMNS)  # pyright: ignore[reportGeneralTypeIssues]  (a jit function)
    store_terms(out, row, columns, at, inside, first, second)
    tl.store(factors + row, factor)
