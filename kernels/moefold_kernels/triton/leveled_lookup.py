"""The few-bit pair formats to bf16 operands by a table in shared memory, on Hopper: PTX.

A thread's byte of a word of pair4 is two positions, and one look-up of 8 bytes gives both slots; in the other formats
one of 4 bytes gives a position. The address is one dot product of bytes, and entries are `levels.look_up`, with signs:
all that is left is to multiply by the scale, which rounds once. The table itself is in leveled_table.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from moefold_kernels.triton import leveled_decode
from moefold_kernels.triton.leveled_decode import LOWS, TABLES

ROW = 128
"""Bytes of an entry's copies: all banks once."""

# of the bytes [word, low, word, low]: which bits are of the even and of the odd column, for each of two words, and
# what the two bytes of a column count in an address (the odd column's nibble is 16 times its number)
_MASKS = {"pair5": (0x10F0010F, 0x20F0020F), "pair6": (0x30F0030F, 0xC0F00C0F), "pair8": (0xF0F00F0F, 0xF0F00F0F)}
_LOW_EVEN = {"pair5": (16, 8), "pair6": (16, 4), "pair8": (16, 16)}
_LOW_ODD = {"pair5": (1, 0.5), "pair6": (1, 0.25), "pair8": (1, 1)}


PACK = {1: 4, 2: 2, 3: 4, 4: 1}
"""How many times four positions one piece of assembly makes, to look up so many quarters of them."""


def assembly(format: str, slots: int, looked: int = 4) -> str:
    """PTX of PACK times four positions, the first ones by the table, the others as leveled_decode.py makes them.

    Results: for each slot two registers of two operands. Operands: two words; which of their bytes is the thread's
    (`choice`); words of `low` (two for pair8, one for pair5 and pair6); the scale twice in a register; where the row's
    copies are; not for pair4, for one slot, `prmt`'s selector of it. Where there are others: leveled_decode's operands
    but words, `low` and scale (of pair4 the row's two levels are scaled). Each is there PACK times.
    """
    times = PACK[looked]
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
    return ",".join(["=&r"] * (2 * slots * PACK[looked]) + ["r"] * (given * PACK[looked]))
