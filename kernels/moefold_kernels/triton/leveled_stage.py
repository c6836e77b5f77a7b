"""What a program of leveled.py holds in shared memory, a stage for each step of columns: planes and tokens."""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moefold_kernels.layout_pairs import MAGNITUDE_BITS, low_bits

STEP = gl.constexpr(128)
"""Columns of a step."""
HALF = gl.constexpr(64)
"""Columns of a group, and of one set of operands."""
WORDS, LOW, SCALE, TOKENS_OF = (gl.constexpr(i) for i in range(4))
"""Numbers of buffers: `words`, `low`, scales, two halves of either slot's tokens."""
_LOW_BITS = gl.constexpr({f: low_bits(f) for f in MAGNITUDE_BITS})


@gluon.constexpr_function
def low_words(format, columns):
    """Words of the plane `low` in so many columns; one where there is no such plane."""
    return max(1, columns * _LOW_BITS.value[format] // 32)


@gluon.constexpr_function
def plane_layout(words, warps):
    """The layout of a copy of a plane to shared memory: 16 bytes a thread, or 4 (scales)."""
    across = max(1, words // 4)
    return gl.BlockedLayout([1, min(words, 4)], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def buffers_of(
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr
):
    # each plane and each half of the tokens for itself: Triton puts a barrier between two copies to one allocation
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    turned: gl.constexpr = gl.NVMMASharedLayout(2 * HALF, 16, 2)
    others: gl.constexpr = TOKENS if PAIRED else 8
    lows: gl.constexpr = low_words(FORMAT, STEP)
    return (
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, STEP // 8], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS if FORMAT != "pair4" else 1, lows], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, 1], plain),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, HALF], turned),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, HALF], turned),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, others, HALF], turned),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, others, HALF], turned),
    )


@gluon.jit
def start_words(buffers, planes, stage, wanted, FORMAT: gl.constexpr):
    async_copy.async_copy_global_to_shared(buffers[WORDS].index(stage), planes[0], mask=wanted)
    if FORMAT != "pair4":
        async_copy.async_copy_global_to_shared(buffers[LOW].index(stage), planes[1], mask=wanted)
    async_copy.async_copy_global_to_shared(buffers[SCALE].index(stage), planes[2], mask=wanted)


@gluon.jit
def start_tokens(buffers, x, live, stage, wanted, PAIRED: gl.constexpr):
    for slot in gl.static_range(2 if PAIRED else 1):
        for half in gl.static_range(2):
            to = buffers[TOKENS_OF + 2 * slot + half].index(stage)
            async_copy.async_copy_global_to_shared(to, x[slot] + HALF * half, mask=live[slot] & wanted)
    async_copy.commit_group()


@gluon.jit
def begin_words(buffers, planes, steps, STAGES: gl.constexpr, FORMAT: gl.constexpr):
    """Ask for the words of the first steps, and point behind them."""
    w, low, scale = planes
    for first in gl.static_range(STAGES - 2):
        start_words(buffers, (w, low, scale), first, first < steps, FORMAT)
        w += STEP // 8
        if FORMAT != "pair4":
            low += low_words(FORMAT, STEP)
        scale += 1
    return w, low, scale
