"""One token's time without waits and with fewer bytes: what is left out, what is drawn, and that it is checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import same_work

from moefold_kernels.bench import TINY
from moefold_kernels.bench.weights import random_experts
from moefold_kernels.triton import by_entry, by_entry_launch

HERE = Path(__file__).parent


@pytest.mark.parametrize(("way", "fewer"), [("down does not wait", 1), ("neither waits", 2)])
def test_a_way_waits_before_it_writes_instead_of_before_it_reads(way, fewer, tmp_path):
    module = same_work.unwaiting(same_work.WAYS[way], tmp_path)
    own, other = Path(by_entry.__file__).read_text(), Path(module.__file__).read_text()
    calls = [(one.count("after_the_one_before(CHAIN)"), one.count("launch_the_next(CHAIN)")) for one in (own, other)]
    assert calls == [(2, 0), (2 - fewer, fewer)]
    lines = other.splitlines()
    waits = [at for at, line in enumerate(lines) if line.strip() == "wait_for_the_one_before(CHAIN)"]
    assert len(waits) == fewer
    assert all(lines[at + 1].lstrip().startswith("tl.store(out") for at in waits)
    assert module.gate_up is not by_entry.gate_up


def test_other_waits_are_not_left_out_silently(tmp_path):
    with pytest.raises(SystemExit, match=r"has other waits than same_work\.py knows"):
        same_work.unwaiting((("    nothing of the kind(CHAIN)", "    tl.store(out + (place_of(row)"),), tmp_path)


def test_what_is_launched_is_put_back(tmp_path):
    other = same_work.unwaiting(same_work.WAYS["neither waits"], tmp_path)
    with same_work.launching(other):
        assert by_entry_launch.by_entry is other
    assert by_entry_launch.by_entry is by_entry


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("reads", ["experts", "pairs"])
def test_a_token_goes_to_so_many_experts_or_pairs(units, reads):
    generator = torch.Generator().manual_seed(3)
    experts = random_experts(TINY, generator, "exponent")
    pair = {expert: number for number, members in enumerate(experts.pairs) for expert in members}
    for _ in range(20):
        (index,) = same_work.within(experts, TINY, units, reads, generator).top_k_index.tolist()
        assert len(set(index if reads == "experts" else [pair[expert] for expert in index])) == units


MEASURED = """
import torch
import same_work
from in_turns import plan, with_plan
from moefold_kernels.bench import TINY
from moefold_kernels.triton import by_entry
torch.set_num_threads(1)
same_work.BATCHES = 2
cut = "entry 1 32x64 w1 s1 a0"
for name in ("packed", "dense"):
    one = same_work.Measured(TINY, with_plan(name, plan(f"{cut} / {cut}")), torch.device("cpu"), 1e12)
    for units in (2, 1):
        one.add(units, "as it is", by_entry)
    for entry in one.measure(1):
        print("right", entry["units"], 0 < entry["error"] < 2e-2, entry["us"] > 0, entry["floor"] > 0)
"""


def run(*command):
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)


def test_fewer_bytes_are_checked_and_timed():
    done = run("-c", MEASURED)
    told = [line for line in done.stdout.splitlines() if line.startswith("right")]
    assert told == 2 * ["right 2 True True True", "right 1 True True True"], done.stdout + done.stderr
    assert "2 read, as it is: " in done.stdout


def test_a_plan_of_another_kind_is_refused(tmp_path):
    done = run(HERE / "same_work.py", tmp_path / "out.json", "tiny")
    assert (done.returncode, done.stderr) == (1, "tiny: one token of packed does not go by entry\n")
