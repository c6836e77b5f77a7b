"""What a program of e4m3.py holds in shared memory: planes, tokens and their factors of several steps.

A step is 256 columns where a row has a number of those, else 128 (HALVES: 2 or 1). Tokens and factors of STAGES steps
are held, and planes of one less: products read tokens until the next step's first ones start, but a step's words are in
registers before its last products do, so that their place is free one barrier earlier.

Words lie in whole rows of 64 bytes, of which every other two are turned by a half, so that the four rows that a quarter
of a warp reads lie in different banks. A token's values of a group of 64 columns are 128 bytes of two terms
(e4m3_tokens.py), here as 2 * TOKENS rows: first terms before second ones.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moefold_kernels.triton.leveled_stage import HALF, STEP, low_words

WORDS, LOW, SCALE, TOKENS_OF, FACTOR_OF = (gl.constexpr(i) for i in (0, 2, 4, 5, 13))
"""Numbers of buffers: two halves of `words` and of `low`, scales, four groups of either slot's tokens, and factors.

A step of 128 columns has the first of the halves and the first two of the groups.
"""
FEW = gl.constexpr(8)
"""Up to so many tokens both terms are one product, twice as wide: narrower ones take as long."""


@gluon.constexpr_function
def width(tokens):
    """Columns of a product."""
    return 2 * tokens if tokens <= FEW.value else tokens


@gluon.constexpr_function
def product_layout(tokens, warps):
    """The layout of sums [rows, width]: a warp has 16 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, width(tokens), 32])


@gluon.constexpr_function
def turned(words):
    """Rows of so many words: a warp's reading of them, a few words a thread, has no bank twice."""
    vector, phase = {16: (8, 2), 8: (4, 4)}.get(words, (1, 1))
    return gl.SwizzledSharedLayout(vector, phase, 2 if vector > 1 else 1, [1, 0])


@gluon.constexpr_function
def token_layout(warps):
    """The layout of a copy of tokens [2 * TOKENS, 64]: 16 bytes a thread."""
    return gl.BlockedLayout([1, 16], [8, 4], [warps, 1], [1, 0])


@gluon.constexpr_function
def factor_layout(warps):
    """The layout of a copy of tokens' scales."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def buffers_of(
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr,
    FACTORS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    # each by itself: Triton puts a barrier between two copies into one allocation
    terms: gl.constexpr = gl.NVMMASharedLayout(HALF, 8, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lows: gl.constexpr = low_words(FORMAT, STEP)
    low_rows: gl.constexpr = ROWS if FORMAT != "pair4" else 1
    entries: gl.constexpr = 2 * TOKENS
    factors: gl.constexpr = width(TOKENS) if FACTORS else 1
    held: gl.constexpr = STAGES - 1  # planes': words are in registers before a step's last products start
    # what is not needed has a stage
    held_more: gl.constexpr = held if HALVES == 2 else 1
    rows_more: gl.constexpr = ROWS if HALVES == 2 else 1
    low_rows_more: gl.constexpr = low_rows if HALVES == 2 else 1
    more: gl.constexpr = STAGES if HALVES == 2 else 1
    theirs: gl.constexpr = STAGES if PAIRED else 1
    more_theirs: gl.constexpr = STAGES if PAIRED and HALVES == 2 else 1
    return (
        gl.allocate_shared_memory(gl.int32, [held, ROWS, STEP // 8], turned(STEP // 8)),
        gl.allocate_shared_memory(gl.int32, [held_more, rows_more, STEP // 8], turned(STEP // 8)),
        gl.allocate_shared_memory(gl.int32, [held, low_rows, lows], turned(lows)),
        gl.allocate_shared_memory(gl.int32, [held_more, low_rows_more, lows], turned(lows)),
        gl.allocate_shared_memory(gl.int32, [held, ROWS, HALVES], turned(HALVES)),
        gl.allocate_shared_memory(gl.float8e4nv, [STAGES, entries, HALF], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [STAGES, entries, HALF], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [more, entries, HALF], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [more, entries, HALF], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [theirs, entries, HALF], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [theirs, entries, HALF], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [more_theirs, entries, HALF], terms),
        gl.allocate_shared_memory(gl.float8e4nv, [more_theirs, entries, HALF], terms),
        gl.allocate_shared_memory(gl.float32, [STAGES, factors], plain),
        gl.allocate_shared_memory(gl.float32, [STAGES, factors], plain),
        gl.allocate_shared_memory(gl.float32, [more, factors], plain),
        gl.allocate_shared_memory(gl.float32, [more, factors], plain),
        gl.allocate_shared_memory(gl.float32, [theirs, factors], plain),
        gl.allocate_shared_memory(gl.float32, [theirs, factors], plain),
        gl.allocate_shared_memory(gl.float32, [more_theirs, factors], plain),
        gl.allocate_shared_memory(gl.float32, [more_theirs, factors], plain),
    )


@gluon.jit
def start_words(buffers, planes, stage, wanted, FORMAT: gl.constexpr, HALVES: gl.constexpr):
    for half in gl.static_range(HALVES):
        to = buffers[WORDS + half].index(stage)
        async_copy.async_copy_global_to_shared(to, planes[0] + STEP // 8 * half, mask=wanted)
        if FORMAT != "pair4":
            to = buffers[LOW + half].index(stage)
            async_copy.async_copy_global_to_shared(to, planes[1] + low_words(FORMAT, STEP) * half, mask=wanted)
    async_copy.async_copy_global_to_shared(buffers[SCALE].index(stage), planes[2], mask=wanted)


@gluon.jit
def start_tokens(
    buffers, x, live, factors, factor_live, stage, wanted,
    PAIRED: gl.constexpr, FACTORS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    for slot in gl.static_range(2 if PAIRED else 1):
        for group in gl.static_range(2 * HALVES):
            to = buffers[TOKENS_OF + 4 * slot + group].index(stage)
            async_copy.async_copy_global_to_shared(to, x[slot] + 2 * HALF * group, mask=live[slot] & wanted)
            if FACTORS:
                to = buffers[FACTOR_OF + 4 * slot + group].index(stage)
                async_copy.async_copy_global_to_shared(to, factors[slot] + group, mask=factor_live[slot] & wanted)
    async_copy.commit_group()


@gluon.jit
def begin_words(buffers, planes, steps, STAGES: gl.constexpr, FORMAT: gl.constexpr, HALVES: gl.constexpr):
    """Ask for the words of the first steps, and point behind them."""
    w, low, scale = planes
    for first in gl.static_range(STAGES - 2):
        start_words(buffers, (w, low, scale), first, first < steps, FORMAT, HALVES)
        w += STEP // 8 * HALVES
        if FORMAT != "pair4":
            low += low_words(FORMAT, STEP) * HALVES
        scale += HALVES
    return w, low, scale
