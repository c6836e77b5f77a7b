"""The schema of report.json: reports fit it with no field left over, it is published, and readers hold to it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from reports import loss_row, synthetic
from typer.testing import CliRunner

from moefold import report_schema, run_page, runs
from moefold.cli import app
from moefold.errors import InputError
from moefold.report import Times, build
from moefold.session import Session
from strict_reports import strictly

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs" / "report.schema.json"


def test_it_is_published_and_printed() -> None:
    done = CliRunner().invoke(app, ["schema", "report"])
    assert done.exit_code == 0
    made = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(made)
    same = json.loads(PUBLISHED.read_text(encoding="utf-8")) == made
    assert same, (
        "`moefold schema report > docs/report.schema.json`, and raise VERSION where a field changed its meaning"
    )


def test_a_planned_run_and_a_made_up_report_fit(tmp_path: Path) -> None:
    session = Session.open("quickstart", None, None, None, None, tmp_path / "work", "cpu")
    assert strictly(build(session.plan, {}, Times(), "cpu", session.store)) == []
    assert strictly(synthetic()) == []


def test_what_the_schema_does_not_name_would_be_seen() -> None:
    report = synthetic()
    report["verdicts"]["save"]["texts"][0]["luck"] = 1
    report["more"] = {}
    assert [one.rpartition(": ")[2] for one in strictly(report)] == [
        "Additional properties are not allowed ('more' was unexpected)",
        "Additional properties are not allowed ('luck' was unexpected)",
    ]
    assert report_schema.problems(report) == [], "readers take what they do not know"


def test_every_field_says_what_it_is() -> None:
    """By its own words, or by those of the kind of thing that it holds."""
    kinds = [one for one in vars(report_schema).values() if isinstance(one, type)]
    kinds = [one for one in kinds if issubclass(one, report_schema.Part) and one is not report_schema.Part]
    assert len(kinds) > 20
    assert all(kind.__doc__ for kind in kinds)
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| .+ \|$", page, flags=re.MULTILINE)
    assert set(table) == set(report_schema.Report.model_fields)


BROKEN: list[tuple[list[Any], Any, str]] = [
    (["version"], 2.5, "is a report of version 2.5, and this moefold reads version 2"),
    (
        ["verdicts", "save", "texts", 0, "loss_after"],
        "low",
        "verdicts.save.texts.0.loss_after: Input should be a valid",
    ),
    (["packed", "pack", "1", "pairs", 0], [1], "packed.pack.1.pairs.0: List should have at least 2 items"),
    (["events", 0, "event"], "slept", "events.0.event: Input should be 'started', 'failed' or 'finished'"),
    (["model"], None, "model: Input should be"),
]


@pytest.mark.parametrize(("place", "value", "message"), BROKEN, ids=lambda value: str(value)[:30])
def test_a_report_that_was_changed_is_refused_by_place(
    tmp_path: Path, place: list[Any], value: Any, message: str
) -> None:
    report = copy.deepcopy(synthetic())
    inner = report
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match=re.escape(message)):
        runs.read_report(tmp_path)


def test_a_model_that_broke_has_a_report_that_any_reader_takes(tmp_path: Path) -> None:
    """Losses that are not a number: null in the file, and told as such on the page that is built from it."""
    from moefold.html import write_report

    write_report(synthetic(rows=[loss_row("prose", [2.0, 2.0], [2.0, float("nan")])]), tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "report.json").read_text()
    report = json.loads(text, parse_constant=refuse)
    assert report["verdicts"]["save"]["texts"][0]["loss_after"] is None
    assert strictly(report) == []
    _, again = runs.read_report(tmp_path)
    assert "+nan" in run_page.page(again).render()
