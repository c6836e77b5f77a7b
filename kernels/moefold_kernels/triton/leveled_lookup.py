"""The few-bit pair formats to bf16 operands by a table in shared memory, on Hopper: PTX, and the table itself.

Integer instructions bound leveled_decode.py; shared memory is another unit. A thread's byte of a word of pair4 is two
positions and one look-up of 8 bytes, both slots; in the other formats a position is a look-up of 4 bytes, both slots.
The address is one dot product of bytes. Every row of the table is 128 bytes, as many copies of an entry as there are
lanes to a cycle: a lane reads its own copy, so that no two lanes want one bank. Entries are `levels.look_up`, exactly as
the definition has them, and a multiplication by the scale rounds once.

Where gate and up have other levels, half of the copies are of each, and two lanes share one.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl

from moefold_kernels.layout_pairs import MAGNITUDE_BITS
from moefold_kernels.levels import ENTRIES, NUMBERS
from moefold_kernels.triton import leveled_decode
from moefold_kernels.triton.leveled_decode import LOWS, TABLES

ROW = 128
"""Bytes of an entry's copies: all banks once."""

# of the bytes [word, low, word, low]: which bits are of the even and of the odd column, for each of two words, and
# what the two bytes of a column count in an address (the odd column's nibble is 16 times its number)
_MASKS = {"pair5": (0x10F0010F, 0x20F0020F), "pair6": (0x30F0030F, 0xC0F00C0F), "pair8": (0xF0F00F0F, 0xF0F00F0F)}
_LOW_EVEN = {"pair5": (16, 8), "pair6": (16, 4), "pair8": (16, 16)}
_LOW_ODD = {"pair5": (1, 0.5), "pair6": (1, 0.25), "pair8": (1, 1)}


def pack(looked: int) -> int:
    """How many times four positions one piece of assembly makes, to look up `looked` quarters of them."""
    return {0: 1, 1: 4, 2: 2, 3: 4, 4: 1}[looked]


def assembly(format: str, slots: int, looked: int = 4) -> str:
    """PTX of `pack` times four positions, the first ones by the table, the others as leveled_decode.py makes them.

    Results: for each slot two registers of two operands. Operands: two words; which of their bytes is the thread's
    (`choice`); words of `low` (two for pair8, one for pair5 and pair6); the scale twice in a register; where the row's
    copies are; not for pair4, for one slot, `prmt`'s selector of it. Where there are others: leveled_decode's operands
    but words, `low` and scale (of pair4 the row's two levels are scaled). Each is there `pack` times.
    """
    times = pack(looked)
    names = iter([f"${times * number + i}" for i in range(times)] for number in range(99))
    results = [next(names) for _ in range(2 * slots)]
    words, choice = [next(names), next(names)], next(names)
    low = [next(names) for _ in range(LOWS[format])]
    scale, base = next(names), next(names)
    pick = next(names) if slots == 1 and low else [""] * times
    gather, signs, tables = [""] * times, [], []
    if looked < 4:
        gather = next(names)
        signs = [next(names), next(names)] if slots == 1 else []
        tables = [next(names) for _ in range(TABLES[format])]
    lines = []
    for i in range(times):
        found, (own, lows) = _of(results, i), (_of(words, i), _of(low, i))
        if 4 * i < looked * times:
            lines.append(_block(format, found, own, choice[i], lows, scale[i], base[i], pick[i]))
        else:
            rest = scale[i], _of(signs, i), _of(tables, i)
            lines.append(leveled_decode.block(format, found, own, gather[i], lows, *rest))
    return "\n".join(lines)


def _of(names: Sequence[Sequence[str]], number: int) -> list[str]:
    return [one[number] for one in names]


def _block(
    format: str,
    results: Sequence[str],
    words: Sequence[str],
    choice: str,
    low: Sequence[str],
    scale: str,
    base: str,
    pick: str,
) -> str:
    """`assembly` with names of one's own for the operands."""
    slots, lines = len(results) // 2, ""
    picks = [pick] if pick else ["0x5410", "0x7632"]
    for number, word in enumerate(words):
        found = [results[2 * slot + number] for slot in range(slots)]
        if low:
            lines += _one_by_one(format, number, word, low[min(number, len(low) - 1)], choice, base)
            lines += "".join(f"\n    prmt.b32 {to}, x, y, {one};" for to, one in zip(found, picks, strict=True))
        else:
            loaded = f".v2.b32 {{{found[0]}, {found[1]}}}" if slots == 2 else f".b32 {found[0]}"
            lines += f"""
    dp4a.u32.u32 p, {word}, {choice}, {base};
    ld.shared{loaded}, [p];"""
        lines += "".join(f"\n    mul.rn.bf16x2 {to}, {to}, {scale};" for to in found)
    return f"""{{
    .reg .b32 a, p, q, x, y, even, odd;{lines}
    }}"""


def _one_by_one(format: str, number: int, word: str, low: str, choice: str, base: str) -> str:
    """PTX of x and y: what both slots read in an even column and in the next one."""
    even, odd = ROW | int(ROW * _LOW_EVEN[format][number]) << 16, ROW // 16 | int(ROW * _LOW_ODD[format][number]) << 16
    return f"""
    mov.b32 even, 0x{even:08X};
    mov.b32 odd, 0x{odd:08X};
    prmt.b32 a, {word}, {low}, {choice};
    and.b32 a, a, 0x{_MASKS[format][number]:08X};
    dp2a.lo.u32.u32 p, even, a, {base};
    dp2a.hi.u32.u32 q, odd, a, {base};
    ld.shared.b32 x, [p];
    ld.shared.b32 y, [q];"""


def constraints(format: str, slots: int, looked: int = 4) -> str:
    """Of `assembly`, as Triton wants them; a result is written before all operands are read."""
    given = 5 + LOWS[format] + (format != "pair4" and slots == 1)
    given += 1 + 2 * (slots == 1) + TABLES[format] if looked < 4 else 0
    return ",".join(["=&r"] * (2 * slots * pack(looked)) + ["r"] * (given * pack(looked)))


CODE = gl.constexpr(
    {
        (f, slots, looked): (assembly(f, slots, looked), constraints(f, slots, looked), pack(looked))
        for f in MAGNITUDE_BITS
        for slots in (1, 2)
        for looked in range(1, 5)
    }
)
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
