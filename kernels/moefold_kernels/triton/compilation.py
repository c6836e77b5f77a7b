"""Kernels compiled in parallel before any is timed: processes fill Triton's cache on disk, which all of them share.

A kernel is compiled by running it on tables without a tile, over one unit's worth of weights that stands for all: what
Triton compiles for (types, strides, alignment, options) comes out as in the real layer, and nothing is computed.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moefold_kernels import layout, layout_pairs
from moefold_kernels.bench.cases import Shape
from moefold_kernels.errors import BenchmarkError
from moefold_kernels.levels import INTEGERS
from moefold_kernels.triton import e4m3_launch, layer, leveled_launch
from moefold_kernels.triton.plans import Plan
from moefold_kernels.triton.weights import Leveled, Planes, Projections, Weights

Part = Literal["first", "second", "whole"]
MOST_WORKERS = 16
CONTEXT = 1 << 30
"""Bytes of GPU memory that a process takes before it holds any tensor of ours (0.5 GB on an H200), and some more."""


class Job(NamedTuple):
    """One projection's kernel, or a whole layer's, for a batch of so many tokens."""

    shape: Shape
    dense: bool
    tokens: int
    plan: Plan
    part: Part
    device: str
    format: str = layout.EXPONENT
    """Of the pairs."""


def build(job: Job) -> str:
    """Compile what a job needs; says in a line why that cannot be, or nothing."""
    try:
        with torch.no_grad():
            _run(job)
            if job.device != "cpu":
                torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return ""  # of this process, not of the kernel: it is compiled where it is timed
    except Exception as error:  # whatever a compiler raises condemns one kernel
        return reason(error)
    return ""


def reason(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160].removesuffix(": ")


class Compiler:
    """Compiles jobs in `workers` processes; with none, everything is compiled where it is first run."""

    def __init__(self, workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_deaf)

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def compile(
        self, jobs: Sequence[Job], deadline: float, report: Callable[[int, int], None]
    ) -> tuple[list[Job], dict[Job, str]]:
        """The jobs that can be run, in their order, and why others cannot; those not done in time are in neither."""
        if self._pool is None:
            return list(jobs), {}
        said: dict[Job, str] = {}
        try:
            for job, answer in _answers({self._pool.submit(build, job): job for job in jobs}, deadline):
                said[job] = answer
                report(len(said), len(jobs))
        except BrokenExecutor as error:
            raise BenchmarkError(
                "a process that compiles kernels died, as they do when memory runs out; give --workers a smaller number"
            ) from error
        return [job for job in jobs if said.get(job) == ""], {job: answer for job, answer in said.items() if answer}


def workers(shape: Shape, tokens: int, device: torch.device, format: str = layout.EXPONENT) -> int:
    """How many processes the cores and the GPU's free memory allow; none where nothing is compiled."""
    if device.type != "cuda":
        return 0
    unit = shape.unit_bytes if format == layout.EXPONENT else shape.experts // 2 * shape.pair_bytes(format)
    work = 2 * tokens * shape.top_k * (shape.inner + 2 * shape.hidden)
    room = torch.cuda.mem_get_info(device)[0] // (CONTEXT + unit + work)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST_WORKERS, cores - 1, room))


def _answers(futures: dict[Future[str], Job], deadline: float) -> Iterator[tuple[Job, str]]:
    left = set(futures)
    try:
        while left:
            done, left = wait(left, max(0.0, min(deadline - time.monotonic(), 3600.0)), FIRST_COMPLETED)
            if not done:
                return
            for future in done:
                yield futures[future], future.result()
    finally:
        for future in left:
            future.cancel()


def _deaf() -> None:
    """Control-C is for the process that asked; a worker ends when that one says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(RuntimeError):
        torch.set_num_threads(1)


def _run(job: Job) -> None:
    shape, plan = job.shape, job.plan
    weights = _stand_in(shape, job.dense, job.format, job.device)
    index = torch.zeros(job.tokens, shape.top_k, dtype=torch.int64, device=job.device)
    x = torch.zeros(job.tokens, shape.hidden, dtype=torch.bfloat16, device=job.device)
    scales = torch.zeros(index.shape, dtype=torch.bfloat16, device=job.device)
    if plan.by_entry:
        layer.forward(weights, x, index.fill_(-1), scales, plan=plan)
        return
    if job.part == "whole":
        plan = layer.as_run(weights, plan, x, index.numel())
    tables = layer.route_for(weights, index, plan, x if job.part == "whole" else None)  # as search.py calls it
    for table in (*tables.first, *tables.second):
        table.fill_(-1)
    for table in (tables.order, tables.offsets, tables.ready, tables.items):
        table.zero_()
    if plan.joined:
        parts = layer.both(weights, x, scales, tables, plan.first)
        layer.combine(parts, index, len(weights.places), x.dtype)
        return
    if job.part != "second":
        layer.gate_up(weights, x, shape.top_k, tables, plan)
    if job.part != "first":
        between = torch.zeros(index.numel(), shape.inner, dtype=torch.bfloat16, device=job.device)
        layer.down(
            weights,
            layer.Inner(between, e4m3_launch.between(between, plan), leveled_launch.takes(weights, plan)),
            index,
            scales,
            tables,
            plan,
            torch.bfloat16,
        )


@functools.lru_cache(maxsize=1)
def _stand_in(shape: Shape, dense: bool, format: str, device: str) -> Weights:
    """One unit in the place of all."""
    places = torch.arange(shape.experts, dtype=torch.int32, device=device)
    if format != layout.EXPONENT and not dense:
        return Weights(empty(shape, format, torch.device(device)), None, places, places)
    units = shape.experts if dense else shape.experts // 2
    dtype = torch.bfloat16 if dense else torch.int16

    def repeated(rows: int, columns: int) -> Tensor:
        return torch.zeros(1, rows, columns, dtype=dtype, device=device).expand(units, -1, -1)

    wide, down = repeated(2 * shape.inner, shape.hidden), repeated(shape.hidden, shape.inner)
    matrices = Projections(wide[:, : shape.inner], wide[:, shape.inner :], down)
    return Weights(None if dense else matrices, matrices if dense else None, places, places)


def empty(shape: Shape, format: str, device: torch.device) -> Leveled:
    """A layer's pairs in a few-bit format, whole: kernels take contiguous planes only."""

    pairs = shape.experts // 2

    def planes(fused: int, rows: int, columns: int) -> Planes:
        held = {}
        for name, (lines, width) in layout_pairs.stored(format, rows, columns).items():
            kind = torch.int16 if name == "scale" else torch.int32
            held[name] = torch.zeros(pairs, fused * lines, width, dtype=kind, device=device)
        return Planes(held["words"], held.get("low"), held["scale"])

    levels = torch.zeros(3, INTEGERS, dtype=torch.int32, device=device)
    wide, narrow = planes(2, shape.inner, shape.hidden), planes(1, shape.hidden, shape.inner)
    return Leveled(format, wide, narrow, levels, True, shape.inner, shape.hidden, coded=True)
