"""What a program of leveled.py holds in shared memory, a stage for each step of columns: planes and tokens."""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moefold_kernels.layout_pairs import MAGNITUDE_BITS, low_bits
from moefold_kernels.triton.leveled_table import size

STEP = gl.constexpr(128)
"""Columns of a step."""
HALF = gl.constexpr(64)
"""Columns of a group, and of one set of operands."""
WORDS, LOW, SCALE, TOKENS_OF, PADDING = (gl.constexpr(i) for i in (0, 2, 4, 5, 9))
"""Numbers of buffers: two halves of `words`, two of `low`, scales, two halves of either slot's tokens, nothing."""
SMALL = gl.constexpr(48 * 1024)
"""Bytes that Triton has to ask for more than, before it lets a kernel have more than these with the table."""
_LOW_BITS = gl.constexpr({f: low_bits(f) for f in MAGNITUDE_BITS})


@gluon.constexpr_function
def low_words(format, columns):
    """Words of the plane `low` in so many columns; one where there is no such plane."""
    return max(1, columns * _LOW_BITS.value[format] // 32)


@gluon.constexpr_function
def halved(tokens, looked):
    """Whether the two groups of a step lie apart in shared memory: rows of 32 bytes, four of which have other banks.

    Each copy then is of half as many bytes of twice as many rows. Where nothing is looked up, shared memory does not
    bind, and whole rows were faster (by 6 to 10 % where memory binds); with eight tokens only halves were measured.
    """
    return looked > 0 or tokens < 16


@gluon.constexpr_function
def words_held(apart):
    """Words of a row in one allocation."""
    return STEP.value // 16 if apart else STEP.value // 8


@gluon.constexpr_function
def low_held(format, apart):
    """The same of the plane `low`, of which only pair8's is as wide as `words`."""
    return min(low_words(format, STEP.value), words_held(apart))


@gluon.constexpr_function
def _padding(rows, tokens, stages, format, paired, looked):
    """KB that bring what Triton asks for above SMALL, where a table, of which it knows nothing, is too much with it."""
    bits = 4 + _LOW_BITS.value[format]
    bytes = stages * (rows * (STEP.value * bits // 8 + 4) + tokens * 2 * STEP.value * (2 if paired else 1))
    large = looked and bytes + 1024 + size(format) > SMALL.value
    return (max(SMALL.value - bytes, 0) if large else 0) // 1024 + 1


@gluon.constexpr_function
def plane_layout(words, warps):
    """The layout of a copy of a plane to shared memory: 16 bytes a thread, or 4 (scales)."""
    across = max(1, words // 4)
    return gl.BlockedLayout([1, min(words, 4)], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def buffers_of(
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr,
    LOOKED: gl.constexpr,
):  # fmt: skip
    # each plane and each half of the tokens for itself: Triton puts a barrier between two copies to one allocation
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    turned: gl.constexpr = gl.NVMMASharedLayout(2 * HALF, 16, 2)
    others: gl.constexpr = TOKENS if PAIRED else 8
    apart: gl.constexpr = halved(TOKENS, LOOKED)
    w: gl.constexpr = words_held(apart)
    lows: gl.constexpr = low_held(FORMAT, apart)
    return (
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, w], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS if apart else 1, w], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS if FORMAT != "pair4" else 1, lows], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS if FORMAT == "pair8" and apart else 1, lows], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, 1], plain),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, HALF], turned),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, HALF], turned),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, others, HALF], turned),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, others, HALF], turned),
        gl.allocate_shared_memory(
            gl.int32,
            [_padding(ROWS, TOKENS, STAGES, FORMAT, PAIRED, LOOKED), 256],
            gl.SwizzledSharedLayout(1, 1, 1, [0]),
        ),
    )


@gluon.jit
def start_words(buffers, planes, stage, wanted, FORMAT: gl.constexpr, APART: gl.constexpr):
    for half in gl.static_range(2 if APART else 1):
        async_copy.async_copy_global_to_shared(buffers[WORDS + half].index(stage), planes[0] + 8 * half, mask=wanted)
    if FORMAT != "pair4":
        async_copy.async_copy_global_to_shared(buffers[LOW].index(stage), planes[1], mask=wanted)
    if FORMAT == "pair8" and APART:
        async_copy.async_copy_global_to_shared(buffers[LOW + 1].index(stage), planes[1] + 8, mask=wanted)
    async_copy.async_copy_global_to_shared(buffers[SCALE].index(stage), planes[2], mask=wanted)


@gluon.jit
def start_tokens(buffers, x, live, stage, wanted, PAIRED: gl.constexpr):
    for slot in gl.static_range(2 if PAIRED else 1):
        for half in gl.static_range(2):
            to = buffers[TOKENS_OF + 2 * slot + half].index(stage)
            async_copy.async_copy_global_to_shared(to, x[slot] + HALF * half, mask=live[slot] & wanted)
    async_copy.commit_group()


@gluon.jit
def begin_words(buffers, planes, steps, STAGES: gl.constexpr, FORMAT: gl.constexpr, APART: gl.constexpr):
    """Ask for the words of the first steps, and point behind them."""
    w, low, scale = planes
    for first in gl.static_range(STAGES - 2):
        start_words(buffers, (w, low, scale), first, first < steps, FORMAT, APART)
        w += STEP // 8
        if FORMAT != "pair4":
            low += low_words(FORMAT, STEP)
        scale += 1
    return w, low, scale
