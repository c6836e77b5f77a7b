"""From planes in shared memory to operands in registers, for leveled.py.

The words of a plane are read as the product wants rows, so that nothing moves between threads afterwards; assembly
makes four positions of a row, or a few times four, of both slots or of one.
"""

# ruff: noqa: RUF005 - the compiler knows tuples' `+`, and no `*given`
# mypy: disable-error-code=assignment
# (tuples that grow)

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl

from moefold_kernels.layout_pairs import MAGNITUDE_BITS
from moefold_kernels.triton import leveled_decode
from moefold_kernels.triton.leveled_decode import SLOT_SIGNS
from moefold_kernels.triton.leveled_stage import HALF, LOW, SCALE, WORDS, at, low_words

_CODE = gl.constexpr(
    {(f, n): (leveled_decode.assembly(f, n), leveled_decode.constraints(f, n)) for f in MAGNITUDE_BITS for n in (1, 2)}
)


@gluon.constexpr_function
def code(format, slots, part):
    """The assembly (part 0) and its constraints (1)."""
    return _CODE.value[format, slots][part]


@gluon.constexpr_function
def signs_of(slot, number):
    return SLOT_SIGNS.value[2 * slot + number]


@gluon.constexpr_function
def _bits(size):
    return [1 << bit for bit in range(size.bit_length() - 1)]


@gluon.constexpr_function
def rows_layout(rows, words, warps):
    """Words [rows, words] as the product wants rows: the four threads of a group have the same ones."""
    registers = (
        [[0, bit] for bit in _bits(words)] + [[8, 0]] + [[16 * warps * bit, 0] for bit in _bits(rows // warps // 16)]
    )
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16 * bit, 0] for bit in _bits(warps)], [], [rows, words])


@gluon.constexpr_function
def units_layout(rows, warps):
    """[rows, 4 units of 16 columns, thread of a group]."""
    registers = [[0, 1, 0], [0, 2, 0], [8, 0, 0]] + [[16 * warps * bit, 0, 0] for bit in _bits(rows // warps // 16)]
    lanes = [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16 * bit, 0, 0] for bit in _bits(warps)], [], [rows, 4, 4])


@gluon.jit
def _operand(low, high, ROWS: gl.constexpr, left: gl.constexpr):
    """bf16 [ROWS, HALF] of pairs of them [ROWS, 4, 4]: columns 2 t and 2 t + 1 of every 16, then 8 more."""
    pairs = gl.reshape(gl.permute(gl.join(low, high), (0, 1, 3, 2)), (ROWS, HALF // 2))
    twice = gl.reshape(gl.join(pairs, pairs), (ROWS, HALF))
    made = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [twice], dtype=gl.bfloat16, is_pure=True, pack=2)
    return gl.convert_layout(made, left, assert_trivial=True)


@gluon.jit
def _pairwise(plane, WORDS: gl.constexpr, ROWS: gl.constexpr, units: gl.constexpr):
    """The two words of every 16 columns, of a plane with two."""
    first, second = gl.split(gl.reshape(plane, (ROWS, WORDS // 2, 2)))
    layout: gl.constexpr = gl.SliceLayout(2, units)
    first = gl.convert_layout(first, layout, assert_trivial=True)
    second = gl.convert_layout(second, layout, assert_trivial=True)
    return gl.expand_dims(first, 2), gl.expand_dims(second, 2)


@gluon.jit
def _scaled(level, scale):
    return gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [level, scale], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _of_rows(values):
    return gl.expand_dims(gl.expand_dims(values, 1), 2)


@gluon.jit
def _scales(buffers, PLACE: gl.constexpr, half: gl.constexpr, ROWS: gl.constexpr, units: gl.constexpr):
    """Each row's scale of a group, twice in an integer."""
    both = buffers[at(SCALE, PLACE)].load(rows_layout(ROWS, 1, gl.num_warps()))
    both = gl.reshape(both, (ROWS,))
    both = gl.convert_layout(both, gl.SliceLayout(1, gl.SliceLayout(2, units)), assert_trivial=True)
    scale = (both >> 16) & 0xFFFF if half else both & 0xFFFF
    return scale | scale << 16


@gluon.jit
def _of_half(buffers, number: gl.constexpr, half: gl.constexpr, ROWS: gl.constexpr, words: gl.constexpr):
    """A group's words of the plane in buffer `number`."""
    layout: gl.constexpr = rows_layout(ROWS, words, gl.num_warps())
    return buffers[number].slice(words * half, words, 1).load(layout)


@gluon.jit
def _lows(
    buffers, PLACE: gl.constexpr, half: gl.constexpr, ROWS: gl.constexpr, FORMAT: gl.constexpr, units: gl.constexpr
):
    """The words of `low` of every 16 columns of a group: two (pair8), one (pair6), or one, its bits moved (pair5)."""
    words: gl.constexpr = low_words(FORMAT, HALF)
    lows = _of_half(buffers, at(LOW, PLACE), half, ROWS, words)
    if FORMAT == "pair8":
        found = _pairwise(lows, 8, ROWS, units)
    else:
        if FORMAT == "pair5":
            lows = gl.reshape(gl.join(lows, lows >> 2), (ROWS, 4))
        found = (gl.expand_dims(gl.convert_layout(lows, gl.SliceLayout(2, units), assert_trivial=True), 2),)
    return found


@gluon.jit
def decoded(
    buffers, PLACE: gl.constexpr, gather, signs, tables,
    half: gl.constexpr, ROWS: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr, left: gl.constexpr,
):  # fmt: skip
    """The operands of one group: of both slots, or of one, twice."""
    units: gl.constexpr = units_layout(ROWS, gl.num_warps())
    words = _of_half(buffers, at(WORDS, PLACE), half, ROWS, 8)
    scale = _scales(buffers, PLACE, half, ROWS, units)
    given = _pairwise(words, 8, ROWS, units) + (gather,)
    if FORMAT != "pair4":
        given = given + _lows(buffers, PLACE, half, ROWS, FORMAT, units) + (_of_rows(scale),)
    if not PAIRED:
        given = given + signs
    if FORMAT == "pair4":
        given = given + (_of_rows(_scaled(tables[0], scale)), _of_rows(_scaled(tables[1], scale)))
    else:
        given = given + (_of_rows(tables[0]), _of_rows(tables[1]), _of_rows(tables[2]), _of_rows(tables[3]))
    if FORMAT == "pair8":
        given = given + (_of_rows(tables[4]), _of_rows(tables[5]), _of_rows(tables[6]), _of_rows(tables[7]))
    if PAIRED:
        a, b, c, d = gl.inline_asm_elementwise(
            code(FORMAT, 2, 0), code(FORMAT, 2, 1), given,
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return _operand(a, b, ROWS, left), _operand(c, d, ROWS, left)
    a, b = gl.inline_asm_elementwise(
        code(FORMAT, 1, 0), code(FORMAT, 1, 1), given, dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    own = _operand(a, b, ROWS, left)
    return own, own
