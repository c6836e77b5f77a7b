"""What a program of e4m3.py holds in shared memory: planes, tokens and their factors, of each step at a place.

A step is 256 columns where a row has a number of those, else 128 (HALVES: 2 or 1). Places are buffers of their own,
not parts of one, since Triton puts a barrier between a copy and any reading of the same buffer; so the loop over steps
is unrolled by places, and one barrier a step is left (two places: two). Tokens' buffers have a dimension of one, whose
index is nothing that the compiler knows: it computed all addresses for products before the loop otherwise, and kept
each in a register.

From THINLY tokens on, a step of 256 columns has tokens at one place only, which are asked for by halves: two programs
then fit a multiprocessor (thinly).

A token's values of a group of 64 columns are 128 bytes of two terms
(e4m3_tokens.py), here as 2 * TOKENS rows, first terms before second ones; or (thinly) as TOKENS rows of both, which are
one product with an operand that comes twice.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moefold_kernels.triton.leveled_stage import HALF, STEP, behind, copy_words, low_words, turned

WORDS, LOW, SCALE, TOKENS_OF, FACTOR_OF = (gl.constexpr(i) for i in (0, 2, 4, 5, 13))
"""Numbers of buffers: two halves of `words` and of `low`, scales, four groups of either slot's tokens, and factors.

A step of 128 columns has the first of the halves and the first two of the groups.
"""
COUNT = gl.constexpr(21)
"""Buffers of a place."""
FEW = gl.constexpr(8)
"""Up to so many tokens both terms are one product, twice as wide: narrower ones take as long."""

THINLY = gl.constexpr(32)
"""Tokens from which on those of steps of 256 columns have one place (plans.THINLY)."""


@gluon.constexpr_function
def thinly(tokens, halves):
    """Whether all steps have tokens at one place, a half of which is asked for while the other's products run."""
    return halves == 2 and tokens >= THINLY.value


@gluon.constexpr_function
def width(tokens):
    """Columns of a product."""
    return 2 * tokens if tokens <= FEW.value else tokens


@gluon.constexpr_function
def fewer(tokens):
    """Half of a tile's tokens: what a slot of no more takes, where that makes its products faster."""
    return tokens // 2 if tokens > FEW.value else tokens


@gluon.constexpr_function
def product_layout(tokens, warps):
    """The layout of sums [rows, width]: a warp has 16 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, width(tokens), 32])


@gluon.constexpr_function
def token_layout(warps, columns):
    """The layout of a copy of tokens [rows, columns]: 16 bytes a thread."""
    return gl.BlockedLayout([1, 16], [512 // columns, columns // 16], [warps, 1], [1, 0])


@gluon.constexpr_function
def factor_layout(warps):
    """The layout of a copy of tokens' scales."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def at(number, place):
    """A buffer's number among those of all places."""
    return place * COUNT.value + number


@gluon.jit
def buffers_of(
    ROWS: gl.constexpr, TOKENS: gl.constexpr, OTHERS: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
    FACTORS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    # each by itself: Triton puts a barrier between copies into an allocation and whatever else concerns it
    made = ()
    if thinly(TOKENS, HALVES):
        tokens = _tokens(TOKENS, OTHERS, FACTORS, HALVES, True)
        for _ in gl.static_range(PLACES):
            made = made + _planes(ROWS, FORMAT, HALVES) + tokens
    else:
        for _ in gl.static_range(PLACES):
            made = made + _planes(ROWS, FORMAT, HALVES) + _tokens(TOKENS, OTHERS, FACTORS, HALVES, False)
    return made


@gluon.jit
def _planes(ROWS: gl.constexpr, FORMAT: gl.constexpr, HALVES: gl.constexpr):
    lows: gl.constexpr = low_words(FORMAT, STEP)
    low_rows: gl.constexpr = ROWS if FORMAT != "pair4" else 1
    # what is not needed has a row
    rows_more: gl.constexpr = ROWS if HALVES == 2 else 1
    low_rows_more: gl.constexpr = low_rows if HALVES == 2 else 1
    return (
        gl.allocate_shared_memory(gl.int32, [ROWS, STEP // 8], turned(STEP // 8)),
        gl.allocate_shared_memory(gl.int32, [rows_more, STEP // 8], turned(STEP // 8)),
        gl.allocate_shared_memory(gl.int32, [low_rows, lows], turned(lows)),
        gl.allocate_shared_memory(gl.int32, [low_rows_more, lows], turned(lows)),
        gl.allocate_shared_memory(gl.int32, [ROWS, HALVES], turned(HALVES)),
    )


@gluon.jit
def _tokens(
    TOKENS: gl.constexpr, OTHERS: gl.constexpr, FACTORS: gl.constexpr, HALVES: gl.constexpr, LONG: gl.constexpr
):  # fmt: skip
    # terms below each other, or side by side
    terms: gl.constexpr = gl.NVMMASharedLayout(2 * HALF if LONG else HALF, 8, 2)
    wide: gl.constexpr = 2 * HALF if LONG else HALF
    entries: gl.constexpr = TOKENS if LONG else 2 * TOKENS
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    factors: gl.constexpr = width(TOKENS) if FACTORS else 1
    more: gl.constexpr = entries if HALVES == 2 else 8
    theirs: gl.constexpr = (OTHERS if LONG else 2 * OTHERS) if OTHERS else 8
    more_theirs: gl.constexpr = theirs if HALVES == 2 else 8
    their_factors: gl.constexpr = width(OTHERS) if FACTORS and OTHERS else 1
    return (
        gl.allocate_shared_memory(gl.float8e4nv, [1, entries, wide], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [1, entries, wide], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [1, more, wide], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [1, more, wide], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [1, theirs, wide], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [1, theirs, wide], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [1, more_theirs, wide], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [1, more_theirs, wide], terms),
        gl.allocate_shared_memory(gl.float32, [1, factors], plain),
        gl.allocate_shared_memory(gl.float32, [1, factors], plain),
        gl.allocate_shared_memory(gl.float32, [1, factors if HALVES == 2 else 1], plain),
        gl.allocate_shared_memory(gl.float32, [1, factors if HALVES == 2 else 1], plain),
        gl.allocate_shared_memory(gl.float32, [1, their_factors], plain),
        gl.allocate_shared_memory(gl.float32, [1, their_factors], plain),
        gl.allocate_shared_memory(gl.float32, [1, their_factors if HALVES == 2 else 1], plain),
        gl.allocate_shared_memory(gl.float32, [1, their_factors if HALVES == 2 else 1], plain),
    )


@gluon.jit
def start_words(buffers, planes, PLACE: gl.constexpr, wanted, FORMAT: gl.constexpr, HALVES: gl.constexpr):
    for half in gl.static_range(HALVES):
        words, low = buffers[at(WORDS + half, PLACE)], buffers[at(LOW + half, PLACE)]
        copy_words(words, low, planes, half, wanted, FORMAT)
    async_copy.async_copy_global_to_shared(buffers[at(SCALE, PLACE)], planes[2], mask=wanted)


@gluon.jit
def start_tokens(
    buffers, x, live, factors, factor_live, PLACE: gl.constexpr, wanted,
    FACTORS: gl.constexpr, BEGIN: gl.constexpr, END: gl.constexpr, TOKENS: gl.constexpr, OTHERS: gl.constexpr,
    ROWS_OF: gl.constexpr,
):  # fmt: skip
    """Ask for groups BEGIN to END of a step, whose first one is at `x` and `factors`.

    A token has ROWS_OF rows, two or (thinly) one.
    """
    for part in gl.static_range(2 if OTHERS > 0 else 1):
        for group in gl.static_range(BEGIN, END):
            to = buffers[at(TOKENS_OF + 4 * part + group, PLACE)].index(0)
            to = to.slice(0, ROWS_OF * (OTHERS if part else TOKENS), 0)
            async_copy.async_copy_global_to_shared(to, x[part] + 2 * HALF * group, mask=live[part] & wanted)
            if FACTORS:
                to = buffers[at(FACTOR_OF + 4 * part + group, PLACE)].index(0)
                to = to.slice(0, width(OTHERS if part else TOKENS), 0)
                async_copy.async_copy_global_to_shared(to, factors[part] + group, mask=factor_live[part] & wanted)


@gluon.jit
def begin_words(buffers, planes, steps, PLACES: gl.constexpr, FORMAT: gl.constexpr, HALVES: gl.constexpr):
    """Ask for the words of the first steps, and point behind them."""
    for first in gl.static_range(PLACES if HALVES == 1 else PLACES - 1):
        start_words(buffers, planes, first, first < steps, FORMAT, HALVES)
        planes = behind(planes, FORMAT, HALVES)
    return planes
