"""Plans as text, and cells timed in turns, in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from in_turns import Cell, cells, plan, plans

from moefold_kernels.bench import SHAPES
from moefold_kernels.errors import BenchmarkError
from moefold_kernels.triton import configs

HERE = Path(__file__).parent


def test_every_shipped_plan_is_read_back():
    seen = 0
    for path in configs.SHIPPED.glob("*.json"):
        for one in configs.read_table(path).values():
            assert plan(str(one)) == one
            seen += 1
    assert seen > 50


def test_cells_are_shapes_tokens_and_contenders():
    qwen = SHAPES["qwen3-30b-a3b"]
    assert list(cells("qwen3-30b-a3b:2,512:packed,pair8")) == [
        Cell(qwen, tokens, ("packed", "pair8")) for tokens in (2, 512)
    ]
    (own,) = cells("4096x6400x16x2:1:packed")
    assert (own.shape.hidden, own.shape.inner, own.shape.experts, own.shape.top_k) == (4096, 6400, 16, 2)
    with pytest.raises(BenchmarkError, match="did you mean qwen3-30b-a3b"):
        list(cells("qwen3-30b:1:packed"))


def test_plans_of_a_file_are_tried_beside_the_chosen_one(tmp_path):
    text = "pair 16 32x32 w4 s2 / pair 16 64x32 w4 s2"
    (tmp_path / "plans").write_text(
        f"# none\n\ntiny:1,16:packed,dense | {text}  # by hand\ntiny:1:packed | joined {text[:20]}\n"
    )
    given = plans(tmp_path / "plans")
    assert {key: len(found) for key, found in given.items()} == {
        ("tiny", 1, "packed"): 2, ("tiny", 1, "dense"): 1, ("tiny", 16, "packed"): 1, ("tiny", 16, "dense"): 1
    }  # fmt: skip
    (cell,) = cells("tiny:16:packed,pair8")
    named = list(cell.plans(given, torch.device("cpu")))
    assert [name for name, _ in named] == ["packed", "packed", "pair8"]
    assert str(named[1][1]) == text


def test_cells_are_checked_timed_and_kept(tmp_path):
    """A GPU is not needed for right or wrong; times of the interpreter mean nothing."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which the shape is too small for what is asked")
    done = subprocess.run(
        [sys.executable, HERE / "in_turns.py", tmp_path / "cells.json", "tiny:3:packed,pair4", "--batches", "1",
         "--rounds", "2", "--workers", "0"],
        capture_output=True, text=True, check=False, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "cells.json").read_text())
    assert [(one["name"], one["chosen"]) for one in kept["cells"]] == [("packed", True), ("pair4", True)]
    assert all(one["us"] > 0 for one in kept["cells"])
    assert all(0 < one[error] < 2e-2 for one in kept["cells"] for error in ("error", "skewed"))
    assert "tiny     3 packed" in done.stdout
