"""From words in registers to bf16 operands in registers, for leveled.py.

Assembly makes eight positions of a row, of both slots or of one, from a thread's own word (leveled_words.py); nothing
moves between threads afterwards. In each of its steps a product wants columns 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of 16
from thread t of four, and those are the positions that its words hold (layout_pairs.ORDER).
"""

# ruff: noqa: RUF005 - the compiler knows tuples' `+`, and no `*given`
# mypy: disable-error-code=assignment
# (tuples that grow)

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl

from moefold_kernels.layout_pairs import MAGNITUDE_BITS
from moefold_kernels.levels import FACTORS
from moefold_kernels.triton import leveled_decode
from moefold_kernels.triton.leveled_stage import LOW, PART, SCALE, WORDS, at
from moefold_kernels.triton.leveled_words import rows_layout, word_layout, words_of

_CODE = gl.constexpr(
    {(f, n): (leveled_decode.assembly(f, n), leveled_decode.constraints(f, n)) for f in MAGNITUDE_BITS for n in (1, 2)}
)
_SCALE = gl.constexpr(
    {(f, g, n): leveled_decode.scale_assembly(f, g, n) for f in MAGNITUDE_BITS for g in (0, 1) for n in (1, 2)}
)
_FACTORS = gl.constexpr(FACTORS)


@gluon.constexpr_function
def code(format, slots, part):
    """The assembly (part 0) and its constraints (1)."""
    return _CODE.value[format, slots][part]


@gluon.constexpr_function
def scale_code(format, group, slots):
    return _SCALE.value[format, group, slots]


@gluon.jit
def read(buffers, PLACE: gl.constexpr, ROWS: gl.constexpr, FORMAT: gl.constexpr):
    """A step's words of a thread (leveled_words.words_of), and each row's two scales in an integer."""
    layout: gl.constexpr = gl.SliceLayout(1, word_layout(ROWS, gl.num_warps()))
    w0, w1, low0, low1 = words_of(buffers[at(WORDS, PLACE)], buffers[at(LOW, PLACE)], ROWS, FORMAT)
    scales = gl.reshape(buffers[at(SCALE, PLACE)].load(rows_layout(ROWS, 1, gl.num_warps())), (ROWS,))
    return w0, w1, low0, low1, gl.convert_layout(scales, layout, assert_trivial=True)


@gluon.jit
def _word(words, number: gl.constexpr, ROWS: gl.constexpr):
    """The first or the second of a group's words [ROWS, thread], of both [ROWS, word, thread]."""
    first, second = gl.split(gl.permute(words, (0, 2, 1)))
    layout: gl.constexpr = word_layout(ROWS, gl.num_warps())
    return gl.convert_layout(second if number else first, layout, assert_trivial=True)


@gluon.jit
def _operand(made, ROWS: gl.constexpr, left: gl.constexpr):
    """bf16 [ROWS, PART] of a word's four registers [ROWS, thread]: even and odd positions of each four."""
    even, odd = gl.join(made[0], made[2]), gl.join(made[1], made[3])  # [ROWS, thread, four]
    pairs = gl.reshape(gl.permute(gl.join(even, odd), (0, 2, 3, 1)), (ROWS, PART // 2))
    twice = gl.reshape(gl.join(pairs, pairs), (ROWS, PART))
    both = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [twice], dtype=gl.bfloat16, is_pure=True, pack=2)
    return gl.convert_layout(both, left, assert_trivial=True)


@gluon.jit
def scale_of(words, group: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr):
    """The scales [ROWS, 1] of a group, of what `read` found, as assembly takes them."""
    scale = gl.inline_asm_elementwise(
        scale_code(FORMAT, group, 2 if PAIRED else 1), "=r,r", [words[4]], dtype=gl.int32, is_pure=True, pack=1
    )
    return gl.expand_dims(scale, 1)


@gluon.jit
def decoded(
    words, scale, group: gl.constexpr, number: gl.constexpr, tables, states,
    ROWS: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr, left: gl.constexpr,
):  # fmt: skip
    """The operands [ROWS, PART] of a group's word: of both slots, or of one, twice.

    `words` of `read`, `scale` of `scale_of`; registers of levels and of states.
    """
    given = (_word(words[group], number, ROWS),)
    if FORMAT != "pair4":
        given = given + (_word(words[2 + group], number, ROWS),)
    given = given + (scale,) + tables + states
    if PAIRED:
        made = gl.inline_asm_elementwise(
            code(FORMAT, 2, 0), code(FORMAT, 2, 1), given,
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        own = _operand((made[0], made[1], made[2], made[3]), ROWS, left)
        return own, _operand((made[4], made[5], made[6], made[7]), ROWS, left)
    made = gl.inline_asm_elementwise(
        code(FORMAT, 1, 0), code(FORMAT, 1, 1), given, dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
    own = _operand(made, ROWS, left)
    return own, own


@gluon.jit
def tables_of(levels, up, slot, ROWS: gl.constexpr, PAIRED: gl.constexpr, FORMAT: gl.constexpr):
    """Registers of levels and of states for `decoded`; rows 8 to 15 of every 16 have the levels at `levels + up`."""
    rows: gl.constexpr = word_layout(ROWS, gl.num_warps())
    thread = levels + gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, rows)), 0)  # [1, 4]: each has its own
    tables = ()
    if FORMAT != "pair8":
        row = gl.arange(0, ROWS, gl.SliceLayout(1, rows))
        own = thread + gl.where(gl.expand_dims(row, 1) % 16 >= 8, up, 0)
        tables = gl.load(own), gl.load(own + 4), gl.load(own + 8), gl.load(own + 12)
    elif not PAIRED:
        own = thread + 8 * slot
        tables = gl.load(own), gl.load(own + 4)
    first = 16 if PAIRED else 16 + 8 * slot
    if PAIRED and FORMAT == "pair8":
        first = _FACTORS
    states = gl.load(thread + first), gl.load(thread + first + 4)
    if PAIRED:
        states = states + (gl.load(thread + first + 8), gl.load(thread + first + 12))
    return tables, states


@gluon.jit
def right(buffers, number: gl.constexpr, nothing, part: gl.constexpr, TOKENS: gl.constexpr):
    """Tokens of the columns of a set of operands, turned."""
    found = buffers[number].index(nothing).slice(0, TOKENS, 0)
    return found.slice(PART * part, PART, 1).permute((1, 0))
