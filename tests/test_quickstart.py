"""The README's main job, on the model that ships: what it saves, what it loses, and that stock transformers agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moefold import Checkpoint
from moefold.cli import app
from moefold_plugins.text import text_stdlib

SMALL = [
    "--set", "calibration.samples=16", "--set", "unseen.samples=8", "--set", "prose.samples=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def report(folder: Path) -> dict:
    """The quickstart with fewer samples, run once."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["run", "quickstart", "--json", *SMALL])
    monkeypatch.undo()
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def loaded(folder: Path, report: dict):
    return AutoModelForCausalLM.from_pretrained(folder / "out" / "demo-packed")


def test_half_of_the_expert_bytes(report):
    saved = report["saved"]["save"]["all"]
    assert saved["expert_bytes"]["after"] * 2 == saved["expert_bytes"]["before"]
    assert saved["replaced_layers"] == saved["layers"] >= 4
    assert saved["clipped"] == 0
    # Of the best of three, for independent Gaussian weights and equal costs: 50 / 25 / 25 %. Busy experts keep more,
    # neurons that are cheap to merge share more: 55 / 22 / 22 % here.
    assert sum(saved["masks"].values()) == pytest.approx(1)
    assert saved["masks"]["shared"] == pytest.approx(0.5, abs=0.1)
    assert min(saved["masks"]["own"], saved["masks"]["other"]) > 0.1


def test_something_is_lost_and_not_much(report):
    for row in report["metrics"]["evaluate.perplexity"]["all"]["rows"]:
        assert 0 < row["loss_increase"] < 0.2


def test_reported_loss_is_what_stock_transformers_gets(report, loaded, folder):
    """The same text, the same tokens, through AutoModelForCausalLM: the figure in the report."""
    rows = {row["text"]: row for row in report["metrics"]["evaluate.perplexity"]["all"]["rows"]}
    packed = Checkpoint.open(str(folder / "out" / "demo-packed"))
    tokens = text_stdlib(packed, part="evaluate", samples=8, length=512).tokens.long()
    with torch.no_grad():
        losses = [float(loaded(row[None], labels=row[None]).loss) for row in tokens]
    assert sum(losses) / len(losses) == pytest.approx(rows["stdlib evaluate"]["loss_after"], abs=2e-3)


def test_it_writes_code(loaded, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "demo-packed")
    inputs = tokenizer("import os\n\ndef ", return_tensors="pt")
    text = tokenizer.decode(loaded.generate(**inputs, max_new_tokens=24, do_sample=False)[0])
    assert text.startswith("import os")
    assert len(set(text[12:])) > 5


def test_the_card_carries_the_figures(folder, report):
    card = (folder / "out" / "demo-packed" / "README.md").read_text()
    row = report["metrics"]["evaluate.perplexity"]["all"]["rows"][0]
    assert "puzzlemoe.compensated" in card
    assert '"sweeps": 2' in card
    assert f"{row['loss_after']:.4f}" in card
