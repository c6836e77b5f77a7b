"""The example plugins, as their readers take them: installed, tested, run from their own YAML."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from environments import Environment

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
MADE = {"ream": ("pair.ream", "moefold-ream"), "log8": ("log8-triton", "moefold-log8")}


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_an_example_installs_passes_its_tests_and_runs(name: str, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    folder = shutil.copytree(EXAMPLES / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    environment.install(folder)
    assert " passed" in environment.run("pytest", folder)
    thing, distribution = MADE[name]
    listed = json.loads(environment.run("moefold list --json", folder))
    assert {row["name"]: row["source"] for rows in listed.values() for row in rows}[thing] == distribution
    report = json.loads(environment.run("moefold run pipeline.yaml --json --device cpu", folder))
    (saved,) = report["saved"]["save"].values()
    assert saved["expert_bytes"]["after"] * 2 == saved["expert_bytes"]["before"]


def test_every_example_is_tested() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("*/pyproject.toml")} == set(MADE)
