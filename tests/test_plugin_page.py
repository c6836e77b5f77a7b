"""The tutorial, step by step as a reader takes it: files are written, commands run, and their output is as shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

import moefold
from environments import Environment
from moefold import hooks, testing

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks() -> list[Block]:
    found = re.findall(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(found) == PAGE.count("\n```") / 2, "a block that this test would pass over"
    return [Block(*one) for one in found]


def compare(output: str, shown: str) -> None:
    """Every line that is shown is there, in this order; `...` stands for anything."""
    rest = iter([re.sub(r"\s+", " ", line).strip() for line in output.splitlines()])
    for line in shown.splitlines():
        wanted = ".*".join(map(re.escape, re.sub(r"\s+", " ", line).strip().split("...")))
        assert any(re.fullmatch(wanted, one) for one in rest), f"not in the output: {line}\n{output}"


@pytest.mark.slow
def test_every_step_works_as_shown(tmp_path: Path) -> None:
    environment, where, output = Environment(tmp_path / "environment"), tmp_path, ""
    for number, block in enumerate(blocks()):
        if block.title:
            assert (where / block.title).parent.is_dir(), block.title
            (where / block.title).write_text(block.text)
        elif block.language == "bash":
            output, _, folder = environment.run(f"{block.text}\necho; pwd", where).strip().rpartition("\n")
            where = Path(folder)
        elif block.language == "python":
            script = tmp_path / f"step{number}.py"
            script.write_text(block.text)
            output = environment.run(f"python {script}", where)
        else:
            assert block.language == "text", block.language
            compare(output, block.text)


def test_a_wrong_output_would_be_seen() -> None:
    compare("one 1\ntwo  2\nthree", "one ...\nthree")
    for wrong in ("four", "three\none ...", "one"):
        with pytest.raises(AssertionError, match="not in the output"):
            compare("one 1\ntwo  2\nthree", wrong)


def test_what_it_calls_public_is() -> None:
    section = PAGE.partition("## What you can rely on")[2]
    hooks_ = {name for name in vars(hooks) if name.startswith("moefold_")}
    assert hooks_ == set(re.findall(r"`(moefold_(?!kernels)\w+)`", section))
    table = PAGE.partition("## What `moefold.testing` has")[2].partition("## ")[0]
    assert all(name in table for name in testing.__all__)
    assert moefold.__version__.startswith("0.1.")
    assert "moefold>=0.1,<0.2" in section
