"""Killed at any point, a run goes on: nothing finished is computed again, and the result is the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models import tiny
from test_cli import PIPELINE


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moefold", "run", "p.yaml", "--json", *arguments]


def stored(work: Path) -> dict[str, int]:
    """When each result was written, by key."""
    return {note.parent.name: note.stat().st_mtime_ns for note in work.glob("results/*/*/note.json")}


def run_until(folder: Path, results: int) -> None:
    """Run, and kill without warning as soon as so many results are stored."""
    process = subprocess.Popen(command(), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(stored(folder / ".moefold")) < results and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


def finish(folder: Path, *arguments: str) -> dict:
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_killed_twice(tmp_path: Path):
    tiny("qwen3_moe", tmp_path / "model")
    (tmp_path / "text.txt").write_text("Nothing is computed twice, and nothing is lost. " * 40)
    (tmp_path / "p.yaml").write_text(PIPELINE.format(model=tmp_path / "model", text=tmp_path / "text.txt"))

    for results in (4, 9):
        run_until(tmp_path, results)
    before = stored(tmp_path / ".moefold")
    assert not (tmp_path / "packed").exists() or (tmp_path / "packed" / "config.json").exists()

    report = finish(tmp_path)
    after = stored(tmp_path / ".moefold")
    kept = {key: written for key, written in before.items() if key in after}
    assert len(kept) >= 5
    assert all(after[key] == written for key, written in kept.items()), "something stored was computed again"
    assert (
        0 < sum(took["ran"] for took in report["stages"].values()) < sum(t["tasks"] for t in report["stages"].values())
    )

    whole = finish(tmp_path, "--work", "fresh", "--to", "whole")
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert report["metrics"] == whole["metrics"]
