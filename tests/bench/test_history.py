"""A history of figures: it comes back as written, a drop beyond its margin fails, and bad lines say why."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from typer.testing import CliRunner

from models import tiny
from moefold import Benchmark, Figure, Workbench, benchmark, hookimpl, hooks, measuring
from moefold.cli import app
from moefold.errors import InputError, PluginError
from moefold.history import Record, append, read
from moefold.history_change import against
from moefold.history_page import BEGIN, END, page, replaced
from moefold.hooks import Registry
from moefold_plugins.benchmarks import moefold_benchmarks

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "bench" / "history.jsonl"
DOCUMENT = ROOT / "docs" / "regressions.md"
MACHINE = "invented CPU"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def bench(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def figures(speed: float = 2.0, loss: float = 0.1, tiny_loss: float = 0.0) -> dict[str, Figure]:
    return {
        "layer / packed / dense": Figure(speed, "more", 0.05),
        "quality.one / loss increase on prose": Figure(loss, "less", 0.05, 0.001),
        "quality.two / loss increase on prose": Figure(tiny_loss, "less", 0.05, 0.001),
    }


def record(date: str = "2001-02-03", machine: str = MACHINE, **values: float) -> Record:
    return Record(date, "abc", machine, {"torch": "9"}, "invented", figures(**values))


@pytest.fixture
def past(tmp_path: Path) -> Path:
    path = tmp_path / "history.jsonl"
    append(path, record(speed=1.0))
    append(path, record("2001-02-04", "another", speed=9.0))
    append(path, record("2001-02-05"))
    return path


def test_what_is_written_comes_back(past):
    assert read(past) == [record(speed=1.0), record("2001-02-04", "another", speed=9.0), record("2001-02-05")]
    assert all("NaN" not in line for line in past.read_text().splitlines())


@pytest.mark.parametrize(
    ("values", "failed"),
    [
        ({}, []),
        ({"speed": 1.91, "loss": 0.1059, "tiny_loss": 0.0009}, []),
        ({"speed": 3.0, "loss": 0.01, "tiny_loss": -1.0}, []),
        ({"speed": 1.89}, ["layer / packed / dense"]),
        ({"loss": 0.1061}, ["quality.one / loss increase on prose"]),
        ({"tiny_loss": 0.0011}, ["quality.two / loss increase on prose"]),
    ],
)
def test_only_what_is_worse_by_more_than_its_margin_fails(past, values, failed):
    found = against(read(past), record("2001-03-01", **values))
    assert [change.name for change in found.failed] == failed
    assert len(found.found) == 3
    assert all(change.since.date == "2001-02-05" for change in found.found)


def test_a_figure_is_held_against_its_own_last_value(past):
    append(past, replace(record("2001-02-06"), figures={"quality.one / loss increase on prose": Figure(0.5, "less")}))
    found = against(read(past), record("2001-03-01"))
    assert [change.before.value for change in found.found] == [2.0, 0.5, 0.0]


def test_a_figure_of_a_measured_case_that_is_gone_is_told(past):
    kept = {n: f for n, f in figures().items() if "two" not in n} | {"quality.two / expert bytes": Figure(1, "less")}
    found = against(read(past), replace(record(), figures=kept))
    assert found.gone == ("quality.two / loss increase on prose",)
    assert found.new == ("quality.two / expert bytes",)


def test_another_kind_of_machine_has_no_past(past):
    with pytest.raises(InputError, match=r"nothing of invented on elsewhere .it has runs on: invented CPU; another"):
        against(read(past), record(machine="elsewhere"))


LINE = json.loads(record().line())
BAD = {
    "not json": ("{oops", r"history\.jsonl:1: Invalid JSON.*moefold bench record"),
    "unknown key": (json.dumps(LINE | {"more": 1}), r":1: more: Extra inputs"),
    "no figures": (json.dumps(LINE | {"figures": {}}), r":1: figures: .*at least 1"),
    "a later format": (json.dumps(LINE | {"moefold": 2}), r":1: moefold: Input should be 1"),
    "text": (json.dumps(LINE | {"figures": {"a / b": {"value": "x", "better": "more"}}}), r"figures\.a / b\.value"),
    "nan": (json.dumps(LINE | {"figures": {"a": {"value": float("nan"), "better": "more"}}}), r"finite|NaN|JSON"),
    "which way": (json.dumps(LINE | {"figures": {"a": {"value": 1, "better": "up"}}}), r"'more' or 'less'"),
    "empty": ("\n\n", "is empty"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=list(BAD))
def test_bad_lines_say_where_and_what(text, message, tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read(path)
    assert "error: " in bench("history", path, code=2)
    assert "error: " in bench("record", path, code=2)
    assert path.read_text() == text


# -- benchmarks of plugins

PIPELINE = """\
model: MODEL
stages:
  - {id: text, uses: text.stdlib, with: {part: calibrate, samples: 2, length: 32}}
  - {uses: forward, needs: {text: text}}
  - {uses: observe}
  - uses: pair.random
  - uses: puzzlemoe
  - uses: pack.exponent
  - {uses: save, with: {to: saved}}
  - {id: prose, uses: text.prose, with: {samples: 2, length: 32}}
  - {uses: evaluate.baseline, needs: {texts: [prose]}}
  - {uses: evaluate.perplexity}
"""


def test_quality_is_bytes_and_loss(tmp_path):
    text = PIPELINE.replace("MODEL", str(tiny("qwen3_moe", tmp_path / "model")))
    workbench = Workbench(tmp_path)
    found = workbench.quality(text)
    assert set(found) == {"expert bytes", "loss increase on prose"}
    assert found["expert bytes"] == Figure(0.5, "less", measuring.BYTES_MARGIN)
    assert found["loss increase on prose"].slack == measuring.LOSS_SLACK
    lossless = workbench.quality(
        text.replace("  - uses: pair.random\n", "  - uses: pair.random\n    with: {fraction: 0.0}\n")
    )
    assert lossless["expert bytes"].value == 1.0
    assert lossless["loss increase on prose"].value == 0.0 != found["loss increase on prose"].value


def test_quality_wants_one_evaluated_checkpoint(tmp_path):
    text = PIPELINE.replace("MODEL", str(tiny("qwen3_moe", tmp_path / "model"))).partition("  - {id: prose")[0]
    with pytest.raises(InputError, match="1 stages save, and 0 texts were evaluated; quality is of one checkpoint"):
        Workbench(tmp_path).quality(text)


@pytest.mark.slow
def test_stages_that_know_bytes_of_an_expert_do_not_count_as_saved(tmp_path):
    """`damage.pairs` tells them, too."""
    (one,) = (one for one in moefold_benchmarks() if one.name == "quality.budget")
    assert one.measure(Workbench(tmp_path))["expert bytes"].value == pytest.approx(0.75, rel=0.01)


def test_what_is_no_figure_is_refused(tmp_path):
    for wrong, message in ((1.0, "must return figures by name"), ({}, "must return"), ({"a": 1.0}, "must return")):
        with pytest.raises(InputError, match=message):
            Benchmark("wrong", lambda _, value=wrong: value).figures(Workbench(tmp_path))
    with pytest.raises(InputError, match=r"nan.*finite"):
        Benchmark("nan", lambda _: {"loss": Figure(float("nan"), "less")}).figures(Workbench(tmp_path))
    with pytest.raises(PluginError, match="a name without /"):
        benchmark("a / b")


@pytest.fixture
def plugin(monkeypatch) -> dict[str, float]:
    """The only plugin that gives benchmarks, and what they will measure."""
    values = {"speed": 2.0, "loss": 0.1}

    @benchmark("mine.speed")
    def speed(_: Workbench) -> dict[str, Figure]:
        """Nothing but a number."""
        return {"packed / dense": Figure(values["speed"], "more")}

    @benchmark("mine.quality")
    def quality(_: Workbench) -> dict[str, Figure]:
        return {"loss": Figure(values["loss"], "less", 0.1)}

    class Plugin:
        @hookimpl
        def moefold_benchmarks(self) -> list[Benchmark]:
            return [speed, quality]

    assert speed.summary == "Nothing but a number."
    monkeypatch.setattr(hooks, "_installed", lambda: Registry([("mine", Plugin(), "here")]))
    return values


def test_an_injected_drop_fails_and_names_the_case(plugin, tmp_path):
    path = tmp_path / "history.jsonl"
    assert "2 figures of mine.quality, mine.speed" in bench("record", path)
    assert "2 figures compared, 0 worse by more than their margins" in bench("compare", path)
    plugin["loss"] = 0.109
    bench("compare", path)
    plugin["speed"] = 1.8
    told = bench("compare", path, code=1)
    assert re.search(r"error: mine.speed / packed / dense: from 2 \(.*\) to 1.8; at least 1.9", told)
    assert "2 figures compared, 1 worse by more than their margins" in told
    assert "mend it, or record the new figures if they are meant" in told
    assert "1 figures compared, 0 worse" in bench("compare", path, "--cases", "*.quality")
    assert bench("compare", path, "--margin", "0.2")
    bench("record", path)  # meant
    assert bench("compare", path)
    assert len(read(path)) == 2


def test_cases_are_chosen_by_name(plugin, tmp_path):
    bench("record", tmp_path / "h.jsonl", "--cases", "mine.sp*")
    assert list(read(tmp_path / "h.jsonl")[0].figures) == ["mine.speed / packed / dense"]
    told = bench("record", tmp_path / "h.jsonl", "--cases", "mine.sped", code=2)
    assert "no benchmark is called mine.sped; did you mean mine.speed?" in told
    assert "the name of a history ends in .jsonl" in bench("record", tmp_path / "h.json", code=2)


def test_a_new_kind_of_machine_is_an_error_or_a_warning(plugin, past):
    assert "the history has nothing of mine.quality, mine.speed" in bench("compare", past, code=2)
    assert "so nothing was compared; record one" in bench("compare", past, "--allow-new")


# -- runs that others wrote


def pytest_benchmark(path: Path, **times: float) -> Path:
    """A run of a group of two, as pytest-benchmark writes it."""
    entries = [
        {"name": name, "group": "decode", "stats": {"median": seconds}, "extra_info": {"baseline": name == "dense"}}
        for name, seconds in times.items()
    ]
    entries[0]["extra_info"]["figures"] = {"error": {"value": 0.01, "better": "less", "margin": 0.2}}
    info = {"python_version": "3.0", "cpu": {"brand_raw": MACHINE}}
    run = {"machine_info": info, "commit_info": {"id": "0123456789ab", "dirty": True}, "benchmarks": entries}
    path.write_text(json.dumps(run | {"datetime": "2001-02-03T00:00:00"}))
    return path


def test_pytest_benchmarks_ratios_are_kept_and_its_times_are_not(tmp_path):
    path = tmp_path / "h.jsonl"
    bench("record", path, pytest_benchmark(tmp_path / "a.json", packed=1e-3, dense=2e-3))
    (found,) = read(path)
    assert (found.machine, found.commit, found.versions) == (MACHINE, "012345678+", {"python": "3.0"})
    assert found.figures == {
        "packed / error": Figure(0.01, "less", 0.2),
        "decode / packed against dense": Figure(2.0, "more", 0.05),
    }
    slower = pytest_benchmark(tmp_path / "b.json", packed=3e-3, dense=6e-3)  # another machine's day
    bench("compare", path, slower)
    bench("compare", tmp_path / "a.json", slower)
    told = bench("compare", path, pytest_benchmark(tmp_path / "c.json", packed=2.2e-3, dense=4e-3), code=1)
    assert "error: decode / packed against dense: from 2 (2001-02-03, 012345678+) to 1.818; at least 1.9" in told


def test_a_pytest_benchmark_run_without_figures_says_what_to_write(tmp_path):
    run = pytest_benchmark(tmp_path / "a.json", packed=1e-3)
    content = json.loads(run.read_text())
    content["benchmarks"][0]["extra_info"] = {}
    run.write_text(json.dumps(content))
    assert "none of its 1 benchmarks has a figure to keep; give one benchmark" in bench(
        "record", tmp_path / "h.jsonl", run, code=2
    )
    assert not (tmp_path / "h.jsonl").exists()


def test_ratios_of_the_layer_are_held_against_the_history(tmp_path):
    path, run = tmp_path / "h.jsonl", synthetic.content()
    bench("record", path, synthetic.write(tmp_path / "a.json"), "--commit", "abc")
    assert len(read(path)[0].figures) == 9
    assert read(path)[0].commit == "abc"
    synthetic.change(run, "mixtral-8x7b-16-balanced", "packed", 1.10)
    told = bench("compare", path, synthetic.write(tmp_path / "b.json", run), code=1)
    assert "9 figures compared, 3 worse by more than their margins" in told
    assert "error: mixtral-8x7b-16-balanced / packed / dense: from 1.75 (2001-02-03, abc) to 1.591; at least" in told


def test_a_saved_run_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(PIPELINE.replace("MODEL", str(tiny("qwen3_moe", tmp_path / "model"))))
    assert CliRunner().invoke(app, ["run", "p.yaml", "--device", "cpu"]).exit_code == 0
    bench("record", "h.jsonl", "saved")
    (found,) = read(tmp_path / "h.jsonl")
    assert found.figures["saved / expert bytes"].value == 0.5
    assert "saved / loss increase on prose" in found.figures
    assert found.machine.startswith("moefold run on cpu, Python 3.")


# -- pages


def test_the_page_shows_every_machine_and_figure(past, tmp_path):
    append(past, record("2001-03-01", speed=1.0))
    bench("history", past, "--html", tmp_path / "history.html")
    text = (tmp_path / "history.html").read_text()
    made = page(read(past))
    assert [heading for _, heading, _ in made.sections] == [MACHINE, "another"]
    assert len(made.figures) == 4  # a picture for each measure and machine
    assert made.figures["history-0-0"]["data"][0]["y"] == [1.0, 2.0, 1.0]
    assert made.figures["history-0-0"]["data"][0]["x"] == ["2001-02-03, abc", "2001-02-05, abc", "2001-03-01, abc"]
    assert text.count('class="badge bad">worse') == 1
    assert "default-src 'none'" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_every_curve_without_an_error(past, tmp_path):
    """Headless, with the network's names unresolvable; `data-drawn` is set when the last figure is there."""
    bench("history", past, "--html", tmp_path / "history.html")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=390,844"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", (tmp_path / "history.html").as_uri()]
    done = subprocess.run([str(CHROMIUM), *options], capture_output=True, text=True, timeout=120, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert 'data-drawn="all"' in done.stdout[:500]
    assert done.stdout.count('class="point"') == 9  # two runs of one machine and one of another, three figures each


def test_tables_stand_between_the_markers(past, tmp_path):
    append(past, record("2001-03-01", speed=1.0))
    document = tmp_path / "page.md"
    document.write_text(f"# Title\n\n{BEGIN}\nwhat was here\n{END}\nafter\n")
    bench("history", past, "--page", document)
    text = document.read_text()
    assert "| case | packed / dense (more) | loss increase on prose (less) |" in text
    assert "| layer | **1**, before 2 | – |" in text
    assert "| quality.one | – | 0.1, before 0.1 |" in text
    assert f"### {MACHINE}\n\nRuns in history.jsonl: 2001-02-03, abc; 2001-02-05, abc; 2001-03-01, abc." in text
    assert "what was here" not in text
    assert text.startswith("# Title\n")
    assert text.endswith(f"{END}\nafter\n")
    document.write_text("nothing")
    assert "write these two lines where the tables belong" in bench("history", past, "--page", document, code=2)


def test_the_stored_page_is_what_the_stored_history_makes():
    again = "moefold bench history tests/bench/history.jsonl --page docs/regressions.md"
    assert replaced(DOCUMENT, read(STORED), STORED) == DOCUMENT.read_text(encoding="utf-8"), f"run: {again}"


def test_ci_compares_with_the_stored_history():
    command = (ROOT / ".ci" / "run").read_text().partition("moefold bench compare ")[2]
    cases = re.search(r"--cases '(.+?)'", command)
    assert cases
    assert command.startswith("tests/bench/history.jsonl ")
    chosen = measuring.chosen(cases[1].split(","), Registry.installed().benchmarks)
    recorded = {case for one in read(STORED) for case in one.cases()}
    assert {one.name for one in chosen} <= recorded
