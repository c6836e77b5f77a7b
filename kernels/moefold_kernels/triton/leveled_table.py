"""The table in shared memory that leveled_lookup.py reads.

Every row is 128 bytes, as many copies of an entry as there are lanes to a cycle: a lane reads its own copy, so that no
two lanes want one bank. Where gate and up have other levels, half of the copies are of each, and two lanes share one.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl

from moefold_kernels.levels import ENTRIES, NUMBERS
from moefold_kernels.triton.leveled_lookup import ROW

_ENTRIES = gl.constexpr(dict(ENTRIES))
_NUMBERS = gl.constexpr(NUMBERS)
_ROW = gl.constexpr(ROW)


@gluon.constexpr_function
def entries(format):
    """Of the format's table."""
    return _ENTRIES.value[format]


@gluon.constexpr_function
def size(format):
    """Bytes of the format's table: a number of KB, so that what lies behind it stays aligned as products want it."""
    return _ENTRIES.value[format] * _ROW.value


@gluon.constexpr_function
def copies(format, paired):
    """Of an entry, side by side: of 8 bytes or of 4."""
    return 16 if format == "pair4" and paired else 32


@gluon.constexpr_function
def _declaration(format):
    """PTX of a variable of its own, which Triton's allocations know nothing of: its address."""
    return f"{{ .shared .align {_ROW.value} .b8 moefold_looked_up[{size(format)}]; mov.u32 $0, moefold_looked_up; }}"


@gluon.jit
def place(FORMAT: gl.constexpr):
    """The table's address. It has to be taken once in a kernel, or there are several."""
    return gl.inline_asm_elementwise(_declaration(FORMAT), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fill(base, levels, up, slot, FORMAT: gl.constexpr, PAIRED: gl.constexpr):
    """Write the table, to be read behind the next barrier; its first copies are of `levels`, the others of `up`."""
    warps: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [warps, 1], [1, 0])
    words: gl.constexpr = 2 if FORMAT == "pair4" else 1
    entry = gl.arange(0, entries(FORMAT), gl.SliceLayout(1, layout))[:, None]
    part = gl.arange(0, 8, gl.SliceLayout(0, layout))[None, :]
    at = levels + _NUMBERS + gl.where(part >= 4, up, 0) + entry * words
    if words == 2 and not PAIRED:
        at += slot
    first = gl.load(at)
    second = first
    if words == 2 and PAIRED:
        second = gl.load(at + 1)
    gl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $3, $2, $3}; mov.b32 $0, 0;", "=r,r,r,r",
        [base + entry * _ROW + part * 16, first, second], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def own_copies(base, levels, up, FORMAT: gl.constexpr, PAIRED: gl.constexpr, ROWS: gl.constexpr, units: gl.constexpr):
    """Where a thread's copies begin, for each of its rows: [ROWS, 1, 4], of which rows 8 to 15 of every 16 are `up`."""
    number: gl.constexpr = copies(FORMAT, PAIRED)
    differ = 0
    for i in gl.static_range(8):  # these eight make all levels
        differ |= gl.load(levels + i) ^ gl.load(levels + up + i)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, units)))
    row = gl.expand_dims(gl.expand_dims(row, 1), 2)
    thread = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, units)))
    lane = gl.expand_dims(gl.expand_dims(thread, 0), 0) + 4 * (row % 8)
    half = lane % (number // 2) + gl.where(row % 16 >= 8, number // 2, 0)
    return base + gl.where(differ == 0, lane % number, half) * (_ROW // number)
