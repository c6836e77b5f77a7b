"""Every shipped pipeline, run on the shipped model over one store: it saves, reads back, and says what it lost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moefold import Checkpoint, StreamedModel, shipped
from moefold.cli import app
from moefold.comparison import compare
from strict_reports import strictly

CUT = {"calibration": (16, 256), "unseen": (4, 256), "prose": (4, 256)}
RATIO = {
    "average": 0.5,
    "budget": 0.75,
    "compensated": 0.5,
    "gptq-int4": 0.266,  # 4 bits of 16, and a scale of 16 bits for 64
    "hcsmoe": 0.5,
    "mergemoe": 0.5,
    "mergemoe-int4": 0.133,  # 4 bits of 16, their scales, of half
    "mergemoe-published": 0.5,
    "mergemoe-puzzlemoe": 0.25,
    "msmoe": 0.5,
    "pair4": 0.133,  # 4 bits for two weights, and a scale of 16 bits for 64 positions
    "pair6": 0.195,
    "puzzlemoe": 0.5,
    "puzzlemoe-pair6": 0.195,
    "quickstart": 0.5,
    "reap": 0.5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def report(folder: Path, name: str, *more: str) -> dict:
    """Run a shipped pipeline, cut short, and give its report; results are in `folder`, saved in `folder/NAME`."""
    text = shipped.find(name).read_text()
    pairs = [(f"{i}.samples={n}", f"{i}.length={length}") for i, (n, length) in CUT.items() if f"id: {i}\n" in text]
    settings = [part for pair in pairs for setting in pair for part in ("--set", setting)]
    place = ["--work", str(folder / "work"), "--to", str(folder / name), "--device", "cpu"]
    settings += ["--set", "evaluate.layers.samples=1"]
    keep = ["--keep", "forward"] if "uses: forward" in text else []
    done = CliRunner().invoke(app, ["run", name, *settings, *place, *keep, *more, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", sorted(RATIO))
def test_it_saves_what_it_promises_and_reads_it_back(folder, name):
    found = report(folder, name)
    assert strictly(found) == [], "report.json follows its schema, with no field left over"
    (saved,) = found["saved"]["save"].values()
    assert saved["expert_bytes"]["after"] / saved["expert_bytes"]["before"] == pytest.approx(RATIO[name], rel=0.01)
    rows = found["metrics"]["evaluate.perplexity"]["all"]["rows"]
    assert {row["text"] for row in rows} == {"stdlib evaluate", "prose"}
    assert all(0 < row["loss_increase"] < math.log(2048) for row in rows)
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto")
    ids = torch.arange(48).view(2, 24) * 7 % 2048
    streamed = StreamedModel(Checkpoint.open(str(folder / name)), "cpu")
    hidden = streamed.embed(ids)
    for number in range(streamed.layer_count):
        with streamed.loaded(number):
            hidden = streamed.through(number, ids, hidden)
    with torch.no_grad():
        expected, logits = model(ids).logits.float(), streamed.head(hidden).float()
    # the loaded model may take another experts implementation than the streamed one: bfloat16 sums in another order
    assert (logits - expected).norm() / expected.norm() < 2e-2


def test_a_damping_that_had_to_be_raised_is_told(folder):
    """Of moments of fewer tokens than columns, with nothing added: experts are named, and the figures kept."""
    name = "puzzlemoe.compensated"
    found = report(folder, "compensated", "--set", f"{name}.damping=1e-12", "--set", f"{name}.blend=0")
    told = [one for one in found["warnings"] if "had no Cholesky factor until their damping was raised" in one]
    raised = {layer: one["figures"]["raised"] for layer, one in found["merged"][name].items()}
    assert raised
    assert any(counts for matrices in raised.values() for counts in matrices.values())
    assert len(told) == sum(bool(counts) for matrices in raised.values() for counts in matrices.values())
    assert strictly(found) == []


def test_gptq_in_two_bits_says_that_dense_weights_hold_them(folder):
    text = shipped.find("gptq-int4").read_text()
    stored = "uses: quantize.gptq\n    with: {scheme: int4, group: 64, blend: 1024}"
    assert stored in text
    (folder / "gptq2.yaml").write_text(text.replace(stored, "uses: gptq\n    with: {bits: 2}"))
    found = report(folder, str(folder / "gptq2.yaml"), "--to", str(folder / "gptq2"))
    (told,) = [one for one in found["warnings"] if "dense weights hold them" in one]
    assert told.startswith("gptq: experts' values are of 2.5 bits a weight, scales counted")
    (saved,) = found["saved"]["save"].values()
    assert saved["expert_bytes"]["after"] == saved["expert_bytes"]["before"]


def test_the_second_method_costs_its_own_stages_only(folder):
    report(folder, "mergemoe")
    again = report(folder, "mergemoe", "--set", "mergemoe.target=published", "--to", str(folder / "other"))
    ran = {step: took["ran"] for step, took in again["stages"].items() if took["ran"]}
    assert ran == {"mergemoe": 5, "save": 1, "evaluate.perplexity": 1, "evaluate.layers": 1}


def test_they_stand_side_by_side(folder):
    for name in ("mergemoe", "reap", "puzzlemoe"):
        report(folder, name)
    rows = {row.run: row for row in compare([folder / name for name in ("mergemoe", "reap", "puzzlemoe")]).rows}
    assert rows["puzzlemoe"].increase < rows["mergemoe"].increase
    assert rows["mergemoe"].per_layer == rows["reap"].per_layer == "16 -> 8"


@pytest.mark.slow
def test_calibrating_through_merged_layers_is_wiring(folder):
    text = shipped.find("mergemoe").read_text()
    text = text.replace("needs: {text: calibration}", "needs: {text: calibration, experts: mergemoe}")
    (folder / "through.yaml").write_text(text)
    plain, wired = (
        report(folder, "mergemoe"),
        report(folder, str(folder / "through.yaml"), "--to", str(folder / "through")),
    )
    fits = [found["reduced"]["mergemoe"]["4"]["figures"]["fits"] for found in (plain, wired)]
    assert fits[0] != fits[1]  # the last layer saw other tokens
    first = [found["reduced"]["mergemoe"]["0"]["figures"]["fits"] for found in (plain, wired)]
    assert first[0] == first[1]  # before the first there is nothing
