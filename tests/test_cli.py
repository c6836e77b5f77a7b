"""The commands as a user types them: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models import tiny
from moefold.cli import app

PIPELINE = """\
model: {model}
stages:
  - {{id: calibration, uses: text.files, with: {{files: [{text}], samples: 4, length: 32}}}}
  - {{uses: forward, needs: {{text: calibration}}}}
  - {{uses: observe, with: {{minimum: 1}}}}
  - uses: pair.random
  - uses: puzzlemoe
  - uses: pack.exponent
  - {{uses: save, with: {{to: packed}}}}
  - {{id: other, uses: text.files, with: {{files: [{text}], samples: 2, length: 16, seed: 5}}}}
  - {{uses: evaluate.baseline, needs: {{texts: [other]}}}}
  - uses: evaluate.perplexity
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny model, a text and a pipeline `p.yaml`."""
    monkeypatch.chdir(tmp_path)
    tiny("qwen3_moe", tmp_path / "model")
    (tmp_path / "text.txt").write_text("Nothing is computed twice, and nothing is lost. " * 40)
    (tmp_path / "p.yaml").write_text(PIPELINE.format(model=tmp_path / "model", text=tmp_path / "text.txt"))
    return tmp_path


def moefold(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def report(*arguments: str) -> dict:
    done = CliRunner().invoke(app, ["run", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_run_reports_and_a_second_run_does_nothing(folder):
    first = report("p.yaml")
    saved = first["saved"]["save"]["all"]
    assert saved["expert_bytes"]["after"] == saved["expert_bytes"]["before"] / 2
    assert all(took["to_run"] == took["tasks"] for took in first["stages"].values())
    second = report("p.yaml")
    assert all(took["to_run"] == 0 for took in second["stages"].values())
    assert sum(took["ran"] for took in second["stages"].values()) == 0
    assert second["metrics"] == first["metrics"]
    assert json.loads((folder / ".moefold" / "report.json").read_text())["saved"] == second["saved"]


def test_a_changed_threshold_costs_packing_and_what_follows(folder):
    report("p.yaml")
    rows = {r["step"]: r for r in json.loads(moefold("plan", "p.yaml", "--set", "puzzlemoe.threshold=0.3", "--json"))}
    to_run = {step: row["to_run"] for step, row in rows.items() if row["to_run"] not in (0, "-")}
    assert to_run == {"pack.exponent": 3, "save": 1, "evaluate.perplexity": 1}
    changed = report("p.yaml", "--set", "puzzlemoe.threshold=0.3")
    assert {s: t["ran"] for s, t in changed["stages"].items() if t["ran"]} == to_run


def test_a_deleted_output_is_written_again(folder):
    import shutil

    report("p.yaml")
    shutil.rmtree(folder / "packed")
    again = report("p.yaml")
    assert {s for s, t in again["stages"].items() if t["ran"]} == {"pack.exponent", "save"}
    assert (folder / "packed" / "config.json").is_file()


def test_an_output_that_another_run_wrote_over_is_written_again(folder):
    """Both thresholds give files of the same sizes; the report of the first must not stand for the second's bytes."""
    report("p.yaml")
    first = (folder / "packed" / "model.safetensors").read_bytes()
    report("p.yaml", "--set", "puzzlemoe.threshold=0.1")
    assert (folder / "packed" / "model.safetensors").read_bytes() != first
    again = report("p.yaml")
    assert {s for s, t in again["stages"].items() if t["ran"]} == {"pack.exponent", "save"}
    assert (folder / "packed" / "model.safetensors").read_bytes() == first


def test_the_table_for_people(folder):
    printed = moefold("run", "p.yaml")
    for part in (
        "expert bytes", "0.500x", "whole checkpoint", "perplexity", "mask: shared by both", "clipped", "saw too few",
        "seconds", "peak memory", "from_pretrained(", "import moefold",
    ):  # fmt: skip
        assert part in printed


def test_model_text_and_to_replace_the_pipelines_own(folder):
    tiny("mixtral", folder / "other", seed=3)
    (folder / "mine.txt").write_text("my own text, which I know best. " * 60)
    found = report("p.yaml", "--model", str(folder / "other"), "--text", "mine*.txt", "--to", "elsewhere")
    assert found["pipeline"]["model"] == str(folder / "other")
    assert found["texts"]["calibration"]["all"]["sources"][0]["name"] == "mine*.txt"
    assert found["texts"]["calibration"]["all"]["samples"] == 4
    config = json.loads((folder / "elsewhere" / "config.json").read_text())
    assert config["model_type"] == "mixtral"
    assert not (folder / "packed").exists()


def test_processes_give_the_same_bytes(folder):
    one = report("p.yaml", "--work", "w1")
    two = report("p.yaml", "--work", "w2", "--to", "packed2", "--executor", "process", "--workers", "2")
    assert one["packed"] == two["packed"]
    assert (folder / "packed" / "model.safetensors").read_bytes() == (
        folder / "packed2" / "model.safetensors"
    ).read_bytes()
    assert one["metrics"] == two["metrics"]


def test_warnings_name_starved_experts_and_short_texts(folder):
    more = ("observe.minimum=100000", "calibration.samples=400", "calibration.length=300")
    printed = moefold("run", "p.yaml", *(word for setting in more for word in ("--set", setting)))
    assert "experts 0, 1, 2, 3, 4, 5, 6, 7 saw fewer than 100000 calibration tokens" in printed
    assert "samples of 400 asked for" in printed
    assert "samples of 300 tokens are longer than the model's 256 positions" in " ".join(printed.split())


def test_evaluate_reads_packed_and_dense(folder):
    report("p.yaml")
    for checkpoint in ("model", "packed"):
        rows = json.loads(
            moefold("evaluate", checkpoint, "--text", "text.txt", "--samples", "2", "--length", "64", "--json")
        )
        assert rows[0]["tokens"] == 128
        assert 0 < rows[0]["loss"] < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "p.yaml", "--executor", "proces"], "no plugin gives the executor proces"),
        (["run", "p.yaml", "--workers", "2"], "add --executor process"),
        (["run", "p.yaml", "--device", "gpu"], "no device gpu; write auto, cpu or cuda"),
        (["run", "p.yaml", "--text", "none*"], "no file matches none*"),
        (["run", "p.yaml", "--to", "model"], "model exists and moefold did not write it; choose another"),
        (
            ["run", "p.yaml", "--set", "puzzlemoe.threshold=2"],
            "--set puzzlemoe.threshold=2: stages[4].with.threshold: input",
        ),
        (["run", "nowhere.yaml"], "no file nowhere.yaml"),
        (["evaluate", "nowhere"], "nowhere is no directory"),
        (["describe", "puzzelmoe"], "did you mean puzzlemoe?"),
        (["copy", "quickstart", "p.yaml"], "p.yaml exists; name another file"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(folder, arguments, message):
    printed = moefold(*arguments, code=2)
    assert message in printed.replace("\n", "")
    assert "Traceback" not in printed


def test_no_cuda_is_said():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "no CUDA device" in moefold("plan", "quickstart", "--device", "cuda", code=2)


def test_list_describe_copy_doctor(folder):
    listed = moefold("list")
    for name in ("quickstart", "puzzlemoe", "pair.by_usage", "exponent", "reference", "demo", "text.mix"):
        assert name in listed
    described = moefold("describe", "puzzlemoe")
    assert "threshold (number >= 0, <= 1, default 0.4)" in described
    assert "activity: Activity" in described
    assert "random pairs" in moefold("describe", "quickstart").lower() or "at random" in moefold(
        "describe", "quickstart"
    )
    moefold("copy", "puzzlemoe", "mine.yaml")
    assert "no problems" in moefold("validate", "mine.yaml")
    doctor = moefold("doctor")
    assert "exponent on cpu" in doctor
    assert "reference" in doctor


def test_help_has_examples():
    for command in ("run", "plan", "validate", "copy", "evaluate", "describe"):
        assert "Example" in moefold(command, "--help")
    assert "0.1.0" in moefold("--version")


def test_text_in_place_of_a_mix_leaves_no_source_behind(folder):
    mixed = (
        (folder / "p.yaml")
        .read_text()
        .replace(
            "  - {id: calibration, uses: text.files",
            "  - {id: calibration, uses: text.mix, needs: {texts: [a, b]}, with: {samples: 2}}\n"
            "  - {id: b, uses: text.dataset, with: {name: no/such, length: 32}}\n"
            "  - {id: a, uses: text.files",
        )
    )
    (folder / "mixed.yaml").write_text(mixed)
    found = report("mixed.yaml", "--text", "text.txt")
    assert set(found["texts"]) == {"calibration", "other"}
    assert found["texts"]["calibration"]["all"]["sources"][0]["name"] == "text.txt"


def test_calibrating_through_compressed_layers_is_wiring(folder):
    """The first layer is packed as before; the later ones saw what the packed ones before them give."""
    own = "needs: {experts: model}"
    text = (folder / "p.yaml").read_text()
    text = text.replace("needs: {text: calibration}}", "needs: {text: calibration, experts: unpack.exponent}}")
    text = text.replace("{uses: observe, with: {minimum: 1}}", f"{{uses: observe, with: {{minimum: 1}}, {own}}}")
    text = text.replace("- uses: puzzlemoe", f"- {{uses: puzzlemoe, {own}}}")
    text = text.replace("- uses: pack.exponent", "- uses: pack.exponent\n  - uses: unpack.exponent")
    (folder / "through.yaml").write_text(text)
    one, other = report("p.yaml"), report("through.yaml", "--to", "through")
    tokens = [[r["activity"]["observe"][n]["tokens"] for n in "012"] for r in (one, other)]
    assert tokens[0][0] == tokens[1][0]
    assert tokens[0][1:] != tokens[1][1:]
    assert other["saved"]["save"]["all"]["replaced_layers"] == 3


def test_a_stage_that_breaks_leaves_its_traceback(folder, monkeypatch):
    from moefold_plugins import calibrate

    def broken(*_):
        raise RuntimeError("the norm broke")

    monkeypatch.setattr(calibrate, "_add_squares", broken)
    printed = moefold("run", "p.yaml", code=1)
    assert printed.startswith("error: observe, layer 0: RuntimeError: the norm broke")
    assert "in broken" in (folder / ".moefold" / "traceback.txt").read_text()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert "0.500x" in moefold("run", "p.yaml")


def test_the_card_has_its_losses_also_when_it_is_written_anew(folder):
    import shutil

    first = report("p.yaml")
    shutil.rmtree(folder / "packed")
    report("p.yaml")
    card = (folder / "packed" / "README.md").read_text()
    row = first["metrics"]["evaluate.perplexity"]["all"]["rows"][0]
    assert card.count("## What was lost") == 1
    assert f"{row['loss_after']:.4f}" in card
    report("p.yaml")
    assert (folder / "packed" / "README.md").read_text() == card


def other_method(folder: Path, name: str, *stages: str) -> str:
    """The pipeline with other stages between `observe` and `save`."""
    head, _, rest = (folder / "p.yaml").read_text().partition("  - uses: pair.random\n")
    _, _, tail = rest.partition("  - uses: pack.exponent\n")
    (folder / name).write_text(head + "".join(f"  - {stage}\n" for stage in stages) + tail)
    return name


def ran(found: dict) -> dict[str, int]:
    return {step: took["ran"] for step, took in found["stages"].items() if took["ran"]}


def test_a_second_method_costs_only_its_own_stages_and_both_are_compared(folder):
    second = other_method(folder, "second.yaml", "uses: pair.by_usage", "uses: puzzlemoe", "uses: pack.exponent")
    report("p.yaml", "--to", "out/random")
    found = report(second, "--to", "out/by_usage")
    assert ran(found) == {"pair.by_usage": 3, "pack.exponent": 3, "save": 1, "evaluate.perplexity": 1}
    compared = json.loads(moefold("compare", "out/by_usage", "out/random", ".moefold", "--json"))
    rows = {row["run"]: row for row in compared["rows"]}
    assert set(rows) == {"random", "by_usage", "by_usage #2"}
    assert rows["by_usage"] | {"run": "by_usage #2"} == rows["by_usage #2"]
    assert rows["random"]["method"] == "pair.random -> puzzlemoe -> pack.exponent"
    assert rows["random"]["calibration"] == rows["by_usage"]["calibration"]
    assert rows["by_usage"]["calibration"]["seconds"] > 0
    assert {row["group"] for row in rows.values()} == {1}
    assert {row["bits_per_weight"] for row in rows.values()} == {8.0}
    assert compared["uncompressed"]["bits_per_weight"] == 16.0
    printed = moefold("compare", "out/random", "out/by_usage")
    assert "uncompressed" in printed
    assert "0.500x" in printed


def test_tokens_kept_for_several_methods_are_not_computed_twice(folder):
    """Least squares reads the tokens themselves, which live until they are read unless --keep says otherwise."""
    use = ["{uses: group.random, with: {experts: 4}}", "{uses: MERGE, needs: {experts: model}}"]
    first = other_method(folder, "first.yaml", *(line.replace("MERGE", "average") for line in use))
    second = other_method(folder, "second.yaml", *(line.replace("MERGE", "mergemoe") for line in use))
    report(first, "--to", "average", "--keep", "forward")
    found = report(second, "--to", "merged")
    assert ran(found) == {"mergemoe": 3, "save": 1, "evaluate.perplexity": 1}
    dropped = report(second, "--to", "again", "--set", "mergemoe.ridge=0.5")
    assert ran(dropped) == {"forward": 3, "mergemoe": 3, "save": 1, "evaluate.perplexity": 1}
    rows = json.loads(moefold("compare", "average", "merged", "again", "--json"))["rows"]
    assert {row["method"] for row in rows} == {
        "group.random(experts=4) -> average", "group.random(experts=4) -> mergemoe",
        "group.random(experts=4) -> mergemoe(ridge=0.5)",
    }  # fmt: skip
    assert all(row["per_layer"] == "8 -> 4" and row["random"] for row in rows)


def test_runs_on_other_models_or_texts_are_not_compared(folder):
    report("p.yaml")
    tiny("qwen3_moe", folder / "other", seed=3)
    report("p.yaml", "--model", "other", "--to", "out/model", "--work", "w2")
    (folder / "text.txt").write_text("Everything else is computed again, and compared with care. " * 40)
    report("p.yaml", "--to", "out/text")
    assert "fingerprints differ" in moefold("compare", "packed", "out/model", code=2)
    assert "as many tokens, but other ones" in moefold("compare", "packed", "out/text", code=2)
    assert "--keep forwrd: no stage of p.yaml has this id; did you mean forward?" in moefold(
        "run", "p.yaml", "--keep", "forwrd", code=2
    )
