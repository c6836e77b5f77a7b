"""docs/troubleshooting.md: each message stands in the code as it is quoted, and each kind of error has its place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moefold.cli import app
from pages import DOCS, ROOT, blocks

PAGE = DOCS / "troubleshooting.md"
PACKAGES = ("core", "plugins", "kernels")


def quoted() -> list[str]:
    """The messages of the page; `…` is what differs from case to case."""
    ours = [block for block in blocks(PAGE) if block.how != "not moefold's"]
    assert {block.language for block in ours} == {"text"}
    return [line for block in ours for line in block.text.splitlines()]


def written() -> set[str]:
    """Every string of the packages, with `…` for each of its holes."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {plain(text) for path in files for text in _strings(ast.parse(path.read_text(encoding="utf-8")))}


def _strings(tree: ast.AST) -> list[str]:
    return [_rendered(node) for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)]


def _rendered(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(_rendered(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _rendered(node.left) + _rendered(node.right)
    return "…"


def plain(text: str) -> str:
    """Holes that touch are one; so is white space."""
    return re.sub(r"(?:…\s*)+", "…", re.sub(r"\s+", " ", text)).strip()


def test_every_message_is_in_the_code() -> None:
    known = written()
    assert len(quoted()) > 80
    missing = [message for message in quoted() if plain(message) not in known]
    assert not missing, "no longer said by the code: " + "\n".join(missing)


def test_every_kind_of_error_is_named() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    kinds = {
        n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name.endswith("Error")
    }
    text = PAGE.read_text(encoding="utf-8")
    assert {"PipelineError", "StoreError", "BackendError"} <= kinds
    assert not [kind for kind in kinds if f"`{kind}`" not in text and f".{kind}`" not in text]


TAKEN = "… exists and moefold did not write it; choose another directory (save: with: to:), or remove it"
WRONG = """
model: demo
stages:
  - {id: calibration, uses: text.stdlib, wiht: {}}
  - {id: other, uses: text.stdlib}
  - {uses: forward}
  - uses: observe
  - {uses: puzzlemoe, needs: {pair: x, activity: calibration}}
  - uses: mergemoe
  - {uses: save, with: {to: out}}
"""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("validate wrong.yaml", "unknown key…"),
        ("validate wrong.yaml", "… is made by …; say which: needs: {…: …}"),
        ("validate wrong.yaml", "… needs …, and no stage makes that; …"),
        ("validate wrong.yaml", "… has no input ……"),
        ("validate wrong.yaml", "… makes …, but … is needed; write …"),
        ("validate wrong.yaml", "nothing reads what … makes, and it is not kept; …"),
        ("validate broken.yaml", "not YAML: …; check the indentation and quotes of this line"),
        ("run quikstart", "no pipeline ……"),
        ("run no/such.yaml", "no file …; shipped pipelines are named without a path: …"),
        ("run quickstart --set nothing.x=1", "--set …: … has no stage ……"),
        ("run quickstart --set x", "--set …: write STAGE.OPTION=VALUE, for instance --set puzzlemoe.threshold=0.3"),
        ("run quickstart --set calibration.part={", "--set …: the value is not YAML; quote it: --set '…=\"...\"'"),
        ("run quickstart --workers 2", "inline runs one task at a time; for … workers add --executor process"),
        ("run quickstart --keep x", "--keep …: no stage of … has this id…"),
        ("run demo.yaml", "no file …; shipped pipelines are named without a path: …"),
        ("run quickstart --model x", "… is no directory, no hub id (OWNER/NAME), and no model that a plugin ships…"),
        ("run quickstart --model empty", "…: no config.json; give the directory that holds it beside the weights"),
        ("run quickstart --text none*.txt", "no file matches …; quote a pattern so that the shell leaves it alone"),
        ("run taken.yaml --device cpu", TAKEN),
    ],
)  # fmt: skip
def test_messages_come_as_the_page_quotes_them(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text(WRONG)
    (tmp_path / "broken.yaml").write_text("model: 'demo\nstages: []\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    assert said in quoted()
    (tmp_path / "taken.yaml").write_text("model: demo\nstages: [uses: prune.random, {uses: save, with: {to: taken}}]\n")
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code in (1, 2), done.output
    assert "Traceback" not in done.output
    pattern = ".*".join(map(re.escape, re.split("…+", said)))
    assert re.search(pattern, done.output.replace("\n", " ")), done.output
