"""The page made from stored runs, and that the stored page is what they make."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import synthetic
from typer.testing import CliRunner

from moefold.cli import app
from moefold_kernels.bench import page, plot, published, results
from moefold_kernels.errors import BenchmarkError

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
STORED = sorted((ROOT / "tests" / "bench" / "results").glob("*-layer-*.json"))


@pytest.mark.skipif(not STORED, reason="no run of the kernels is stored yet (tests/bench/results/*-layer-*.json)")
def test_the_page_is_what_the_stored_runs_make():
    text = DOCUMENT.read_text(encoding="utf-8")
    again = "moefold bench page docs/benchmarks.md tests/bench/results/*-layer-*.json"
    assert page.replaced(text, DOCUMENT, STORED) == text, f"run: {again}"
    for file in STORED:
        picture = page.image(DOCUMENT, file).read_text(encoding="utf-8")
        assert plot.digest(results.read(file)) in picture, f"{file.name}: a stale plot; run: {again}"


def test_the_page_has_its_markers():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count(page.BEGIN) == text.count(page.END) == 1


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "docs" / "benchmarks.md"
    path.parent.mkdir()
    path.write_text(f"# Title\n\nbefore\n\n{page.BEGIN}\nwhat was here\n{page.END}\n\nafter\n")
    return path


def made(document, device=synthetic.DEVICE):
    run = synthetic.write(document.parents[1] / "a-layer-run.json", synthetic.content(device))
    return page.replaced(document.read_text(), document, [run])


def test_only_what_is_between_the_markers_changes(document):
    text = made(document)
    assert text.startswith(
        f"# Title\n\nbefore\n\n{page.BEGIN}\n\n### invented device, 2001-02-03\n\npython 3.0, torch 9.9."
    )
    assert text.endswith(f"\n\n{page.END}\n\nafter\n")
    assert "what was here" not in text
    document.write_text(text)
    assert made(document) == text


def test_tables_say_what_was_measured(document):
    lines = made(document).splitlines()
    head = next(line for line in lines if line.startswith("| tokens"))
    cells = "| tokens | experts hit | pairs hit | packed, µs | dense, µs | grouped_mm, µs | dense / packed |"
    assert head.startswith(cells)
    assert "vLLM" not in "".join(lines)
    assert "| 16 | 8 | 4 | 400 | 700 | 1000 | 1.75× | 2.50× | 88% | 88%, memory | 3.0e-03 |" in lines
    assert "reading 4 TB/s, bf16 products 700 TFLOP/s. From [a-layer-run.json](../a-layer-run.json)." in "".join(lines)


def test_published_times_stand_beside_ours_where_the_hits_are_alike(document):
    lines = made(document, published.DEVICE).splitlines()
    assert "| 16 | 8 | 4 | 400 | 700 | 1000 | 661 | 1.75× | 2.50× | 1.65× | 88% | 88%, memory | 3.0e-03 |" in lines
    (qwen,) = [line for line in lines if line.startswith("| 16 | 84.5")]
    assert " - " in qwen  # 84.5 experts hit are not the published 85
    assert published.SOURCE in "".join(lines)


def test_newest_first(document, tmp_path):
    old, new = synthetic.content("old one"), synthetic.content("new one")
    new["datetime"] = "2002-01-01T00:00:00"
    files = [synthetic.write(tmp_path / "o.json", old), synthetic.write(tmp_path / "n.json", new)]
    text = page.replaced(document.read_text(), document, files)
    assert text.index("new one") < text.index("old one")


@pytest.mark.parametrize("text", ["nothing", f"{page.END}{page.BEGIN}", f"{page.BEGIN}{page.BEGIN}{page.END}"])
def test_markers_must_be_there(text, document, tmp_path):
    document.write_text(text)
    with pytest.raises(BenchmarkError, match="write these two lines where the tables belong"):
        made(document)


def test_the_command_writes_page_and_plot(document, tmp_path):
    pytest.importorskip("matplotlib")
    run = synthetic.write(tmp_path / "a-layer-run.json", synthetic.content(published.DEVICE))
    pictures = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["bench", "page", str(document), str(run)])
        assert done.exit_code == 0, done.output
        pictures.append((document.parent / "images" / "a-layer-run.svg").read_text())
        shutil.rmtree(document.parent / "images")
    assert pictures[0] == pictures[1]
    assert "(images/a-layer-run.svg)" in document.read_text()
    assert plot.digest(results.read(run)) in pictures[0]
    for word in ("mixtral-8x7b", "qwen3-30b-a3b", "floor of packed", "vLLM (elsewhere)", "against grouped_mm"):
        assert word in pictures[0]


def test_a_page_that_cannot_be_read_is_an_error(tmp_path):
    run = synthetic.write(tmp_path / "run.json")
    done = CliRunner().invoke(app, ["bench", "page", str(tmp_path / "none.md"), str(run)])
    assert done.exit_code == 2
    assert "none.md: No such file" in done.output
