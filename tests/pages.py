"""Markdown pages as tests take them: fenced blocks in order, with the remark in front that says how one is checked.

<!-- not run: REASON -->        the commands are parsed by the command line, Python is compiled
<!-- run as: COMMAND -->        this command stands for the block; what follows is its output
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]

_OPEN = re.compile(r'^(?P<indent> *)(?P<fence>```+|~~~+)(?P<language>\S*)(?: title="(?P<title>[^"]+)")?\s*$')
_REMARK = re.compile(r"^<!-- (?P<how>not run|run as|not moefold's): (?P<what>.+) -->$")


class Block(NamedTuple):
    """A fenced block and where it stands."""

    page: str
    line: int
    language: str
    title: str
    how: str
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page; raises ValueError for a fence that cannot be read."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        opening = _OPEN.match(lines[number])
        if opening is None:
            if "```" in lines[number].lstrip()[:4] or "~~~" in lines[number].lstrip()[:4]:
                raise ValueError(f"{page}:{number + 1}: a fence that no test can read: {lines[number]}")
            number += 1
            continue
        remark = _REMARK.match(lines[number - 1].strip()) if number else None
        end = number + 1
        while lines[end].strip() != opening["fence"]:
            end += 1
        cut = len(opening["indent"])
        text = "".join(line[cut:] + "\n" for line in lines[number + 1 : end])
        how, what = (remark["how"], remark["what"]) if remark else ("", "")
        found.append(Block(name(page), number + 1, opening["language"], opening["title"] or "", how, what, text))
        number = end + 1
    return found


_NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?")


def compare(output: str, shown: str) -> None:
    """Every line that is shown is there, in this order, and its numbers are near; `...` stands for anything.

    Borders of tables are not compared, nor the numbers below `What it took`: seconds and memory are of a machine.
    """
    rest = iter(_plain(output))
    timed = False
    for line in _plain(shown):
        timed = timed or line.startswith("What it took")
        assert any(_alike(one, line, timed) for one in rest), f"not in the output: {line}\n{output}"


def _plain(text: str) -> list[str]:
    lines = (re.sub(r"\s+", " ", re.sub(r"[│┃]", "|", line)).strip() for line in text.splitlines())
    return [line for line in lines if line and not re.fullmatch(r"[┏┡└├┳┻╇┴┼━─┓┩┘┤]+", line)]


def _alike(output: str, shown: str, timed: bool) -> bool:
    pieces = [re.escape(_NUMBER.sub("0", piece.strip())) for piece in shown.split("...")]
    if not re.fullmatch(".*".join(pieces), _NUMBER.sub("0", output)):
        return False
    if timed or "..." in shown:
        return True
    pairs = zip(map(_value, _NUMBER.findall(output)), map(_value, _NUMBER.findall(shown)), strict=True)
    return all(abs(one - other) <= 0.02 + 0.02 * abs(other) for one, other in pairs)


def _value(number: str) -> float:
    return float(number.replace(",", ""))
