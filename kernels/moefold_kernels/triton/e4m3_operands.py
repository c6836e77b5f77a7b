"""From words in registers to e4m3 operands in registers, for e4m3.py.

Of a group of 64 columns thread t of the four that share a row has positions 16 t to 16 t + 15 (leveled_words.py). A
product wants from it, in each of its two steps s, four numbers twice (u), so position 16 t + 8 s + 4 u + j is number
32 s + 16 u + 4 t + j of the product, and tokens are stored in that order: layout_pairs.ORDER's column
32 s + 16 u + 8 h + 2 t + e, of position 16 t + 8 s + 4 u + 2 e + h, at number 32 s + 16 u + 4 t + 2 e + h.
"""

# mypy: disable-error-code=assignment

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl

from moefold_kernels.triton import e4m3_decode
from moefold_kernels.triton.e4m3_stage import SCALE, at
from moefold_kernels.triton.leveled_stage import HALF
from moefold_kernels.triton.leveled_words import rows_layout

_CODE = gl.constexpr(
    {(f, n): (e4m3_decode.assembly(f, n), e4m3_decode.constraints(f, n)) for f in e4m3_decode.TABLES for n in (1, 2)}
)


@gluon.constexpr_function
def code(format, slots, part):
    """The assembly (part 0) and its constraints (1)."""
    return _CODE.value[format, slots][part]


@gluon.jit
def scales_of(buffers, PLACE: gl.constexpr, ROWS: gl.constexpr, HALVES: gl.constexpr, layout: gl.constexpr):
    """Each row's scales of a step, two in an integer: of 128 columns, and of the 128 behind them or the first again."""
    both = buffers[at(SCALE, PLACE)].load(rows_layout(ROWS, HALVES, gl.num_warps()))
    if HALVES == 2:
        first, second = gl.split(both)
    else:
        first = gl.reshape(both, (ROWS,))
        second = first
    return gl.convert_layout(first, layout, assert_trivial=True), gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def scale_of(both, group: gl.constexpr):
    """The first or the second as float32."""
    bits = both & -65536 if group else both << 16
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _operand(first, second, ROWS: gl.constexpr, left: gl.constexpr):
    """e4m3 [ROWS, HALF] of fours of them [ROWS, s, thread], of u = 0 and u = 1."""
    fours = gl.reshape(gl.permute(gl.join(first, second), (0, 1, 3, 2)), (ROWS, HALF // 4))
    twice = gl.reshape(gl.join(fours, fours), (ROWS, HALF // 2))
    each = gl.reshape(gl.join(twice, twice), (ROWS, HALF))
    made = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [each], dtype=gl.int8, is_pure=True, pack=4)
    return gl.convert_layout(made.to(gl.float8e4nv, bitcast=True), left, assert_trivial=True)


@gluon.jit
def decoded(
    word, low, levels, states, ROWS: gl.constexpr, FORMAT: gl.constexpr, PAIRED: gl.constexpr, left: gl.constexpr
):  # fmt: skip
    """The operands of one group: of both slots, or of one, twice. `levels` and `states` are tuples of registers."""
    given = (word, levels[0])
    if FORMAT != "pair4":
        given = (word, low, levels[0], levels[1])
    given = given + states
    if PAIRED:
        a, b, c, d = gl.inline_asm_elementwise(
            code(FORMAT, 2, 0), code(FORMAT, 2, 1), given, dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        return _operand(a, b, ROWS, left), _operand(c, d, ROWS, left)
    a, b = gl.inline_asm_elementwise(
        code(FORMAT, 1, 0), code(FORMAT, 1, 1), given, dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    own = _operand(a, b, ROWS, left)
    return own, own
