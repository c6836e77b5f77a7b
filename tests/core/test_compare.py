"""`moefold compare` over reports: groups of equal bytes, refusals with a remedy, names, and tables for any width."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moefold.cli import app
from moefold.compare import show
from moefold.comparison import Cost, compare
from moefold.errors import InputError
from moefold.report_schema import VERSION
from moefold.verdict import verdicts


def step(uses: str, **options: Any) -> dict[str, Any]:
    return {"id": uses, "uses": uses, "with": options}


def report(path: Path, **changes: Any) -> dict[str, Any]:
    """What a run leaves: 1,000 bytes of 16-bit experts became `after` bytes, at `increase` nats per token."""
    given = {"after": 500, "increase": 0.1, "fingerprint": "f", "before_loss": 2.0, "digest": "d", "tokens": 64,
             "calibrated": "c", "steps": [step("pair.random"), step("pack.exponent")], "experts": [4, 2],
             "device": "cpu", "more": {}} | changes  # fmt: skip
    row = {
        "text": "prose", "tokens": given["tokens"], "loss_before": given["before_loss"],
        "loss_after": given["before_loss"] + given["increase"], "loss_increase": given["increase"],
        "perplexity_before": 7.389, "perplexity_after": 8.0, **given["more"],
    }  # fmt: skip
    spent = {"tasks": 1, "to_run": 0, "ran": 0, "seconds": 0.0, "peak_bytes": 0, "peak_device_bytes": 0,
             "stored_seconds": 1.5, "stored_peak_bytes": 10_000, "stored_peak_device_bytes": 0}  # fmt: skip
    made: dict[str, Any] = {
        "version": VERSION,
        "pipeline": {"model": "org/model", "stages": []},
        "source": "p.yaml",
        "versions": {},
        "activity": {},
        "packed": {},
        "reduced": {},
        "warnings": [],
        "device": given["device"],
        "model": {"name": "org/model", "fingerprint": given["fingerprint"], "expert_weights": 500},
        "methods": {
            "save": {
                "steps": given["steps"], "through": [], "own": ["pack", "save"],
                "calibration": ["text", "forward", "observe"], "texts": ["text"],
                "metrics": ["evaluate"], "baselines": ["baseline"],
            }
        },
        "texts": {"text": {"all": {"name": "book", "samples": 4, "length": 8, "digest": given["calibrated"]}}},
        "saved": {
            "save": {
                "all": {
                    "path": str(path),
                    "files": {},
                    "experts": {"0": given["experts"], "1": given["experts"]},
                    "expert_bytes": {"before": 1000, "after": given["after"]},
                    "checkpoint_bytes": {"before": 2000, "after": 1000 + given["after"]},
                }
            }
        },
        "baselines": {"baseline": {"all": {"digests": {"prose": given["digest"]}}}},
        "metrics": {"evaluate": {"all": {"title": "loss", "rows": [row]}}},
        "stages": {
            "text": spent, "observe": spent, "forward": spent | {"stored_peak_bytes": 90_000}, "save": spent,
            "pack": spent | {"stored_peak_device_bytes": 7000}, "evaluate": spent | {"stored_peak_bytes": 10**9},
        },
    }  # fmt: skip
    return made | {"verdicts": verdicts(made)}


def saved(path: Path, **changes: Any) -> Path:
    """A directory as a run leaves it."""
    path.mkdir(parents=True)
    (path / "moefold.json").write_text(json.dumps(report(path, **changes)))
    return path


def refused(*places: Path) -> str:
    with pytest.raises(InputError) as caught:
        compare(places)
    return str(caught.value)


def test_rows_stand_by_bytes_and_within_one_percent_by_loss(tmp_path):
    made = {"big": (750, 0.3), "worse": (500, 0.2), "better": (496, 0.1), "small": (494, 0.0), "best": (495, 0.05)}
    places = [saved(tmp_path / name, after=after, increase=loss) for name, (after, loss) in made.items()]
    found = compare(places)
    assert [(row.run, row.group) for row in found.rows] == [
        ("big", 1), ("best", 2), ("better", 2), ("worse", 2), ("small", 3)
    ]  # fmt: skip
    assert found.uncompressed.losses["prose"].loss == 2.0
    assert (found.uncompressed.expert_bytes, found.uncompressed.bits_per_weight) == (1000, 16.0)
    assert (found.rows[0].ratio, found.rows[0].bits_per_weight) == (0.75, 12.0)


def test_seconds_and_peaks_are_the_stored_ones_of_each_part(tmp_path):
    (row,) = compare([saved(tmp_path / "a")]).rows
    assert row.own == Cost(3.0, 10_000, 7000)
    assert row.calibration == Cost(4.5, 90_000, 0)
    assert (row.experts, row.per_layer) == ((8, 4), "4 -> 2")


def test_a_method_is_its_steps_and_what_is_not_default(tmp_path):
    steps = [step("group.by_use", fraction=0.75), step("mergemoe", target="routed", skip=[0])]
    (row,) = compare([saved(tmp_path / "a", steps=steps)]).rows
    assert row.method == "group.by_use(fraction=0.75) -> mergemoe(target=routed, skip=[0])"


@pytest.mark.parametrize(
    ("uses", "random"), [("group.random", True), ("prune.random", True), ("pair.random", False), ("prune.reap", False)]
)
def test_a_random_baseline_is_marked(tmp_path, uses, random):
    found = compare([saved(tmp_path / "a", steps=[step(uses), step("average")])])
    assert found.rows[0].random is random
    assert ("a (random)" in printed(found, 200)) is random
    assert ("random baseline: " in printed(found, 200)) is random


def test_names_are_as_short_as_differs(tmp_path):
    places = [saved(tmp_path / name) for name in ("one/packed", "two/packed", "merged")]
    assert [row.run for row in compare([*places, places[2]]).rows] == [
        "one/packed", "two/packed", "merged", "merged #2"
    ]  # fmt: skip


def test_a_work_directory_and_its_report_stand_for_the_last_run(tmp_path):
    (tmp_path / ".moefold").mkdir()
    file = tmp_path / ".moefold" / "report.json"
    file.write_text(json.dumps(report(tmp_path / "out" / "packed")))
    for place in (tmp_path / ".moefold", file):
        assert [row.run for row in compare([place]).rows] == ["packed"]


def test_a_run_that_saved_twice_gives_the_one_that_is_named_or_both(tmp_path):
    two = report(tmp_path / "a")
    for part in ("methods", "saved"):
        two[part]["again"] = json.loads(json.dumps(two[part]["save"]))
    two["saved"]["again"]["all"]["path"] = str(tmp_path / "b")
    two["saved"]["again"]["all"]["expert_bytes"]["after"] = 250
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "moefold.json").write_text(json.dumps(two))
    (tmp_path / "report.json").write_text(json.dumps(two))
    assert [(row.run, row.expert_bytes) for row in compare([tmp_path / "b"]).rows] == [("b", 250)]
    assert [row.run for row in compare([tmp_path / "report.json"]).rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "g", "before_loss": 2.1}, "fingerprints differ"),
        ({"digest": "e"}, "the text prose is another in a than in b"),
        ({"tokens": 128}, "the text prose has 64 tokens in a and 128 in b"),
    ],
)
def test_what_is_not_alike_is_refused_with_both_names(tmp_path, changes, message):
    told = refused(saved(tmp_path / "a"), saved(tmp_path / "b", **changes))
    assert told.startswith("these runs cannot be compared:")
    assert message in told


def test_other_evaluation_texts_are_refused(tmp_path):
    other = report(tmp_path / "b")
    other["metrics"]["evaluate"]["all"]["rows"][0]["text"] = "code"
    (tmp_path / "b.json").write_text(json.dumps(other))
    assert "was evaluated on prose, and b on code" in refused(saved(tmp_path / "a"), tmp_path / "b.json")


def test_touched_files_of_one_model_are_a_warning_and_so_are_other_devices(tmp_path):
    places = [saved(tmp_path / "a"), saved(tmp_path / "b", fingerprint="g", before_loss=2.001, device="cuda")]
    found = compare(places).warnings
    assert ["taken for the same model" in found[0], "neither their seconds nor" in found[1], len(found)] == [
        True, True, 2
    ]  # fmt: skip


def test_other_calibration_texts_are_a_warning(tmp_path):
    assert compare([saved(tmp_path / "a"), saved(tmp_path / "b")]).warnings == []
    (warning,) = compare([tmp_path / "a", saved(tmp_path / "c", calibrated="other")]).warnings
    assert "calibrated on different texts" in warning
    assert "c on book (4 x 8 tokens)" in warning


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"moefold": "0.1.0", "saved": {}}, "did not come to its end; give its command again"),
        ({"version": 1, "pipeline": {}}, "is a report of version 1"),
        ({"weights": 3}, "is no report of a run; give a directory that moefold saved"),
        ([1], "is no report of a run"),
        ("no json", "cannot be read as a report"),
    ],
)
def test_what_is_no_report_says_what_to_give(tmp_path, content, message):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "moefold.json").write_text(text)
    assert message in refused(tmp_path)


def test_other_places_say_what_to_give(tmp_path):
    assert "no file or directory" in refused(tmp_path / "none")
    assert "holds neither moefold.json nor report.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "the uncompressed model is in the table anyway" in refused(tmp_path)
    unmeasured, empty = report(tmp_path), report(tmp_path)
    unmeasured["methods"]["save"]["metrics"] = []
    (tmp_path / "report.json").write_text(json.dumps(unmeasured))
    assert "add evaluate.baseline and evaluate.perplexity" in refused(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(empty | {"methods": {}}))
    assert "saved no checkpoint" in refused(tmp_path)


def printed(found: Any, width: int) -> str:
    out = io.StringIO()
    show(found, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_every_figure_is_printed_whole_at_any_width(tmp_path, width):
    steps = [step("group.hierarchical", fraction=0.75, linkage="average"), step("mergemoe", target="routed"),
             step("pair.similar"), step("puzzlemoe", threshold=0.25), step("pack.exponent")]  # fmt: skip
    text = printed(compare([saved(tmp_path / name, steps=steps) for name in ("mergemoe-published-75", "b")]), width)
    assert max(map(len, text.splitlines())) <= width
    for figure in (
        "mergemoe-published-75", "uncompressed", "4 -> 2", "500 B", "0.500x", "8.00", "2.1000", "+0.1000", "8.000",
        "3.0", "4.5", "90.00 KB", "10.00 KB + 7.00 KB", "group.hierarchical", "pack.exponent",
    ):  # fmt: skip
        assert figure in text
    assert "…" not in text


def test_json_and_csv_hold_the_same_rows(tmp_path):
    places = [str(saved(tmp_path / name, after=after)) for name, after in (("a", 500), ("b", 250))]
    done = CliRunner().invoke(app, ["compare", *places, "--json", "--csv", str(tmp_path / "rows.csv")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["texts"] == {"prose": 64}
    assert [row["expert_bytes"] for row in (found["uncompressed"], *found["rows"])] == [1000, 500, 250]
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [(row["run"], row["expert_bytes"], row["prose_increase"], row["own_seconds"]) for row in rows] == [
        ("uncompressed", "1000", "", ""), ("a", "500", "0.1", "3.0"), ("b", "250", "0.1", "3.0")
    ]  # fmt: skip


def test_the_command_prints_a_refusal_without_a_traceback(tmp_path):
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "no file or directory" in done.output.replace("\n", " ")
