"""Two runs compared, and the files that are no runs."""

from __future__ import annotations

import json

import pytest
import synthetic
from typer.testing import CliRunner

from moefold.cli import app
from moefold_kernels.bench import comparison, results
from moefold_kernels.errors import BenchmarkError

MIXTRAL_16 = "mixtral-8x7b-16-balanced"


def compare(*arguments):
    return CliRunner().invoke(app, ["bench", "compare", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.fixture
def before(tmp_path):
    return synthetic.write(tmp_path / "before.json")


def test_ratios_are_within_the_run(before):
    ratios = results.read(before).ratios()
    assert len(ratios) == 9
    assert ratios[MIXTRAL_16, "packed", "dense"] == pytest.approx(1.75)
    assert ratios[MIXTRAL_16, "packed", "grouped_mm"] == pytest.approx(2.5)
    floor = 4 * 6 * 4096 * 14336 / 4e12
    assert ratios[MIXTRAL_16, "packed", "floor"] == pytest.approx(floor / 400e-6)


def test_rows_know_their_shares(before):
    (row,) = [r for r in results.read(before).rows if (r.case, r.contender) == (MIXTRAL_16, "packed")]
    assert row.bandwidth_share == pytest.approx(row.floor_share) == pytest.approx(352.3e-6 / 400e-6, rel=1e-3)


def test_a_slower_machine_is_no_regression(before, tmp_path):
    """Everything 25 % slower, bandwidth too: not one ratio moves."""
    run = synthetic.content("another invented device")
    for one in run["benchmarks"]:
        one["stats"]["median"] *= 1.25
        one["extra_info"]["floor"] *= 1.25
    done = compare(before, synthetic.write(tmp_path / "after.json", run))
    assert done.exit_code == 0, done.output
    assert "different devices: invented device, then another invented device" in done.output
    assert "9 ratios compared, 0 fell by more than 5%, 0 in one run only" in done.output


def test_a_dropped_ratio_fails_and_the_margin_decides(before, tmp_path):
    run = synthetic.content()
    synthetic.change(run, MIXTRAL_16, "packed", 1.10)
    after = synthetic.write(tmp_path / "after.json", run)
    done = compare(before, after)
    assert done.exit_code == 1
    assert "9 ratios compared, 3 fell by more than 5%" in done.output
    assert "-9.1%" in done.output
    assert compare(before, after, "--margin", "0.1").exit_code == 0
    assert compare(after, before).exit_code == 0  # the other way round it is a gain
    found = comparison.compare(results.read(before), results.read(after))
    (worst, *_) = found.dropped(0.05)
    assert (worst.before, worst.after) == pytest.approx((1.75, 1.75 / 1.1))
    assert worst.relative == pytest.approx(1 / 1.1 - 1)


def test_missing_cases_are_named_and_counted(before, tmp_path):
    run = synthetic.content()
    run["benchmarks"] = run["benchmarks"][:6]
    run["machine_info"]["versions"]["torch"] = "10.0"
    done = compare(before, synthetic.write(tmp_path / "after.json", run))
    assert done.exit_code == 0
    assert "6 ratios compared, 0 fell by more than 5%, 3 in one run only" in done.output
    assert "after.json: qwen3-30b-a3b-16-balanced / packed / dense" in done.output
    assert "different torch: 9.9, then 10.0" in done.output
    back = compare(tmp_path / "after.json", before)
    assert "after.json: qwen3-30b-a3b-16-balanced / packed / floor" in back.output


def test_nothing_in_common_is_an_error(before, tmp_path):
    run = synthetic.content()
    for one in run["benchmarks"]:
        one["extra_info"]["case"] += "-other"
    done = compare(before, synthetic.write(tmp_path / "after.json", run))
    assert done.exit_code == 2
    assert "have no ratio in common; run the same cases" in done.output


def test_other_benchmarks_in_a_file_are_counted(before, tmp_path):
    run = synthetic.content()
    run["benchmarks"].append({"name": "packing", "stats": {"median": 1.0}, "extra_info": {}})
    done = compare(before, synthetic.write(tmp_path / "after.json", run))
    assert "after.json: 1 benchmarks of other things are not compared" in done.output


def broken(edit):
    run = synthetic.content()
    edit(run)
    return json.dumps(run)


BAD = {
    "not json": ("{\n  oops", r"2:3: not JSON: .*moefold bench run --json"),
    "a list": ("[]", "a JSON list, not an object"),
    "other json": ('{"a": 1}', "no machine_info, no benchmarks"),
    "foreign": ('{"machine_info": {}, "benchmarks": []}', r"machine_info.device is missing: not a run of moefold"),
    "empty": (broken(lambda run: run["benchmarks"].clear()), "none of its 0 benchmarks is of the layer"),
    "no time": (broken(lambda run: run["benchmarks"][2].pop("stats")), r"benchmarks\[2\].stats.median is None"),
    "zero": (broken(lambda run: run["benchmarks"][1]["stats"].update(median=0)), r"\[1\].stats.median is 0, not a pos"),
    "text": (
        broken(lambda r: r["benchmarks"][0]["extra_info"].update(tokens="16")),
        r"\[0\].extra_info.tokens is '16'",
    ),
    "nan": (broken(lambda r: r["benchmarks"][0]["extra_info"].update(floor=float("nan"))), "floor is nan"),
    "twice": (broken(lambda run: run["benchmarks"].append(run["benchmarks"][0])), "packed on .* is there twice"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=list(BAD))
def test_bad_files_say_where_and_what(text, message, before, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(BenchmarkError, match=rf"bad\.json.*{message}"):
        results.read(tmp_path / "bad.json")
    done = compare(before, tmp_path / "bad.json")
    assert done.exit_code == 2
    assert done.output.startswith("error: ")


def test_absent_and_binary_files(before, tmp_path):
    done = compare(tmp_path / "none.json", before)
    assert done.exit_code == 2
    assert "none.json: No such file or directory; write one with" in done.output
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert "not even text" in compare(before, tmp_path / "binary.json").output
