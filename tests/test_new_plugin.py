"""`moefold new plugin NAME`: what it writes installs into a fresh environment, passes its tests, runs from YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from environments import Environment
from moefold.cli import app
from moefold.errors import InputError
from moefold.new import TEMPLATES, write_plugin


@pytest.mark.slow
def test_what_it_writes_works(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    said = environment.run("moefold new plugin my-pairs", tmp_path)
    folder = tmp_path / "moefold-my-pairs"
    assert said.splitlines()[0] == "wrote moefold-my-pairs; next:"
    environment.run("pip install -q -e .", folder)
    assert "4 passed" in environment.run("pytest", folder)
    report = json.loads(environment.run("moefold run pipeline.yaml --json", folder))
    assert report["packed"]["pack.my_pairs"]["0"]["format"] == "my_pairs"
    saved = report["packed"]["pack.exponent"]
    assert all(len(facts["pairs"]) == 8 for facts in saved.values())
    assert (folder / "out" / "packed" / "config.json").is_file()
    listed = environment.run("moefold list --json", folder)
    sources = {row["name"]: row["source"] for rows in json.loads(listed).values() for row in rows}
    assert sources["pair.my_pairs"] == sources["my_pairs"] == "moefold-my-pairs"


def test_it_is_tidy(tmp_path: Path) -> None:
    folder = write_plugin("my-pairs", tmp_path)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "pyproject.toml", "pipeline.yaml", "src/moefold_my_pairs/__init__.py",
        "src/moefold_my_pairs/codecs.py", "src/moefold_my_pairs/plugin.py", "src/moefold_my_pairs/stages.py",
        "tests/conftest.py", "tests/test_codec.py", "tests/test_stage.py",
    }  # fmt: skip
    for path in folder.rglob("*.*"):
        assert "$" not in path.read_text(), path
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,UP,B", "--line-length", "120"]
    if subprocess.run([sys.executable, "-m", "ruff", "--version"], capture_output=True).returncode == 0:
        done = subprocess.run([*ruff, folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_templates_are_in_the_package() -> None:
    assert len(list((TEMPLATES / "plugin").rglob("*.txt"))) == 10


def test_it_overwrites_nothing(tmp_path: Path) -> None:
    folder = write_plugin("mine", tmp_path)
    (folder / "README.md").write_text("changed")
    for name in ("mine", "moefold-mine"):
        with pytest.raises(InputError, match="moefold-mine exists; move it away, or choose another name"):
            write_plugin(name, tmp_path)
    assert (folder / "README.md").read_text() == "changed"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-Pairs", "is no plugin's name; write lower-case words with hyphens between"),
        ("two words", "is no plugin's name"),
        ("../up", "is no plugin's name"),
        ("-x", "is no plugin's name"),
        ("", "is no plugin's name"),
        ("kernels", "is taken by Python or moefold itself"),
        ("plugins", "is taken by Python or moefold itself"),
        ("lambda", "is taken by Python or moefold itself"),
        ("random", r"there is a stage pair.random already \(from moefold\)"),
        ("exponent", r"there is a codec exponent already \(from moefold\)"),
    ],
)
def test_names_are_checked_before_anything_is_written(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_errors_without_a_traceback(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["new", "plugin", "Bad Name", "--to", str(tmp_path)])
    assert done.exit_code == 2
    assert "Traceback" not in done.output
