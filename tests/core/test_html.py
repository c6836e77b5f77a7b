"""The page of a report: whole, self-contained, in reading order, of valid figures; and what a verdict is told from."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
import torch
from PIL import Image
from reports import loss_row, synthetic
from rich.console import Console
from scipy import stats
from typer import Exit
from typer.testing import CliRunner

from moefold import compared_page, comparison, html, pictures, shades, terminal
from moefold.cli import app
from moefold.inside import Inside
from moefold.ledger import NAME, Ledger
from moefold.report import Times, build
from moefold.run_page import page
from moefold.session import Session
from moefold.verdict import expected_shares, interval, verdicts


def data_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(found)


def without_plotly(text: str) -> str:
    return re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)


def test_the_sections_stand_in_reading_order():
    text = page(synthetic()).render()
    assert re.findall(r"<section id=\"([a-z]+)\">", text) == [
        "verdict", "layers", "experts", "similarity", "samples", "provenance", "loading"
    ]  # fmt: skip


def test_nothing_is_fetched():
    text = page(synthetic()).render()
    assert "default-src 'none'" in text
    own = without_plotly(text)
    assert len(own) < 200_000
    assert len(text) > 3_000_000, "plotly.js is inside"
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", own)
    assert not re.search(r"\b(fetch\(|XMLHttpRequest|import\()", own)
    assert not re.search("https?://", own)


def test_text_from_outside_cannot_become_markup():
    report = synthetic()
    report["metrics"]["evaluate"]["all"]["rows"][0]["text"] = "<img src=x>"
    report["verdicts"] = verdicts(report)
    text = page(report).render()
    assert "&lt;/script&gt;&lt;b&gt;a prompt" in text
    assert "<img src=x>" not in text
    assert "&lt;few&gt; samples" in text
    assert data_of(text)["figures"]["increases-plot"]["data"][0]["y"] == ["<img src=x>"]


def test_every_figure_is_valid_plotly():
    figures = page(synthetic()).figures
    assert set(figures) == {"increases-plot", "errors-plot", "routing-plot", "masks-plot", "seconds-plot"}
    for figure in figures.values():
        plotly.graph_objects.Figure(figure)  # raises for a property that plotly does not know


def test_the_verdict_shows_bytes_intervals_and_the_gate():
    text = page(synthetic()).render()
    low, high = synthetic()["verdicts"]["save"]["texts"][0]["loss_increase_interval"]
    for part in (
        "0.500×",
        "2.00 KB → 1.00 KB",
        "pass: at most +0.2000",
        f"{low:+.4f} … {high:+.4f}",
        "passes its gate",
    ):
        assert part in text
    rows = [loss_row("prose", [2.0, 2.1, 2.2], [2.1, 2.5, 2.3], gate=0.19)]
    missed = page(synthetic(rows=rows)).render()
    assert "misses its gate" in missed
    assert "fail: at most +0.1900, within noise" in missed


def test_layers_show_errors_masks_and_flags():
    report = synthetic()
    text = page(report).render()
    for part in ("10.00%", "48.0 / 26.0 / 26.0<", "give 48.4% / 25.8% / 25.8%", "4.5", "2.00 GB", "exponent"):
        assert part in text
    assert ">2</span> / 1<" in text, "clipped, and flushed"
    report["pipeline"]["stages"][1]["uses"] = "puzzlemoe.compensated"
    assert "PuzzleMoE&#x27;s rule, at its threshold of 0.4, gives 48.4% / 25.8% / 25.8%" in page(report).render()
    report["metrics"].pop("layers")
    assert "add the stage evaluate.layers" in page(report).render()


def test_experts_have_partner_kept_share_and_flags():
    report = synthetic()
    made = page(report)
    layer = made.experts["layers"][1]
    assert (layer["number"], layer["tokens"]) == (1, report["activity"]["observe"]["1"]["tokens"])
    assert layer["flags"] == {0: ["dead"], 1: ["few tokens"]}
    for a, b in report["packed"]["pack"]["1"]["pairs"]:
        assert layer["group"][a] == f"shares words with {b}"
        assert [a, b] in layer["groups"]
    assert layer["kept"] == report["metrics"]["layers"]["all"]["rows"][1]["kept"]
    assert sum(layer["share"]) == pytest.approx(8, abs=0.01)
    a, b = report["packed"]["pack"]["1"]["pairs"][0]
    assert (layer["masks"][a], layer["masks"][b]) == ([0.48, 0.3, 0.22], [0.48, 0.22, 0.3])
    assert (layer["clipped"][a], layer["clipped"][b], sum(layer["clipped"])) == (2, 2, 4)
    assert [c["name"] for c in made.experts["columns"]][-3:] == ["masks", "clipped", "flushed"]
    assert "3 dead" in made.render()


def test_shares_follow_from_what_is_kept_where_pairs_were_not_counted():
    report = synthetic(layers=1, experts=4)
    facts = report["packed"]["pack"]["0"]
    facts |= {"pairs": [[2, 0]], "pair_counts": {}, "counts": facts["counts"] | {"zero": 0}}
    report["metrics"]["layers"]["all"]["rows"][0]["kept"] = [0.7, 1.0, 0.8, 1.0]
    (layer,) = Inside(report, "save").experts()
    assert layer["masks"] == [[0.5, 0.2, 0.3], None, [0.5, 0.3, 0.2], None]
    assert "clipped" not in layer
    facts["counts"]["zero"] = 1
    (layer,) = Inside(report, "save").experts()
    assert layer["masks"] == [None] * 4, "then kept shares do not tell"


def test_quantized_layers_name_their_scheme():
    report = synthetic(layers=1, experts=4) | {"packed": {}}
    told = {"scheme": "int4", "group": 64, "experts": 4, "route": None, "bytes": 9}
    report |= {"quantized": {"quantize": {"0": told}}}
    report["methods"]["save"]["own"].append("quantize")
    assert "int4, groups of 64" in page(report).render()


def test_speed_that_a_plugin_measured_stands_in_the_verdict():
    report = synthetic()
    rows = [{"batch": 1, "tokens per second before": 100.0, "after": 187.25}]
    report["metrics"]["speed"] = {"all": {"title": "decoding on one H200", "rows": rows}}
    verdict = page(report).render().partition('<section id="verdict">')[2].partition("</section>")[0]
    for part in ("decoding on one H200", "tokens per second before", "187.2"):
        assert part in verdict


def test_merged_and_pruned_experts_are_told_apart():
    report = synthetic(layers=1, experts=4)
    report["packed"] = {"pack": {"0": {"pairs": [[0, 1]], "dense": [], "counts": {}}}}
    report["reduced"] = {"merge": {"0": {"groups": [[0, 3], [2]], "figures": {"saliency": [4.0, 1.0, 2.0, 3.0]}}}}
    report["methods"]["save"]["own"].insert(0, "merge")
    report["metrics"]["layers"]["all"]["rows"][0]["kept"] = [0.5, 0.75]
    (layer,) = Inside(report, "save").experts()
    assert layer["group"] == [
        "merged with 3; shares words with merged 1", "pruned", "shares words with merged 0",
        "merged with 0; shares words with merged 1",
    ]  # fmt: skip
    assert layer["kept"] == [0.5, None, 0.75, 0.5]
    assert layer["saliency"] == [4, 1, 2, 3]
    assert layer["groups"] == [[0, 3]]


def test_what_a_report_does_not_tell_is_left_out():
    """An evaluation alone; a copy from a checkpoint; infinities."""
    report = synthetic()
    for name in ("similarity", "tasks", "events", "groups"):
        report.pop(name, None)
    assert "similarity" not in re.findall(r"<section id=\"([a-z]+)\">", page(report).render())
    alone = report | {"methods": {}, "verdicts": {}, "saved": {}, "metrics": {}}
    assert "saved no checkpoint" in page(alone).render()
    broken = page(synthetic(rows=[loss_row("prose", [2.0, 2.0], [2.0, math.nan])])).render()
    assert data_of(broken)["figures"]["increases-plot"]["data"][0]["x"] == [None]


def test_resumed_runs_are_told():
    text = page(synthetic()).render()
    assert "resumed: 1 tasks to run (the run before was killed)" in text


def test_sixty_layers_of_128_experts_stay_small():
    text = page(synthetic(60, 128)).render()
    assert len(text.encode()) < 15_000_000
    assert len(data_of(text)["experts"]["layers"]) == 60


def test_an_interval_is_students():
    values = [0.1, 0.3, 0.2, 0.6]
    low, high = stats.t.interval(0.95, 3, loc=0.3, scale=stats.sem(values))
    assert interval(values) == pytest.approx([low, high])
    assert interval([1.0]) is None
    assert interval([1.0, math.nan]) is None


def test_paired_samples_give_a_narrow_interval():
    before = [1.0, 2.0, 3.0, 4.0]
    (row,) = synthetic(rows=[loss_row("prose", before, [b + 0.1 for b in before])])["verdicts"]["save"]["texts"]
    assert row["loss_increase_interval"] == pytest.approx([0.1, 0.1])
    assert row["loss_after_interval"][1] - row["loss_after_interval"][0] > 2


def test_chance_in_the_same_run_is_held_against_the_method():
    report = synthetic(rows=[loss_row("prose", [2.0, 2.0], [2.1, 2.1])])
    report["methods"]["chance"] = report["methods"]["save"] | {
        "steps": [{"id": "g", "uses": "group.random", "with": {}}], "metrics": ["worse"]
    }  # fmt: skip
    report["saved"]["chance"] = report["saved"]["save"]
    report["metrics"]["worse"] = {"all": {"title": "", "rows": [loss_row("prose", [2.0, 2.0], [2.4, 2.4])]}}
    found = verdicts(report)
    (row,) = found["save"]["texts"]
    assert (row["random_increase"], row["beyond_random"]) == (pytest.approx(0.4), pytest.approx(0.75))
    assert found["chance"]["random"]
    report["saved"]["chance"] = {"all": report["saved"]["save"]["all"] | {"expert_bytes": {"before": 9, "after": 8}}}
    assert verdicts(report)["save"]["texts"][0]["random_increase"] is None, "of other bytes"


def test_expected_shares_by_sampling():
    a, b = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0)).abs()
    for threshold in (0.2, 0.4):
        shared = ((a - b).abs() <= threshold * (a + b)).double().mean()
        assert expected_shares(threshold)["shared"] == pytest.approx(float(shared), abs=0.003)


def test_levels_keep_a_matrix_to_within_half_a_step():
    matrix = torch.randn(7, 7, generator=torch.Generator().manual_seed(1)).double()
    matrix.fill_diagonal_(50)
    found = shades.decode(shades.encode(matrix))
    off = ~torch.eye(7, dtype=torch.bool)
    step = (matrix[off].max() - matrix[off].min()) / 255
    assert float((found - matrix)[off].abs().max()) <= float(step) / 2 + 1e-9


def test_the_best_at_their_bytes():
    points = [{"bytes": b, "loss": loss} for b, loss in ((3, 2.0), (1, 2.5), (2, 2.6), (4, 1.9))]
    assert [p["bytes"] for p in pictures.best(points)] == [1, 3, 4]


def test_a_missed_gate_has_its_own_exit_code(capsys):
    console = Console()
    terminal.judge(synthetic(), console)
    with pytest.raises(Exit) as caught:
        terminal.judge(synthetic(rows=[loss_row("prose", [2.0, 2.0], [2.1, 2.1], gate=0.05)]), console)
    assert caught.value.exit_code == terminal.GATE_MISSED == 3
    assert "loss on prose rose by 0.1000, and 0.0500 was allowed" in capsys.readouterr().out


def test_the_terminal_has_each_checkpoints_own_interval():
    report = synthetic(rows=[loss_row("prose", [2.0, 2.0, 2.0], [2.1, 2.2, 2.3])])
    report["metrics"]["worse"] = {"all": {"title": "", "rows": [loss_row("prose", [2.0] * 3, [2.4, 2.4, 2.4])]}}
    console = Console(width=160, record=True)
    report["saved"] = {}
    terminal.show(report, console)
    told = [line for line in console.export_text().splitlines() if "95 % interval" in line]
    assert [line.split(": ")[1] for line in told] == ["prose ±0.2484", "prose ±0.0000"]


def test_the_ledger_keeps_a_killed_run(tmp_path, monkeypatch):
    plan: Any = type("Plan", (), {"ends": ("k",), "tasks": {"k": None}})()
    other: Any = type("Plan", (), {"ends": ("x",), "tasks": {}})()
    ledger = Ledger(tmp_path)
    with pytest.raises(ValueError, match="broke"), ledger.run(plan, {"see": 1}):
        raise ValueError("the toy broke")
    with ledger.run(other, {}), ledger.run(plan, {"see": 0}):
        pass
    with (tmp_path / NAME).open("a") as file:
        file.write('{"when": "cut sho')
    assert [(e["event"], e.get("why")) for e in ledger.events(plan)] == [
        ("started", None), ("failed", "ValueError: the toy broke"), ("started", None), ("finished", None)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["report.json", "moefold.json"])
def test_moefold_report_rebuilds_the_page(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / name).write_text(json.dumps(synthetic()))
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    made = folder / "report.html" if name == "report.json" else tmp_path / "packed.html"
    assert "passes its gate" in made.read_text(encoding="utf-8")
    assert len(list(folder.iterdir())) == (2 if name == "report.json" else 1), "a checkpoint stays as it is"
    done = CliRunner().invoke(app, ["report", str(folder), "--to", "nowhere/x.html"])
    assert done.exit_code == 2
    assert "nowhere/x.html cannot be written" in done.output


def test_compare_writes_a_picture_of_loss_against_bytes(tmp_path):
    for name, after in (("a", 1000), ("b", 500)):
        report = synthetic()
        report["saved"]["save"]["all"] |= {
            "path": str(tmp_path / name),
            "expert_bytes": {"before": 2000, "after": after},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    places = [tmp_path / "a.json", tmp_path / "b.json"]
    done = CliRunner().invoke(app, ["compare", *map(str, places), "--html", str(tmp_path / "all.html")])
    assert done.exit_code == 0, done.output
    figures = data_of((tmp_path / "all.html").read_text(encoding="utf-8"))["figures"]
    assert [(trace["name"], trace["x"]) for trace in figures["bytes-plot-0"]["data"]][:2] == [
        ("a", [0.001]), ("b", [0.0005])
    ]  # fmt: skip
    low, high = synthetic()["verdicts"]["save"]["texts"][0]["loss_increase_interval"]
    assert figures["bytes-plot-0"]["data"][0]["error_y"]["array"] == [pytest.approx((high - low) / 2)]
    assert {trace["name"] for trace in figures["cumulative-error-plot"]["data"]} == {"a", "b"}
    for figure in compared_page.page(comparison.compare(places), places).figures.values():
        plotly.graph_objects.Figure(figure)


def test_a_page_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(html.InputError, match="taken cannot be written"):
        html.write(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"], "nothing is left beside it"


def test_every_field_of_a_report_is_documented(tmp_path):
    session = Session.open("quickstart", None, None, None, None, tmp_path / "work", "cpu")
    found = build(session.plan, {}, Times(), "cpu", session.store)
    described = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    assert set(found) == set(re.findall(r"^\| `(\w+)` \|", described, flags=re.MULTILINE))
    row = synthetic()["verdicts"]["save"]["texts"][0]
    assert all(f"`{name}`" in described for name in (*synthetic()["verdicts"]["save"], *row))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_picture_of_a_report_is_drawn(tmp_path, monkeypatch):
    """docs/draw_report.py: a desktop, light, and a phone, dark."""
    place = Path(__file__).parents[2] / "docs" / "draw_report.py"
    spec = importlib.util.spec_from_file_location("draw_report", place)
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    monkeypatch.setattr(draw, "PICTURE", tmp_path / "report.png")
    (tmp_path / "report.html").write_text(page(synthetic()).render(), encoding="utf-8")
    draw.main(tmp_path / "report.html")
    with Image.open(tmp_path / "report.png") as found:
        both = found.convert("L")
    light, dark = both.getpixel((5, 400)), both.getpixel((both.width - 5, 400))
    assert (both.width, light > 200, dark < 60) == (round(draw.SHRINK * (1180 + 24 + 390)), True, True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("shape", [(3, 8), (60, 128)])
def test_a_browser_draws_every_figure_without_an_error(tmp_path, shape):
    """Headless, with the network's names unresolvable; `data-drawn` is set when the last figure is there."""
    (tmp_path / "report.html").write_text(page(synthetic(*shape)).render(), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=390,844"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", (tmp_path / "report.html").as_uri()]
    done = subprocess.run([str(CHROMIUM), *options], capture_output=True, text=True, timeout=120, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert 'data-drawn="all"' in done.stdout[:500]
    assert done.stdout.count('class="main-svg"') >= 7
    rows = done.stdout.partition('id="experts-rows"')[2].partition("</tbody>")[0]
    assert rows.count("<tr>") == shape[1]
    assert "shares words with" in rows
