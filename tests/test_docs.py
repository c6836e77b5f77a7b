"""Documentation that runs: commands, YAML and Python of the README and of CONTRIBUTING."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from moefold.cli import app
from moefold.hooks import Registry
from moefold.pipeline import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_ci_runs_the_readmes_test_command():
    (command,) = [line for block in blocks(README, "bash") for line in block.splitlines() if line.endswith("pytest")]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_pipelines_in_the_pages_load():
    found = [(page.name, text) for page in PAGES for text in blocks(page.read_text(encoding="utf-8"), "yaml")]
    assert {name for name, _ in found} >= {"README.md", "methods.md"}
    for name, text in found:
        pipeline = load(text, name, Registry.installed())
        if name not in {"README.md", "methods.md"}:  # the others are held by test_pages.py
            continue
        assert pipeline.ends() == ["save"]
        assert set(pipeline.steps["puzzlemoe"].needs) == {"experts", "pairs", "activity"}


def test_shipped_pipelines_load_and_say_what_they_are():
    shipped = sorted((ROOT / "pipelines").glob("*.yaml"))
    assert {"average", "hcsmoe", "mergemoe", "mergemoe-published", "msmoe", "puzzlemoe", "quickstart", "reap"} <= {
        path.stem for path in shipped
    }
    for path in shipped:
        text = path.read_text(encoding="utf-8")
        assert load(text, str(path), Registry.installed()).ends()[0] == "evaluate.perplexity"
        assert re.match(r"# [^\n]+\.\n", text), f"{path.name}: the first line says what it is"


def test_the_stage_in_contributing_is_the_example_plugin():
    """One copy is run by test_plugin.py; the other must be the same."""
    (shown,) = blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "python")
    plugin = (ROOT / "tests" / "example_plugin" / "src" / "moefold_neighbours.py").read_text(encoding="utf-8")
    assert shown.strip() == plugin.partition('"""\n\n')[2].strip()


def test_every_command_that_is_named_exists():
    named = {m for page in PAGES for m in re.findall(r"moefold ([a-z]+)\b", page.read_text(encoding="utf-8"))}
    known = set(re.findall(r"│ ([a-z]+) ", CliRunner().invoke(app, ["--help"]).output))
    assert {"run", "plan", "validate", "list", "describe", "copy", "doctor", "evaluate"} <= known
    wrong = {word for page in PAGES for word in re.findall(r"`moefold ([a-z]+)\b", page.read_text())} - known
    assert not wrong
    assert named & known


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
