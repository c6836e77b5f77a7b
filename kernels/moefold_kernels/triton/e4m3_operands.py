"""From planes in shared memory to e4m3 operands in registers, for e4m3.py.

Of a group of 64 columns thread t of the four that share a row has columns 16 t to 16 t + 15, which are words of its own
in every plane: no byte is read twice. A product wants from it, in each of its two steps s, four numbers twice (u), so
column 16 t + 8 s + 4 u + j is number 32 s + 16 u + 4 t + j of the product, and tokens are stored in that order.
"""

# mypy: disable-error-code=assignment

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl

from moefold_kernels.triton import e4m3_decode
from moefold_kernels.triton.e4m3_stage import LOW, SCALE, WORDS, at
from moefold_kernels.triton.leveled_stage import HALF, low_words

_CODE = gl.constexpr(
    {(f, n): (e4m3_decode.assembly(f, n), e4m3_decode.constraints(f, n)) for f in e4m3_decode.TABLES for n in (1, 2)}
)


@gluon.constexpr_function
def code(format, slots, part):
    """The assembly (part 0) and its constraints (1)."""
    return _CODE.value[format, slots][part]


@gluon.constexpr_function
def _bits(size):
    return [1 << bit for bit in range(size.bit_length() - 1)]


@gluon.constexpr_function
def _rows(rows, warps, rank):
    """Bases of rows: in registers, lanes and warps."""
    zeros = [0] * (rank - 1)
    registers = [[8, *zeros]] + [[16 * warps * bit, *zeros] for bit in _bits(rows // warps // 16)]
    return registers, [[1, *zeros], [2, *zeros], [4, *zeros]], [[16 * bit, *zeros] for bit in _bits(warps)]


@gluon.constexpr_function
def own_layout(rows, words, warps):
    """Words [rows, 2 groups * words] of which every thread of four has its own: two, or one of each group."""
    registers, lanes, warp = _rows(rows, warps, 2)
    each = max(words // 4, 1)
    mine = [[0, bit] for bit in _bits(each)] + [[0, words]]
    across = [[0, each], [0, 2 * each]] if words >= 4 else [[0, 0], [0, 1]]
    return gl.DistributedLinearLayout(mine + registers, across + lanes, warp, [], [rows, 2 * words])


@gluon.constexpr_function
def units_layout(rows, warps):
    """[rows, step s of a product, thread of four]."""
    registers, lanes, warp = _rows(rows, warps, 3)
    return gl.DistributedLinearLayout([[0, 1, 0], *registers], [[0, 0, 1], [0, 0, 2], *lanes], warp, [], [rows, 2, 4])


@gluon.constexpr_function
def rows_layout(rows, columns, warps):
    """[rows, 1 or 2] as a product has its rows; the four threads of a row have the same."""
    registers, lanes, warp = _rows(rows, warps, 2)
    each = [[0, 1]] if columns == 2 else []
    return gl.DistributedLinearLayout(each + registers, [[0, 0], [0, 0], *lanes], warp, [], [rows, columns])


@gluon.jit
def _of_both(plane, ROWS: gl.constexpr, units: gl.constexpr):
    """Words [ROWS, 2 * 8] of two groups, each [ROWS, s, thread]."""
    parts = gl.permute(gl.reshape(plane, (ROWS, 2, 4, 2)), (0, 3, 2, 1))
    first, second = gl.split(parts)
    return (
        gl.convert_layout(first, units, assert_trivial=True),
        gl.convert_layout(second, units, assert_trivial=True),
    )


@gluon.jit
def _spread(low, shift: gl.constexpr, units: gl.constexpr):
    """A word [ROWS, thread] of both steps, of which the second's bits are moved."""
    both = gl.permute(gl.join(low, low >> shift), (0, 2, 1))
    return gl.convert_layout(both, units, assert_trivial=True)


@gluon.jit
def words_of(buffers, half: gl.constexpr, PLACE: gl.constexpr, ROWS: gl.constexpr, FORMAT: gl.constexpr):
    """The thread's words of both groups of 128 columns: `words` of the first and the second, `low` likewise."""
    units: gl.constexpr = units_layout(ROWS, gl.num_warps())
    plane = buffers[at(WORDS + half, PLACE)].load(own_layout(ROWS, 8, gl.num_warps()))
    w0, w1 = _of_both(plane, ROWS, units)
    low0, low1 = w0, w1
    if FORMAT != "pair4":
        words: gl.constexpr = low_words(FORMAT, HALF)
        plane = buffers[at(LOW + half, PLACE)].load(own_layout(ROWS, words, gl.num_warps()))
        if FORMAT == "pair8":
            low0, low1 = _of_both(plane, ROWS, units)
        elif FORMAT == "pair6":
            a, b = gl.split(gl.permute(gl.reshape(plane, (ROWS, 2, 4)), (0, 2, 1)))
            low0, low1 = _spread(a, 2, units), _spread(b, 2, units)
        else:  # pair5: a word has 32 columns, the halves of which are of neighbours
            a, b = gl.split(gl.permute(gl.reshape(plane, (ROWS, 2, 2)), (0, 2, 1)))
            low0, low1 = _neighbours(a, ROWS, units), _neighbours(b, ROWS, units)
    return w0, w1, low0, low1


@gluon.constexpr_function
def _neighbours_layout(rows, warps):
    """[rows, words, thread's parity]."""
    registers, lanes, warp = _rows(rows, warps, 3)
    return gl.DistributedLinearLayout(registers, [[0, 0, 1], [0, 1, 0], *lanes], warp, [], [rows, 2, 2])


@gluon.jit
def _neighbours(low, ROWS: gl.constexpr, units: gl.constexpr):
    pairs: gl.constexpr = _neighbours_layout(ROWS, gl.num_warps())
    low = gl.expand_dims(gl.convert_layout(low, gl.SliceLayout(2, pairs), assert_trivial=True), 2)
    parity = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, pairs)))
    low = low >> 2 * gl.expand_dims(gl.expand_dims(parity, 0), 0)
    return _spread(gl.reshape(low, (ROWS, 4)), 1, units)


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
