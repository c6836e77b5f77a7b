"""Draw the words of the packed formats: pictures in docs/images, tables in docs/formats.md.

    python docs/draw_formats.py

No bit position is written here. Those of `exponent` come from layout.py; those of the few-bit formats are found by
encoding one position at a time with reference_pairs.py and looking which bits of which word change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from moefold_kernels import layout, layout_pairs, reference_pairs

HERE = Path(__file__).parent
PAGE = HERE / "formats.md"
MARK = re.compile(r"(<!-- drawn: (\w+) -->\n).*?(<!-- end of drawn -->)", flags=re.DOTALL)

CELL, HIGH, A_ROW = 34, 40, 16  # px, px, bits
COLOURS = {
    "sign": "#2b62c4",
    "keep": "#0f766e",
    "exponent": "#15803d",
    "fraction": "#7c3aed",
    "state": "#2b62c4",
    "level": "#b45309",
}


class Bit(NamedTuple):
    """One bit of a word: the field that it belongs to, its number in it, and whose it is."""

    field: str
    number: int
    owner: str
    """`slot 0`, `column 3`, or nothing for what both slots share."""

    @property
    def label(self) -> str:
        return f"{self.field[0]}{self.number}"


def exponent() -> list[Bit]:
    """The bits of a word of `exponent`, from bit 0 up."""
    bits = {n: Bit("fraction", n, "") for n in range(layout.FRACTION_BITS)}
    bits |= {layout.FIELD_SHIFT + n: Bit("exponent", n, "") for n in range(layout.FIELD_BITS)}
    for field, shifts in (("sign", layout.SIGN_SHIFT), ("keep", layout.KEEP_SHIFT)):
        bits |= {shift: Bit(field, slot, f"slot {slot}") for slot, shift in enumerate(shifts)}
    return [bits[n] for n in range(16)]


def plane(format: str, name: str) -> list[Bit]:
    """The bits of the first word of a plane (`words` or `low`) of a few-bit format, from bit 0 up."""
    found: dict[int, Bit] = {}
    for column in range(layout_pairs.GROUP):
        for number in range(layout_pairs.magnitude_bits(format)):
            found |= {bit: Bit("level", number, f"column {column}") for bit in _changed(format, name, column, number)}
        for number in range(layout_pairs.STATE_BITS) if name == "words" else ():
            of_state = _changed(format, name, column, None, 1 << number)
            found |= {bit: Bit("state", number, f"column {column}") for bit in of_state}
    return [found[n] for n in range(layout_pairs.WORD)]


def _changed(format: str, name: str, column: int, level: int | None, state: int = 0) -> Iterator[int]:
    """Which bits of the plane's first word one bit of one position's level, or of its state, stands in."""
    blank = _word(format, name, column, 0, 0)
    changed = blank ^ _word(format, name, column, 0 if level is None else 1 << level, state)
    return (bit for bit in range(layout_pairs.WORD) if changed >> bit & 1)


def _word(format: str, name: str, column: int, level: int, state: int) -> int:
    levels = torch.zeros(1, layout_pairs.GROUP, dtype=torch.uint8)
    levels[0, column] = level
    negative = torch.zeros(layout.SLOTS, 1, layout_pairs.GROUP, dtype=torch.bool)
    keep = torch.ones_like(negative)
    for slot in range(layout.SLOTS):  # the state that reads back as the one asked for
        alone = state & layout_pairs.ALONE
        keep[slot, 0, column] = not alone or (state >> 1 & 1) == slot
        negative[slot, 0, column] = bool(keep[slot, 0, column]) and bool(state & 1 if alone else state >> slot & 1)
    planes = reference_pairs.encode(format, levels, torch.ones(1, 1, dtype=torch.bfloat16), negative, keep)
    return int(planes[name][0, 0]) & 0xFFFFFFFF


def picture(bits: list[Bit], title: str) -> str:
    """An SVG of a word, its highest bit first, sixteen bits a row."""
    rows = len(bits) // A_ROW
    width, height = A_ROW * CELL + 2, rows * (HIGH + 26) + 4
    owners = list(dict.fromkeys(bit.owner for bit in bits))
    drawn = [_cell(bit, n, rows, owners.index(bit.owner) % 2) for n, bit in enumerate(bits)]
    style = (
        "text{font:13px ui-monospace,monospace;text-anchor:middle;fill:#fff}"
        ".n{font-size:11px;fill:#666}.o{font-size:10px}"
        "@media(prefers-color-scheme:dark){.n{fill:#aaa}}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{style}</style>", *drawn, "</svg>", ""])


def _cell(bit: Bit, number: int, rows: int, odd: int) -> str:
    row, place = rows - 1 - number // A_ROW, A_ROW - 1 - number % A_ROW
    x, y = place * CELL + 1, row * (HIGH + 26) + 18
    middle = x + CELL / 2
    owner = bit.owner.replace("column ", "c").replace("slot ", "slot")
    shade = ' fill-opacity=".82"' if odd else ""
    return (
        f'<text class="n" x="{middle}" y="{y - 5}">{number}</text>'
        f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{HIGH}" fill="{COLOURS[bit.field]}"{shade}/>'
        f'<text x="{middle}" y="{y + (17 if owner else 25)}">{bit.label}</text>'
        + (f'<text class="o" x="{middle}" y="{y + 32}">{owner}</text>' if owner else "")
    )


def table(bits: list[Bit]) -> str:
    """The same as a Markdown table: runs of bits of one field and owner."""
    lines = ["| bits | what |", "|---|---|"]
    numbered = reversed(list(enumerate(bits)))
    for (field, owner), run in groupby(numbered, key=lambda at: (at[1].field, at[1].owner)):
        members = list(run)
        (high, first), (low, last) = members[0], members[-1]
        where = f"{high}" if high == low else f"{high} … {low}"
        inner = f"{first.label}" if high == low else f"{first.label} … {last.label}"
        lines.append(f"| {where} | {inner}: {field}{f' of {owner}' if owner else ', of both slots'} |")
    return "\n".join(lines)


def pictures() -> dict[str, str]:
    """Every picture by the name of its file."""
    found = {"format-exponent.svg": picture(exponent(), "A word of the format exponent")}
    found["format-words.svg"] = picture(plane("pair8", "words"), "The nibble plane of the few-bit formats")
    for name in layout_pairs.MAGNITUDE_BITS:
        if layout_pairs.low_bits(name):
            found[f"format-{name}-low.svg"] = picture(plane(name, "low"), f"The plane low of {name}")
    return found


def tables() -> dict[str, str]:
    """Every table by its name in the page."""
    return {
        "exponent": table(exponent()),
        "words": table(plane("pair8", "words")),
        "low": _low_table(),
        "sizes": _sizes(),
    }


def _low_table() -> str:
    """Where the columns' other bits begin in the first word of the plane `low`, format by format."""
    lines = ["| format | bits a column | its first word's columns, from the lowest bit up |", "|---|---|---|"]
    for name in layout_pairs.MAGNITUDE_BITS:
        if not (width := layout_pairs.low_bits(name)):
            lines.append(f"| `{name}` | 0 | no such plane |")
            continue
        columns = dict.fromkeys(bit.owner.removeprefix("column ") for bit in plane(name, "low"))
        lines.append(f"| `{name}` | {width} | {', '.join(columns)} |")
    return "\n".join(lines)


def _sizes() -> str:
    """Bits of a weight in each format, counted for a matrix of 1024 columns."""
    lines = ["| format | levels | bits of a position | bits of a weight, scales counted |", "|---|---|---|---|"]
    lines.append(f"| `{layout.EXPONENT}` | | 16 | 8 |")
    for name, bits in reversed(layout_pairs.MAGNITUDE_BITS.items()):
        size = 8 * layout_pairs.size(name, 1, 1024) / 1024
        lines.append(f"| `{name}` | {1 << bits} | {bits + layout_pairs.STATE_BITS} | {size / 2:g} |")
    return "\n".join(lines)


def page() -> str:
    """docs/formats.md with every table made anew."""
    made = tables()
    return MARK.sub(lambda at: f"{at[1]}\n{made[at[2]]}\n\n{at[3]}", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for name, drawn in pictures().items():
        (HERE / "images" / name).write_text(drawn, encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
