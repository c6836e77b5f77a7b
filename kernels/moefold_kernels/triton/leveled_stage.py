"""What a program of leveled.py holds in shared memory, planes and tokens, of each step at a place.

Words lie in whole rows of 64 bytes, of which every other two are turned by a half, so that the four rows that half a
warp reads lie in different banks.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from moefold_kernels import layout_pairs
from moefold_kernels.layout_pairs import MAGNITUDE_BITS, low_bits

STEP = gl.constexpr(layout_pairs.STEP)
"""Columns of a step, and of a band's piece."""
BAND = gl.constexpr(layout_pairs.BAND)
"""Rows of a band: so many rows' words of a step lie behind one another."""
HALF = gl.constexpr(64)
"""Columns of a group."""
PART = gl.constexpr(32)
"""Columns of one set of operands."""
WORDS, LOW, SCALE, TOKENS_OF, EXTRA_OF, COUNT = (gl.constexpr(i) for i in (0, 1, 2, 3, 7, 11))
"""Numbers of a place's buffers: `words`, `low`, scales, two halves of either slot's tokens, of extra ones; of all."""
_LOW_BITS = gl.constexpr({f: low_bits(f) for f in MAGNITUDE_BITS})


@gluon.constexpr_function
def low_words(format, columns):
    """Words of the plane `low` in so many columns; one where there is no such plane."""
    return max(1, columns * _LOW_BITS.value[format] // 32)


@gluon.constexpr_function
def plane_layout(words, warps):
    """The layout of a copy of a plane to shared memory: 16 bytes a thread."""
    across = max(1, words // 4)
    return gl.BlockedLayout([1, min(words, 4)], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def scale_layout(halves, warps):
    """The layout of a copy of scales [rows, halves]: 4 bytes a thread, rows behind one another."""
    return gl.BlockedLayout([1, 1], [32, 1], [warps // halves, halves], [0, 1])


@gluon.constexpr_function
def turned(words):
    """Rows of so many words: a warp's reading of them, a few words a thread, has no bank twice."""
    vector, phase = {16: (8, 2), 8: (4, 4)}.get(words, (1, 1))
    return gl.SwizzledSharedLayout(vector, phase, 2 if vector > 1 else 1, [1, 0])


@gluon.constexpr_function
def at(number, place):
    """A buffer's number among those of all places."""
    return place * COUNT.value + number


@gluon.jit
def buffers_of(
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr, FORMAT: gl.constexpr,
    PAIRED: gl.constexpr,
):  # fmt: skip
    # each by itself: Triton puts a barrier between copies into an allocation and whatever else concerns it
    made = ()
    for _ in gl.static_range(PLACES):
        made = made + _place(ROWS, TOKENS, EXTRA, FORMAT, PAIRED)
    return made


@gluon.jit
def _place(ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr):
    tokens: gl.constexpr = gl.NVMMASharedLayout(2 * HALF, 16, 2)
    others: gl.constexpr = TOKENS if PAIRED else 8
    more: gl.constexpr = max(EXTRA, 8)
    most: gl.constexpr = more if PAIRED else 8
    lows: gl.constexpr = low_words(FORMAT, STEP)
    return (
        gl.allocate_shared_memory(gl.int32, [ROWS, STEP // 8], turned(STEP // 8)),
        gl.allocate_shared_memory(gl.int32, [ROWS if FORMAT != "pair4" else 1, lows], turned(lows)),
        gl.allocate_shared_memory(gl.int32, [ROWS, 1], turned(1)),
        gl.allocate_shared_memory(gl.bfloat16, [1, TOKENS, HALF], tokens),
        gl.allocate_shared_memory(gl.bfloat16, [1, TOKENS, HALF], tokens),
        gl.allocate_shared_memory(gl.bfloat16, [1, others, HALF], tokens),
        gl.allocate_shared_memory(gl.bfloat16, [1, others, HALF], tokens),
        gl.allocate_shared_memory(gl.bfloat16, [1, more, HALF], tokens),
        gl.allocate_shared_memory(gl.bfloat16, [1, more, HALF], tokens),
        gl.allocate_shared_memory(gl.bfloat16, [1, most, HALF], tokens),
        gl.allocate_shared_memory(gl.bfloat16, [1, most, HALF], tokens),
    )


@gluon.jit
def copy_words(words, low, planes, half: gl.constexpr, wanted, FORMAT: gl.constexpr):
    """Ask for STEP columns of the planes, the `half`-th behind `planes`."""
    async_copy.async_copy_global_to_shared(words, planes[0] + BAND * (STEP // 8) * half, mask=wanted)
    if FORMAT != "pair4":
        async_copy.async_copy_global_to_shared(low, planes[1] + BAND * low_words(FORMAT, STEP) * half, mask=wanted)


@gluon.jit
def behind(planes, FORMAT: gl.constexpr, HALVES: gl.constexpr):
    """The planes of the next step of HALVES * STEP columns."""
    w, low, scale = planes
    w += BAND * (STEP // 8) * HALVES
    if FORMAT != "pair4":
        low += BAND * low_words(FORMAT, STEP) * HALVES
    scale += BAND * HALVES
    return w, low, scale


@gluon.jit
def start_words(buffers, planes, PLACE: gl.constexpr, wanted, FORMAT: gl.constexpr):
    copy_words(buffers[at(WORDS, PLACE)], buffers[at(LOW, PLACE)], planes, 0, wanted, FORMAT)
    async_copy.async_copy_global_to_shared(buffers[at(SCALE, PLACE)], planes[2], mask=wanted)


@gluon.jit
def start_tokens(
    buffers, x, live, HALF_OF: gl.constexpr, PLACE: gl.constexpr, wanted, TOKENS: gl.constexpr, EXTRA: gl.constexpr,
    PAIRED: gl.constexpr,
):  # fmt: skip
    """Half a step's; `x` and `live` are of the first and the second slot's tokens, then of their extra ones."""
    for slot in gl.static_range(2 if PAIRED else 1):
        to = buffers[at(TOKENS_OF + 2 * slot + HALF_OF, PLACE)].index(0).slice(0, TOKENS, 0)
        async_copy.async_copy_global_to_shared(to, x[slot], mask=live[slot] & wanted)
        if EXTRA:
            to = buffers[at(EXTRA_OF + 2 * slot + HALF_OF, PLACE)].index(0).slice(0, EXTRA, 0)
            async_copy.async_copy_global_to_shared(to, x[2 + slot], mask=live[2 + slot] & wanted)


@gluon.jit
def begin_words(buffers, planes, steps, PLACES: gl.constexpr, FORMAT: gl.constexpr):
    """Ask for the words of the first steps, and point behind them."""
    for first in gl.static_range(PLACES):
        start_words(buffers, planes, first, first < steps, FORMAT)
        planes = behind(planes, FORMAT, 1)
    return planes
