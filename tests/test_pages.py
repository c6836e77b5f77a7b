"""Every page as a reader takes it, block by block: files are written, commands run, and their output is as shown."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from moefold.cli import app
from moefold.hooks import Registry
from moefold.pipeline import load
from moefold_kernels import read_config
from pages import DOCS, PAGES, ROOT, Block, blocks, compare, name

ELSEWHERE = {
    "docs/plugins.md": "test_plugin_page.py",
    "docs/examples/ream/README.md": "test_examples.py",
    "docs/examples/log8/README.md": "test_examples.py",
    "docs/troubleshooting.md": "test_troubleshooting.py",
}
"""Pages whose blocks another test runs."""

SHELL = ("bash",)
DATA = {"json": json.loads, "toml": tomllib.loads}
REASONS = ("installs", "a model", "needs a GPU", "needs the hub", "a picture", "starts a plugin")


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]


def test_every_block_is_run_or_says_why_not() -> None:
    known = {*SHELL, *DATA, "yaml", "python", "text"}
    for block in all_blocks():
        assert block.language in known, f"{block}: a block in {block.language or 'no language'}, which no test checks"
        if block.how == "not run":
            assert block.what.startswith(REASONS), f"{block}: begin the reason with one of {', '.join(REASONS)}"


def test_every_page_with_blocks_is_run_by_one_test() -> None:
    with_blocks = {block.page for block in all_blocks()}
    assert set(ELSEWHERE) <= with_blocks
    assert {name(page) for page in RUN} == with_blocks - set(ELSEWHERE)
    assert all((ROOT / "tests" / test).is_file() for test in ELSEWHERE.values())


WRONG = "wrong.yaml"
"""The title of a pipeline that the page shows with its problems."""


def data_blocks() -> list[Block]:
    return [b for b in all_blocks() if b.language in ("yaml", *DATA) and b.page not in ELSEWHERE and b.title != WRONG]


@pytest.mark.parametrize("block", data_blocks(), ids=str)
def test_yaml_json_and_toml_are_valid(block: Block) -> None:
    if block.language == "yaml":
        assert load(block.text, str(block), Registry.installed()).ends()
        return
    value = DATA[block.language](block.text)
    if "quantization_config" in value:
        assert read_config(value["quantization_config"])


@pytest.mark.parametrize("block", [b for b in all_blocks() if b.language in SHELL], ids=str)
def test_commands_are_ones_that_the_command_line_takes(block: Block) -> None:
    """Also of blocks that are not run: every option exists, and every value is of its type."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.replace("||", "&&").replace(";", "&&").split("&&"):
            words = shlex.split(part.partition(" >")[0], comments=True)
            if words[:1] == ["moefold"]:
                parse(words[1:])


def parse(words: list[str]) -> None:
    """Raises a UsageError (click's, or that of the click in typer) for what `moefold` would not take; runs nothing."""
    command = typer.main.get_command(app)
    context = command.make_context("moefold", words[:1])
    while hasattr(command, "resolve_command") and words:
        _, command, words = command.resolve_command(context, words)
        context = command.make_context(command.name, list(words), parent=context)


@pytest.mark.parametrize(
    "words", ["run quickstart --modle x", "rum quickstart", "bench rum", "run quickstart --workers x", "run"]
)
def test_a_wrong_command_would_be_seen(words: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|valid") as raised:
        parse(words.split())
    assert "UsageError" in [kind.__name__ for kind in type(raised.value).__mro__]


RUN = [page for page in PAGES if blocks(page) and name(page) not in ELSEWHERE]


SAME = ("README.md", "docs/index.md")
"""Pages that run the quickstart: one folder, so that it is computed once."""


@pytest.fixture(scope="module")
def quickstart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name)
def test_every_block_works_as_shown(page: Path, tmp_path: Path, quickstart_folder: Path) -> None:
    folder = quickstart_folder if name(page) in SAME else tmp_path
    shell = Shell(folder)
    for block in blocks(page):
        if block.how == "not run":
            if block.language == "python":
                ast.parse(block.text)
        elif block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text)
        elif block.language in SHELL:
            shell.run(block.what if block.how == "run as" else block.text, str(block))
        elif block.language == "python":
            script = folder / "step.py"
            script.write_text(block.text)
            shell.run(f"{shlex.quote(sys.executable)} step.py", str(block))
        elif block.language == "text":
            assert shell.output is not None, f"{block}: the output of what?"
            compare(shell.output, block.text)


class Shell:
    """Commands in one folder, with the `moefold` of these tests; keeps what the last one printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, None
        scripts = folder / ".bin"
        scripts.mkdir(exist_ok=True)
        (scripts / "moefold").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moefold "$@"\n')
        (scripts / "moefold").chmod(0o755)
        path = os.pathsep.join([str(scripts), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.variables = os.environ | {"PATH": path, "COLUMNS": "120"}
        self.variables.pop("TRITON_INTERPRET", None)  # set for these tests; a reader has none

    def run(self, command: str, where: str) -> None:
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.variables,
        )
        assert done.returncode == 0, f"{where}\n{command}\n{done.stdout}"
        self.output = done.stdout


def test_a_wrong_output_would_be_seen() -> None:
    compare("one 1\ntwo  2.0\nthree", "one ...\ntwo 2.01\nthree")
    for wrong in ("four", "three\none ...", "one", "two 2.4"):
        with pytest.raises(AssertionError, match="not in the output"):
            compare("one 1\ntwo  2.0\nthree", wrong)


def test_a_fence_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    page = DOCS / "index.md"
    assert blocks(page)
    (tmp_path / "page.md").write_text("```bash {one}\nls\n```\n")
    with pytest.raises(ValueError, match="a fence that no test can read"):
        blocks(tmp_path / "page.md")
