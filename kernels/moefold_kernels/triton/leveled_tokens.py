"""Tokens in the order of columns in which leveled.py multiplies them.

Of a group of 64 columns, column 16 t + 8 s + 4 u + 2 e + h is number 32 s + 16 u + 8 h + 2 t + e: a thread's own words
are then what a product wants of it (leveled_operands.py). Routing's kernels, or one of its own before the first
projection, copy tokens in that order (token_rows.py); the first projection writes its activations so.
"""

from __future__ import annotations

import triton
import triton.experimental.gluon as gluon
import triton.language as tl
from triton.experimental.gluon import language as gl

from moefold_kernels.triton.portability import after_the_one_before
from moefold_kernels.triton.token_rows import ordered


@triton.jit
def prepare(x, out, hidden, x_row, COLUMNS: tl.constexpr, CHAIN: tl.constexpr):
    """One token: `x` [token, hidden] bf16 to `out` [token, hidden], groups of columns in their order."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, COLUMNS)
    values = tl.load(x + token * x_row + at, mask=at < hidden, other=0.0)
    values = ordered(values, COLUMNS)
    after_the_one_before(CHAIN)  # `x` is of before the routing's kernels, which have waited for it
    tl.store(out + token * hidden + at, values, mask=at < hidden)


@gluon.constexpr_function
def store_layout(rows, warps):
    """The layout of stores [rows, tokens]: as many rows a thread as lie side by side in memory."""
    each = 8 if rows >= 64 else 4
    across = min(rows // each, 32)
    return gl.BlockedLayout([each, 1], [across, 32 // across], [1, warps], [0, 1])


@gluon.jit
def in_order(value, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    """[ROWS, TOKENS] with rows as `positions` has them; of 32 rows, the group's first or second half, t has one bit."""
    if ROWS >= 64:
        parts = gl.reshape(value, (ROWS // 64, 4, 2, 2, 2, 2, TOKENS))  # t, s, u, e, h
        value = gl.reshape(gl.permute(parts, (0, 2, 3, 5, 1, 4, 6)), (ROWS, TOKENS))
    else:
        gl.static_assert(ROWS == 32)
        parts = gl.reshape(value, (2, 2, 2, 2, 2, TOKENS))
        value = gl.reshape(gl.permute(parts, (1, 2, 4, 0, 3, 5)), (ROWS, TOKENS))
    return value


@gluon.jit
def positions(first_row, ROWS: gl.constexpr, layout: gl.constexpr):
    """Where in a row of activations those of `in_order` belong."""
    number = gl.arange(0, ROWS, layout)
    if ROWS == 32:
        number = number // 4 * 8 + first_row // 32 % 2 * 4 + number % 4 - first_row % 64
    return first_row + number


@gluon.jit
def write_inner(value, out, begin, end, first_row, inner, ROWS: gl.constexpr, TOKENS: gl.constexpr):
    """Activations [ROWS, TOKENS] to `out` [entry in order, inner]; `inner` is a number of groups."""
    layout: gl.constexpr = store_layout(ROWS, gl.num_warps())
    value = gl.convert_layout(in_order(value.to(gl.bfloat16), ROWS, TOKENS), layout)
    row = positions(first_row, ROWS, gl.SliceLayout(1, layout))
    entry = begin + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
    at = out + entry[None, :].to(gl.int64) * inner + row[:, None]
    gl.store(at, value, mask=(row < inner)[:, None] & (entry < end)[None, :])
