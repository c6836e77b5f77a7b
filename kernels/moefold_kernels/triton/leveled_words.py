"""What a thread reads of the planes in shared memory: its own words, for leveled.py and e4m3.py.

Of a group of 64 columns thread t of the four that share a row has positions 16 t to 16 t + 15, which are words of its
own in every plane: no byte is read twice. They are the columns that a product of bf16 wants of it (layout_pairs.ORDER);
for one of e4m3 numbers tokens are stored in an order of their own (e4m3_tokens.py).
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl

from moefold_kernels.triton.leveled_stage import HALF, low_words


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
    """[rows, word of a group's two, thread of four]."""
    registers, lanes, warp = _rows(rows, warps, 3)
    return gl.DistributedLinearLayout([[0, 1, 0], *registers], [[0, 0, 1], [0, 0, 2], *lanes], warp, [], [rows, 2, 4])


@gluon.constexpr_function
def word_layout(rows, warps):
    """[rows, thread of four]: one word of each."""
    registers, lanes, warp = _rows(rows, warps, 2)
    return gl.DistributedLinearLayout(registers, [[0, 1], [0, 2], *lanes], warp, [], [rows, 4])


@gluon.constexpr_function
def rows_layout(rows, columns, warps):
    """[rows, 1 or 2] as a product has its rows; the four threads of a row have the same."""
    registers, lanes, warp = _rows(rows, warps, 2)
    each = [[0, 1]] if columns == 2 else []
    return gl.DistributedLinearLayout(each + registers, [[0, 0], [0, 0], *lanes], warp, [], [rows, columns])


@gluon.jit
def _of_both(plane, ROWS: gl.constexpr, units: gl.constexpr):
    """Words [ROWS, 2 * 8] of two groups, each [ROWS, word, thread]."""
    parts = gl.permute(gl.reshape(plane, (ROWS, 2, 4, 2)), (0, 3, 2, 1))
    first, second = gl.split(parts)
    return (
        gl.convert_layout(first, units, assert_trivial=True),
        gl.convert_layout(second, units, assert_trivial=True),
    )


@gluon.jit
def _spread(low, shift: gl.constexpr, units: gl.constexpr):
    """A word [ROWS, thread] for both words of the other plane, of which the second's bits are moved."""
    both = gl.permute(gl.join(low, low >> shift), (0, 2, 1))
    return gl.convert_layout(both, units, assert_trivial=True)


@gluon.jit
def words_of(words, low, ROWS: gl.constexpr, FORMAT: gl.constexpr):
    """The thread's words of both groups of 128 columns: `words` of the first and the second, `low` likewise.

    `words` [ROWS, 16] and `low` are in shared memory; for pair4 nothing is read from `low`.
    """
    units: gl.constexpr = units_layout(ROWS, gl.num_warps())
    w0, w1 = _of_both(words.load(own_layout(ROWS, 8, gl.num_warps())), ROWS, units)
    low0, low1 = w0, w1
    if FORMAT != "pair4":
        each: gl.constexpr = low_words(FORMAT, HALF)
        plane = low.load(own_layout(ROWS, each, gl.num_warps()))
        if FORMAT == "pair8":
            low0, low1 = _of_both(plane, ROWS, units)
        elif FORMAT == "pair6":
            a, b = gl.split(gl.permute(gl.reshape(plane, (ROWS, 2, 4)), (0, 2, 1)))
            low0, low1 = _spread(a, 2, units), _spread(b, 2, units)
        else:  # pair5: a word has 32 positions, the halves of which are of neighbours
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
