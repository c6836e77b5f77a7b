"""`moefold tune`: what it reads a model's sizes from, prints and writes, and what the user got wrong."""

from __future__ import annotations

import functools
import json

import pytest
from typer.testing import CliRunner

from models import tiny
from moefold.cli import app
from moefold.errors import CheckpointError
from moefold.hooks import Registry
from moefold.sizes import Sizes, sizes

pytest.importorskip("triton", reason="needs triton")
from moefold_kernels.triton import configs, search, tune


def moefold(*arguments, **env):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)], env={"COLUMNS": "200"} | env)


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Two tiles to try, the second of which takes half the time, and whose results are taken for right."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    old, new = (configs.Tile("pair", 16, 0, 32, 32, 4, stages) for stages in (2, 3))
    timer = lambda plan, *_: lambda: (2 if plan.first == old else 1) * 1e-5  # noqa: E731
    monkeypatch.setattr(search, "candidates", lambda shape, room, before: ([before.first, new], [before.second, new]))
    monkeypatch.setattr(configs, "choose", lambda shape, device: configs.Plan(old, old))
    monkeypatch.setattr(search.Search, "_error", lambda self, plan: 0.001)
    monkeypatch.setattr(tune.ceilings, "measure", lambda device: tune.ceilings.Ceilings(1e12, 1e15, 1e12))
    monkeypatch.setattr(tune, "Tuner", functools.partial(tune.Tuner, timer=timer))
    return tmp_path


def test_plans_are_shown_and_written(pretended):
    done = moefold("--shape", "tiny", "--tokens", "1,3,1", "--workers", "0")
    assert done.exit_code == 0, done.output
    (path,) = (pretended / "cache" / "moefold" / "tune").iterdir()
    assert path.name == tune.table_name(tune.torch.device("cuda" if tune.torch.cuda.is_available() else "cpu"))
    assert f"2 plans written to {path}" in done.output
    assert "2.00x" in done.output
    assert "pair 16 32x32 w4 s3" in done.output
    plans = configs.read_table(path)
    assert [(shape.tokens, shape.dense, plan.first.stages) for shape, plan in plans.items()] == [
        (1, False, 3), (3, False, 3)
    ]  # fmt: skip
    written = json.loads(path.read_text())
    assert written["plans"][0]["us"] == 10.0
    assert {"device", "date", "torch", "triton", "us"} == set(written["about"])


def test_dense_plans_go_where_the_user_says(pretended):
    to = pretended / "mine.json"
    options = ("--hidden", 32, "--inner", 32, "--experts", 4, "--top-k", 2, "--tokens", 2, "--workers", 0)
    for more in ((), ("--dense",)):
        done = moefold(*options, *more, "--out", to)
        assert done.exit_code == 0, done.output
        assert f"1 plans written to {to}" in done.output
    assert {shape.dense for shape in configs.read_table(to)} == {False, True}
    assert not (pretended / "cache").exists()


def test_a_model_is_read_from_its_configuration_alone(pretended):
    """No shard is opened: there is none."""
    path = tiny("mixtral", pretended / "model")
    for shard in path.glob("*.safetensors*"):
        shard.unlink()
    done = moefold(path, "--tokens", "2", "--top-k", "3", "--workers", "0", "--out", pretended / "t.json")
    assert done.exit_code == 0, done.output
    (shape,) = configs.read_table(pretended / "t.json")
    assert shape == configs.Shape(64, 48, 8, 3, False, 2)


@pytest.mark.parametrize(
    ("family", "inner"), [("qwen3_moe", 32), ("mixtral", 48), ("olmoe", 32), ("deepseek_v3", 32), ("gpt_oss", 32)]
)
def test_sizes_of_every_family(family, inner, tmp_path):
    registry = Registry.installed()
    assert sizes(str(tiny(family, tmp_path)), registry) == [Sizes(8, 64, inner, 2)]


def test_what_broke_is_named(pretended, monkeypatch):
    def broken(plan, part, *_):
        if part == "first" and plan.first.stages == 3:
            raise RuntimeError("out of registers")
        return lambda: 1e-5

    monkeypatch.setattr(tune, "Tuner", functools.partial(tune.Tuner, timer=broken))
    done = moefold("--shape", "tiny", "--tokens", "2", "--workers", "0")
    assert "never chosen: gate and up pair 16 32x32 w4 s3: RuntimeError: out of registers" in done.output
    assert "1 candidates cannot be run here, or are wrong" in done.output
    assert done.exit_code == 0


def test_what_time_was_too_short_for_is_said(pretended, monkeypatch):
    from types import SimpleNamespace

    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(clock), strftime=tune.time.strftime))
    done = moefold("--shape", "tiny", "--tokens", "1,2", "--seconds", "26", "--workers", "0")
    assert "left out, for lack of time: tiny at 2 tokens" in done.output
    assert "1 plans written" in done.output
    done = moefold("--shape", "tiny", "--tokens", "1,2", "--seconds", "1", "--workers", "0")
    assert done.exit_code == 1
    assert "nothing was written" in done.output
    assert "error: 1 seconds are too few for any plan" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name one of MODEL, --shape NAME, or --hidden"),
        (["demo", "--shape", "tiny"], "name one of MODEL"),
        (["--shape", "tiny", "--experts", "4"], "name one of MODEL"),
        (["--shape", "mixtral"], "there is no shape mixtral; did you mean mixtral-8x7b?"),
        (["--hidden", "64", "--inner", "32"], "--hidden, --inner given without --experts, --top-k"),
        (["--hidden", "64", "--inner", "32", "--experts", "7", "--top-k", "2"], "write an even number of experts"),
        (["--hidden", "64", "--inner", "32", "--experts", "4", "--top-k", "6"], "1 <= top_k <= experts"),
        (["--hidden", "0"], "Invalid value for '--hidden'"),
        (["demo", "--hidden", "64"], "--hidden: MODEL says it already"),
        (["demmo"], "demmo is no directory, no hub id (OWNER/NAME), and no model that a plugin ships"),
        (["--shape", "tiny", "--tokens", "1,two"], "--tokens 1,two: write whole numbers from 1"),
        (["--shape", "tiny", "--tokens", "0"], "--tokens 0: write whole numbers from 1"),
        (["--shape", "tiny", "--seconds", "0"], "Invalid value for '--seconds'"),
        (["--shape", "tiny", "--out", "no/such/t.json"], "--out no/such/t.json: there is no such directory"),
        (["--shape", "tiny", "--out", "."], "--out . is a directory; name a file"),
    ],
)
def test_what_the_user_got_wrong(options, message, pretended):
    done = moefold(*options)
    assert done.exit_code == 2, done.output
    assert message in done.output


def test_a_broken_table_is_found_before_anything_is_measured(pretended):
    (pretended / "t.json").write_text("{}")
    done = moefold("--shape", "tiny", "--out", pretended / "t.json")
    assert done.exit_code == 2
    assert "t.json is no table of plans" in done.output


def test_without_a_gpu_it_says_what_to_do(pretended, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = moefold("--shape", "tiny", TRITON_INTERPRET="0")
    assert done.exit_code == 2
    assert (
        "torch finds no CUDA device, and plans are measured on the GPU that will serve; run this there" in done.output
    )


def test_a_model_without_experts_is_refused(tmp_path):
    path = tiny("llama", tmp_path, intermediate_size=64)
    with pytest.raises(CheckpointError, match="has no layer with routed experts"):
        sizes(str(path), Registry.installed())
