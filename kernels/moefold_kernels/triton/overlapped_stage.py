"""What a program of overlapped.py or overlapped_pair.py holds in shared memory, of each step at a place.

Places are buffers of their own, not parts of one (docs/kernels.md). A place has words, then each slot's tokens, then
each slot's extra ones; SLOTS is 1 or 2.
"""

# ruff: noqa: RUF005 - the compiler knows tuples' `+`, and no `*given`
# mypy: disable-error-code=assignment
# (tuples that grow)

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@gluon.constexpr_function
def words_of(place, slots):
    """The number of a place's words among all buffers."""
    return place * (1 + 2 * slots)


@gluon.constexpr_function
def tokens_of(place, slots, slot):
    return words_of(place, slots) + 1 + slot


@gluon.constexpr_function
def extra_of(place, slots, slot):
    return words_of(place, slots) + 1 + slots + slot


@gluon.constexpr_function
def unrolled(places):
    """Steps in a loop's body: places in turn, and an even number, since two sets of operand registers take turns."""
    return places if places % 2 == 0 else 2 * places


@gluon.jit
def buffers_of(
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr, PLACES: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    turned: gl.constexpr = gl.NVMMASharedLayout(2 * COLUMNS, 16, 2)
    made = ()
    for _ in gl.static_range(PLACES):
        made = made + (gl.allocate_shared_memory(gl.int16, [ROWS, COLUMNS], turned),)
        for _ in gl.static_range(SLOTS):
            made = made + (gl.allocate_shared_memory(gl.bfloat16, [1, TOKENS, COLUMNS], turned),)
        for _ in gl.static_range(SLOTS):
            made = made + (gl.allocate_shared_memory(gl.bfloat16, [1, max(EXTRA, 8), COLUMNS], turned),)
    return made


@gluon.jit
def start_words(buffers, w, PLACE: gl.constexpr, SLOTS: gl.constexpr, wanted):
    """Ask for one tile of words."""
    async_copy.async_copy_global_to_shared(buffers[words_of(PLACE, SLOTS)], w, mask=wanted)
    async_copy.commit_group()


@gluon.jit
def begin_words(buffers, w, steps, COLUMNS: gl.constexpr, PLACES: gl.constexpr, SLOTS: gl.constexpr):
    """Ask for the words of the first steps, and point behind them."""
    for step in gl.static_range(PLACES):
        start_words(buffers, w, step, SLOTS, step < steps)
        w += COLUMNS
    return w


@gluon.jit
def start_tokens(
    buffers, x, live, PLACE: gl.constexpr, SLOTS: gl.constexpr, wanted, TOKENS: gl.constexpr, EXTRA: gl.constexpr
):
    """Ask for one tile of tokens; `x` and `live` are of each slot's, then of their extra ones."""
    for slot in gl.static_range(SLOTS):
        to = buffers[tokens_of(PLACE, SLOTS, slot)].index(0).slice(0, TOKENS, 0)
        async_copy.async_copy_global_to_shared(to, x[slot], mask=live[slot] & wanted)
        if EXTRA:
            to = buffers[extra_of(PLACE, SLOTS, slot)].index(0)
            async_copy.async_copy_global_to_shared(to, x[SLOTS + slot], mask=live[SLOTS + slot] & wanted)
    async_copy.commit_group()
