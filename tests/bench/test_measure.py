"""The timing core with pretended kernels: right ones are timed, wrong ones never."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from moefold_kernels import reference
from moefold_kernels.bench import CONTENDERS, TINY, Bench, Case, Contender, ahead, ceilings, record, timing
from moefold_kernels.bench.correctness import poisoned
from moefold_kernels.errors import BenchmarkError, WrongResultError

CASE = Case(TINY, 5)


def right(experts):
    def forward(batch):
        gate = lambda gate, up: silu(gate) * up  # noqa: E731
        return reference.experts(experts, batch.hidden, batch.top_k_index, batch.top_k_weights, gate).bfloat16()

    return forward


def pretended(change):
    """A contender that computes the layer and then spoils it."""

    def prepare(experts):
        forward = right(experts)
        return lambda batch: change(forward(batch), batch)

    return Contender("pretended", "pairs", prepare, lambda device: (True, ""))


def unwritten(out, _batch):
    spoilt = torch.empty_like(out)
    spoilt[:-1] = out[:-1]
    return spoilt


def one_batch_only(seen=[]):  # noqa: B006  (remembers between calls on purpose)
    """Right the first time, for the check; then what it gave before."""

    def change(out, _batch):
        seen.append(out)
        return seen[0].clone()

    return change


WRONG = {
    "scaled": (lambda out, _: out * 1.02, "off float64 by 2"),
    "one row swapped": (lambda out, _: out.roll(1, 0), "off float64"),
    "zeros": (lambda out, _: torch.zeros_like(out), "off float64 by 1"),
    "a row unwritten": (unwritten, "left 1 of 5 rows unwritten"),
    "float32": (lambda out, _: out.float(), r"is \(5, 64\) torch.float32, not"),
    "short": (lambda out, _: out[:-1], r"is \(4, 64\)"),
    "always the first": (one_batch_only(), "off float64"),
}


def test_a_right_kernel_is_timed_and_described(bench):
    prepared = bench.prepare(CASE, pretended(lambda out, _: out))
    entry = record.measure(prepared, 5)
    assert entry["stats"]["rounds"] == 5
    assert 0 < entry["stats"]["min"] <= entry["stats"]["median"] <= entry["stats"]["max"]
    info = entry["extra_info"]
    assert 2 <= info["pairs_hit"] <= 4
    assert info["experts_hit"] >= info["pairs_hit"]
    assert info["bytes"] == info["pairs_hit"] * (3 * 64 * 96 * 2)
    assert info["flops"] == 5 * 2 * 3 * 2 * 64 * 96
    assert 0 < info["amax_bandwidth"] <= info["read_bandwidth"]
    assert info["floor"] == max(info["bytes"] / info["read_bandwidth"], info["flops"] / info["matmul_rate"])
    assert 0 < info["error"] < 1e-2
    dense = Contender("d", "experts", right, lambda device: (True, ""))
    assert bench.prepare(CASE, dense).info["bytes"] == info["experts_hit"] * (3 * 64 * 96 * 2)


def test_what_the_device_reaches_is_measured_before_a_contender_runs(monkeypatch):
    """Behind a large product a GPU's clock is held down; ceilings.py rests, so nothing may come between that and it."""
    order = []
    measure = ceilings.measure
    monkeypatch.setattr(ceilings, "measure", lambda device: order.append("ceilings") or measure(device))
    bench = Bench(torch.device("cpu"), batches=1)
    for _ in range(2):
        prepared = bench.prepare(CASE, pretended(lambda out, _: order.append("layer") or out))
        record.measure(prepared, 2)
    assert order[0] == "ceilings"
    assert order.count("ceilings") == 1
    assert order.count("layer") > 4


def test_a_gpu_rests_behind_the_product(monkeypatch):
    order = []
    monkeypatch.setattr(ceilings, "_seconds", lambda *_: order.append("measured") or 1.0)
    monkeypatch.setattr(ceilings, "_readers", lambda device: [])
    monkeypatch.setattr(ceilings.time, "sleep", lambda seconds: order.append(seconds))
    draw = {name: getattr(torch, name) for name in ("randint", "randn")}
    monkeypatch.setattr(torch, "randint", lambda *args, **_: draw["randint"](0, 2, (8,), dtype=torch.int32))
    monkeypatch.setattr(torch, "randn", lambda *args, **_: draw["randn"](2, 2))
    ceilings.measure(torch.device("cuda"))
    assert order == ["measured", "measured", ceilings.REST]
    ceilings.measure(torch.device("cpu"))
    assert order[3:] == ["measured", "measured"]


@pytest.mark.parametrize(("tokens", "batches"), [(1, 64), (5, 13), (8, 8), (100, 8)])
def test_few_tokens_have_more_batches(tokens, batches, bench):
    prepared = bench.prepare(Case(TINY, tokens), pretended(lambda out, _: out))
    assert len(prepared.rounds.outputs) == prepared.info["batches"] == batches


def test_as_many_batches_as_are_asked_for():
    prepared = Bench(torch.device("cpu"), batches=3).prepare(CASE, pretended(lambda out, _: out))
    assert prepared.info["batches"] == 3


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_kernel_is_never_timed(change, message, bench):
    with pytest.raises(WrongResultError, match=f"^tiny-5-balanced-pretended: the output .*{message}"):
        bench.prepare(CASE, pretended(change))


@pytest.mark.parametrize("change", ["scaled", "a row unwritten"])
def test_a_check_alone_times_nothing(change, bench, monkeypatch):
    spoil, message = WRONG[change]
    monkeypatch.setattr(timing, "rounds", lambda *_: pytest.fail("it was timed"))
    assert 0 < bench.check(CASE, pretended(lambda out, _: out)) < 1e-2
    with pytest.raises(WrongResultError, match=message):
        bench.check(CASE, pretended(spoil))


@pytest.mark.gpu
def test_a_graph_keeps_what_it_reads():
    """Nobody else does: memory that is given to others while a graph is replayed gives wrong results, and times."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    source = torch.ones(1 << 20, device=device)

    def adding(held):
        return lambda x: x + held

    once = timing.rounds(device, adding(source.clone()), [source])
    del source
    others = [torch.zeros(1 << 20, device=device) for _ in range(8)]
    once()
    assert (once.outputs[0] == 2).all()
    del others


def test_nothing_is_compiled_ahead_where_there_is_no_gpu():
    packed = CONTENDERS["packed"]
    assert ahead.compile_chosen([(TINY, 1, packed)], torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "dense", "format"), [("packed", False, "exponent"), ("dense", True, "exponent"), ("pair5", False, "pair5")]
)
def test_what_plans_are_chosen_for(name, dense, format):
    shape = ahead.of_shape(TINY, 3, CONTENDERS[name])
    assert shape == (TINY.hidden, TINY.inner, TINY.experts, TINY.top_k, dense, 3, format)


def test_plans_are_compiled_once_and_refusals_are_told(monkeypatch):
    """By processes in the place of which there are two lines here: one plan cannot be compiled."""
    pytest.importorskip("triton", reason="needs triton")
    from moefold_kernels.triton import compilation, configs

    plan = configs.rule(ahead.of_shape(TINY, 1, CONTENDERS["packed"]))
    other = configs.rule(ahead.of_shape(TINY, 900, CONTENDERS["packed"]))
    assert plan != other
    asked = []

    def compile(self, jobs, deadline, report):
        asked.extend(jobs)
        return jobs[1:], {jobs[0]: "too large"}

    monkeypatch.setattr(compilation.Compiler, "compile", compile)
    wanted = [(TINY, 1, CONTENDERS[name], one) for name in ("packed", "dense") for one in (plan, other, plan)]
    ready = ahead.compile_plans(wanted, torch.device("cpu"), workers=0)
    assert (ready.plans, ready.workers, list(ready.refused.values())) == (4, 0, ["too large"])
    assert [(job.dense, job.plan, job.part) for job in asked] == [
        (dense, one, "whole") for dense in (False, True) for one in (plan, other)
    ]


def test_poison_fills_fresh_memory_and_is_taken_back():
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(3, dtype=torch.bfloat16).new_empty(4).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_cannot_run_says_why(bench):
    refusing = Contender("picky", "pairs", right, lambda device: (False, "wants another device"))
    with pytest.raises(BenchmarkError, match=r"picky cannot run on (cpu|cuda): wants another device"):
        bench.prepare(CASE, refusing)
    with pytest.raises(BenchmarkError, match="0 batches"):
        Bench(torch.device("cpu"), batches=0)


READING = """
import torch
from moefold_kernels.bench.reading import reader
x = torch.randint(1000, (8 * 256,), dtype=torch.int32)  # the interpreter refuses to overflow
zero = torch.zeros(1, dtype=torch.int32)
for how in ({}, {"ahead": True}, {"where": zero}, {"ahead": True, "where": zero}):
    for programs in (3, 11):  # more than there are tiles
        print(int(reader(256, 4, programs, **how)(x).sum(dtype=torch.int32)) == int(x.sum(dtype=torch.int32)))
"""


OURS = """
import torch
from moefold_kernels.bench import CONTENDERS, TINY, Bench, Case
torch.set_num_threads(1)
bench = Bench(torch.device("cpu"), batches=1)
for name in ("packed", "dense"):
    print(name, bench.prepare(Case(TINY, 3), CONTENDERS[name]).info["error"] < 2e-2)
"""


def interpret(code, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "kernels"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_the_reading_kernel_reads_everything(monkeypatch):
    """8 tiles over 3 programs, so that they are uneven."""
    assert interpret(READING, monkeypatch) == 8 * "True\n"


def test_our_kernels_are_called_as_they_are(monkeypatch):
    assert interpret(OURS, monkeypatch) == "packed True\ndense True\n"
