"""Runs as they are written: read by us and by pytest-benchmark, and said of which kernels they are."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from moefold_kernels.bench import CONTENDERS, TINY, Case, record, results

CASE = Case(TINY, 5)


def test_a_written_run_is_read_by_us_and_by_pytest_benchmark(bench, tmp_path):
    entries = [record.measure(bench.prepare(CASE, CONTENDERS["grouped_mm"]), 2)]
    record.write(tmp_path / "run.json", bench.device, entries)
    run = results.read(tmp_path / "run.json")
    assert [row.seconds for row in run.rows] == [entries[0]["stats"]["median"]]
    assert run.versions["torch"] == torch.__version__
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["machine_info"]["node"] == ""
    assert written["machine_info"]["kernels"] == record.digest()
    tool = [sys.executable, "-m", "pytest_benchmark", "compare", str(tmp_path / "run.json")]
    done = subprocess.run(tool, capture_output=True, text=True, cwd=tmp_path)
    assert "tiny-5-balanced-grouped_mm" in done.stdout, done.stderr


def test_the_digest_is_of_every_file(monkeypatch, tmp_path):
    (tmp_path / "tables").mkdir()
    for name in ("a.py", "tables/b.json", "c.txt"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(record, "PACKAGE", tmp_path)
    found = {record.digest()}
    (tmp_path / "c.txt").write_text("2")  # neither code nor a table
    assert {record.digest()} == found
    for name in ("a.py", "tables/b.json"):
        (tmp_path / name).write_text("2")
        found.add(record.digest())
    (tmp_path / "a.py").rename(tmp_path / "d.py")
    assert len(found | {record.digest()}) == 4


def test_statistics_are_those_of_pytest_benchmark():
    from pytest_benchmark.stats import Stats

    theirs, data = Stats(), [3.0, 1.0, 2.0, 2.5, 40.0, 2.0, 1.5]
    for value in data:
        theirs.update(value)
    ours = record.statistics_of(data)
    same = set(theirs.as_dict()) - {"q1", "q3", "iqr", "hd15iqr"}  # quartiles have several definitions
    assert set(ours) == set(theirs.as_dict()) | {"iterations"}
    assert {key: ours[key] for key in same} == pytest.approx({key: theirs.as_dict()[key] for key in same})
