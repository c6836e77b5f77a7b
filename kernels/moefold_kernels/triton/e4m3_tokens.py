"""Tokens as sums of two e4m3 numbers, for products with e4m3 weights.

A token's values x are scaled by a power of two that brings the largest one to 128 or more, below 256, and then are
e4m3(x) + e4m3(x - e4m3(x)). Eight significant bits fit into two terms of four and a sign each, so bf16 tokens lose
nothing but what is below 2^-17 of the largest value (7e-7 of the norm of normal values). Float32 activations of few
tokens lose 6e-4; those of more (plans.ROUNDED) are rounded to bf16 first, which takes 1.7e-3.

Stored are, for each group of 64 columns, 64 first terms and then 64 second ones, each in the order that a product of
e4m3_operands.py wants: of each 16 columns, column 8 h + 2 t + e is number 4 t + 2 e + h. Beside them is what to
multiply sums with: one number a token, or a split of its columns, or for each group of 64 (`write_terms`).
"""

from __future__ import annotations

import triton
import triton.experimental.gluon as gluon
import triton.language as tl
from triton.experimental.gluon import language as gl

from moefold_kernels.triton.portability import after_the_one_before, launch_the_next, wait_for_the_one_before
from moefold_kernels.triton.token_rows import store_terms, terms


@triton.jit
def prepare(
    x, out, factors, columns, part, x_row, COLUMNS: tl.constexpr, CHAIN: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """A part of a row: `x` [row, columns] bf16 to `out` [row, group, 2, 64] e4m3 and `factors` [row, part] float32.

    EARLY: `x` is of before the kernel in front, which has waited for it. Otherwise the next kernel may come at once:
    the one in front has waited for what that reads before its own wait.
    """
    if not EARLY:
        launch_the_next(CHAIN)
        wait_for_the_one_before(CHAIN)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * part + tl.arange(0, COLUMNS)
    inside = (tl.arange(0, COLUMNS) < part) & (at < columns)
    values = tl.load(x + row * x_row + at, mask=inside, other=0.0)
    first, second, factor = terms(values, COLUMNS)
    if EARLY:
        after_the_one_before(CHAIN)
    store_terms(out, row, columns, at, inside, first, second)
    tl.store(factors + row * tl.num_programs(1) + tl.program_id(1), factor)


@gluon.constexpr_function
def _layout(rows, warps):
    """[rows, tokens]: a thread has four rows, which lie side by side in memory."""
    across = min(rows // 4, 32)
    return gl.BlockedLayout([4, 1], [across, 32 // across], [1, warps], [0, 1])


@gluon.jit
def write_terms(
    value, out, factors, begin, end, first_row, inner, ROWS: gl.constexpr, TOKENS: gl.constexpr
):  # fmt: skip
    """Float32 activations [ROWS (whole groups), TOKENS] to `out` [entry, group, 2, 64] and `factors` [entry, group]."""
    layout: gl.constexpr = _layout(ROWS, gl.num_warps())
    value = gl.permute(gl.reshape(value, (ROWS // 16, 2, 4, 2, TOKENS)), (0, 2, 3, 1, 4))  # h, t, e
    value = gl.convert_layout(gl.reshape(value, (ROWS, TOKENS)), layout)
    groups: gl.constexpr = ROWS // 64
    largest = gl.max(gl.abs(gl.reshape(value, (groups, 64, TOKENS))), axis=1)
    exponent = gl.maximum(largest.to(gl.int32, bitcast=True) >> 23, 16)  # as split_terms
    factor = ((exponent - 7) << 23).to(gl.float32, bitcast=True)
    scale = ((261 - exponent) << 23).to(gl.float32, bitcast=True)
    three = gl.reshape(value, (groups, 64, TOKENS))
    scaled = gl.reshape(three * gl.expand_dims(scale, 1), (ROWS, TOKENS))
    scaled = gl.convert_layout(scaled, layout)
    bits = scaled.to(gl.int32, bitcast=True)  # rounded as in split_terms
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000).to(gl.float32, bitcast=True)
    rounded = gl.where(gl.abs(scaled) < 2.0**-6, scaled + 24576.0 - 24576.0, normal)
    first, second = rounded.to(gl.float8e4nv), (scaled - rounded).to(gl.float8e4nv)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    entry = begin + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
    at = (first_row + row) // 64 * 128 + row % 64
    to = out + entry.to(gl.int64)[None, :] * (2 * inner) + at[:, None]
    live = (first_row + row < inner)[:, None] & (entry < end)[None, :]
    gl.store(to, first, mask=live)
    gl.store(to + 64, second, mask=live)
    group = first_row // 64 + gl.arange(0, groups, gl.SliceLayout(1, factor.type.layout))
    entry = begin + gl.arange(0, TOKENS, gl.SliceLayout(0, factor.type.layout))
    to = factors + entry.to(gl.int64)[None, :] * (inner // 64) + group[:, None]
    gl.store(to, factor, mask=(group < inner // 64)[:, None] & (entry < end)[None, :])
