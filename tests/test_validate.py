"""`moefold validate` on ten broken files: every problem with line, column and remedy, exit code 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moefold.cli import app

GOOD = """\
model: demo
stages:
  - {id: calibration, uses: text.stdlib}
  - {uses: forward, needs: {text: calibration}}
  - uses: observe
  - uses: pair.random
  - uses: puzzlemoe
  - uses: pack.exponent
  - {uses: save, with: {to: out/x}}
"""

BROKEN = {
    "unknown stage": (
        ("- uses: observe", "- uses: obsevre"),
        ["5:5: stages[2].uses: unknown stage obsevre; did you mean observe?"],
    ),
    "unknown option": (
        ("- uses: puzzlemoe", "- uses: puzzlemoe\n    with: {treshold: 0.4}"),
        ["8:12: stages[4].with.treshold: unknown option; did you mean threshold?"],
    ),
    "wrong type": (
        ("- uses: pair.random", "- uses: pair.random\n    with: {seed: often}"),
        [
            "7:12: stages[3].with.seed: input should be a valid integer, "
            "unable to parse string as an integer, not 'often'"
        ],
    ),
    "out of range": (
        ("- uses: puzzlemoe", "- uses: puzzlemoe\n    with: {threshold: 1.5}"),
        ["8:12: stages[4].with.threshold: input should be less than or equal to 1, not 1.5"],
    ),
    "missing input": (
        ("  - uses: pair.random\n", ""),
        ["6:5: stages[3].needs.pairs: puzzlemoe needs Groups, and no stage makes that; add one of pair."],
    ),
    "ambiguous input": (
        ("- uses: pair.random", "- uses: pair.random\n  - uses: pair.by_usage"),
        [
            "8:5: stages[5].needs.pairs: Groups is made by pair.random and pair.by_usage; "
            "say which: needs: {pairs: pair.random}"
        ],
    ),
    "circle": (
        (
            "{id: calibration, uses: text.stdlib}",
            "{id: calibration, uses: text.mix, needs: {texts: [again]}}\n"
            "  - {id: again, uses: text.mix, needs: {texts: [calibration]}}",
        ),
        ["the stages feed each other in a circle: ", "calibration -> again"],
    ),
    "two stages of one id": (
        ("- uses: observe", "- uses: observe\n  - uses: observe"),
        ["6:5: stages[3].uses: the id observe is taken by stages[2]; give this one another: `id: observe_2`"],
    ),
    "not YAML": (
        ("- uses: observe", "- uses: [observe"),
        ["6:9: not YAML: expected ',' or ']', but got ':'; check the indentation and quotes of this line"],
    ),
    "missing model": (
        ("model: demo", "model: ./nowhere"),
        [
            "1:1: model: ./nowhere is no directory, no hub id (OWNER/NAME), "
            "and no model that a plugin ships; known: demo"
        ],
    ),
}


def validate(path: Path):
    return CliRunner().invoke(app, ["validate", str(path)], env={"COLUMNS": "300"})


def test_the_good_file_is_good(tmp_path: Path):
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    done = validate(path)
    assert done.exit_code == 0, done.output
    assert "7 stages, no problems" in done.output


@pytest.mark.parametrize("name", BROKEN)
def test_one_thing_broken(tmp_path: Path, name: str):
    (old, new), expected = BROKEN[name]
    path = tmp_path / "broken.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    done = validate(path)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    for text in expected:
        assert text in done.output
    assert done.output.startswith(f"{path}:")
    assert "1 problem; nothing was run" in done.output


def test_everything_broken_at_once(tmp_path: Path):
    text = GOOD
    for name in ("unknown option", "wrong type", "missing model", "unknown stage"):
        text = text.replace(*BROKEN[name][0])
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    done = validate(path)
    assert done.exit_code == 2
    assert "4 problems; nothing was run" in done.output
    for line, part in ((1, "model:"), (5, "obsevre"), (7, "seed"), (9, "treshold")):
        assert any(row.startswith(f"{path}:{line}:") and part in row for row in done.output.splitlines())


def test_no_such_file():
    done = CliRunner().invoke(app, ["validate", "quickstrat"])
    assert done.exit_code == 2
    assert "no pipeline quickstrat; did you mean quickstart?" in done.output
