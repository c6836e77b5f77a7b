"""`moefold bench run`, on what any machine can measure."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from moefold.cli import app
from moefold_kernels.bench import CONTENDERS, TINY, Contender, Shape, ahead, kernel, results
from moefold_kernels.errors import BenchmarkError


def bench_run(*arguments):
    common = ["bench", "run", "--device", "cpu", "--rounds", "2"]
    return CliRunner().invoke(app, [*common, *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def some(monkeypatch):
    """Contenders that any CPU can run, whatever the environment: no kernel of ours, in any format."""
    for name, one in CONTENDERS.items():
        if one.can is kernel.can_run:
            monkeypatch.setitem(CONTENDERS, name, replace(one, can=lambda device: (False, "not in this test")))


def test_a_run_is_printed_and_kept(some, tmp_path):
    done = bench_run("--tokens", "1,3", "--json", tmp_path / "run.json")
    assert done.exit_code == 0, done.output
    for kernels in ("packed", "dense", "pair4", "pair8"):
        assert f"left out: {kernels}: not in this test" in done.output
    assert "tiny-3-balanced-grouped_mm: " in done.output
    run = results.read(tmp_path / "run.json")
    assert [(row.case, row.contender) for row in run.rows] == [
        (f"tiny-{tokens}-balanced", name) for tokens in (1, 3) for name in ("grouped_mm", "reference")
    ]
    assert ("tiny-3-balanced", "reference", "grouped_mm") in run.ratios()


def test_hits_and_routing_are_the_users(some, tmp_path):
    options = ["--tokens", "4", "--contenders", "reference", "--json", tmp_path / "run.json"]
    assert bench_run(*options, "--hit", "5").exit_code == 0
    (row,) = results.read(tmp_path / "run.json").rows
    assert row.experts_hit == 5
    assert bench_run(*options, "--routing", "skewed").exit_code == 0
    (row,) = results.read(tmp_path / "run.json").rows
    assert row.case == "tiny-4-skewed"


def test_a_wrong_kernel_is_told_and_the_rest_is_kept(some, monkeypatch, tmp_path):
    right = CONTENDERS["reference"]
    wrong = lambda experts: lambda batch: right.prepare(experts)(batch) * 1.5  # noqa: E731
    monkeypatch.setitem(CONTENDERS, "reference", Contender("reference", "pairs", wrong, right.can))
    done = bench_run("--tokens", "3", "--json", tmp_path / "run.json")
    assert done.exit_code == 1
    assert "not timed: tiny-3-balanced-reference: the output is off float64 by 5" in done.output
    assert "error: 1 of 2 gave wrong results and were not timed" in done.output
    assert [row.contender for row in results.read(tmp_path / "run.json").rows] == ["grouped_mm"]


def test_a_process_that_dies_while_compiling_costs_time_alone(some, monkeypatch):
    def dying(*_):
        raise BenchmarkError("a process that compiles kernels died")

    monkeypatch.setattr(ahead, "compile_chosen", dying)
    done = bench_run("--tokens", "3", "--contenders", "reference")
    assert done.exit_code == 0, done.output
    assert "died; they are compiled where they are first run" in done.output
    assert "tiny-3-balanced-reference: " in done.output


def test_what_cannot_be_compiled_is_told(some, monkeypatch):
    class Job(NamedTuple):
        shape: Shape = TINY
        tokens: int = 3
        format: str = "pair4"
        plan: str = "a plan"

    ready = ahead.Ready(1, 1, 0.0, {Job(): "too large"})
    monkeypatch.setattr(ahead, "compile_chosen", lambda *_: ready)
    done = bench_run("--tokens", "3", "--contenders", "reference")
    assert "cannot be compiled: tiny, 3 tokens, pair4: a plan: too large" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "mixtral"], "there is no shape mixtral; did you mean mixtral-8x7b?"),
        (["--shapes", "mixtral-8x7b"], "--shapes mixtral-8x7b takes a GPU; on a CPU there is --shapes tiny"),
        (["--contenders", "pakced"], "there is no contender pakced; did you mean packed?"),
        (["--contenders", "packed"], "packed cannot run on cpu: not in this test"),
        (["--tokens", "1,two"], "--tokens 1,two: write whole numbers"),
        (["--routing", "even"], "there is no routing even"),
        (["--json", "no/such/place/run.json"], "there is no such directory"),
        (["--tokens", "1", "--hit", "7"], "7 experts hit are not possible; write 2 to 2"),
    ],
)
def test_what_the_user_got_wrong(options, message, some):
    done = bench_run(*options)
    assert done.exit_code == 2
    assert message in done.output
