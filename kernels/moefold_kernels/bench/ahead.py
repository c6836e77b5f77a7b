"""Kernels compiled before a run, in parallel: one after another, those of all cases take many minutes of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from moefold_kernels import layout
from moefold_kernels.bench import kernel
from moefold_kernels.bench.cases import Shape
from moefold_kernels.bench.contenders import Contender

if TYPE_CHECKING:
    from moefold_kernels.triton import configs
    from moefold_kernels.triton.compilation import Job
    from moefold_kernels.triton.plans import Plan

Wanted = tuple[Shape, int, Contender]
"""What is to be run: a shape, a number of tokens, and by whom."""


class Ready(NamedTuple):
    """What was done."""

    plans: int
    workers: int
    """Processes; with none, every kernel is compiled where it is first run."""
    seconds: float
    refused: Mapping[Job, str]
    """What cannot be compiled, and why."""


def of_shape(shape: Shape, tokens: int, contender: Contender) -> configs.Shape:
    """What a plan is chosen for."""
    from moefold_kernels.triton import configs

    dense = contender.reads == "experts"
    return configs.Shape(shape.hidden, shape.inner, shape.experts, shape.top_k, dense, tokens, contender.format)


def compile_chosen(
    wanted: Iterable[Wanted], device: torch.device, progress: Callable[[int, int], None] = lambda *_: None
) -> Ready | None:
    """Compile what our kernels among the contenders will run with there; nothing where that is no GPU."""
    if device.type != "cuda" or not kernel.can_run(device)[0]:
        return None
    from moefold_kernels.triton import configs

    ours = [one for one in wanted if one[2].can is kernel.can_run]
    return compile_plans(((*one, configs.choose(of_shape(*one), device)) for one in ours), device, progress)


def compile_plans(
    wanted: Iterable[tuple[Shape, int, Contender, Plan]],
    device: torch.device,
    progress: Callable[[int, int], None] = lambda *_: None,
    workers: int | None = None,
) -> Ready:
    """The same with plans of one's own, by as many processes as cores and memory allow if no number is given."""
    from moefold_kernels.triton import compilation

    jobs: dict[Job, None] = {}
    for shape, tokens, contender, plan in wanted:
        of = of_shape(shape, tokens, contender)
        jobs[compilation.Job(shape, of.dense, tokens, plan, "whole", str(device), of.format)] = None
    if workers is None:
        formats = ((job, layout.EXPONENT if job.dense else job.format) for job in jobs)
        room = (compilation.workers(job.shape, job.tokens, device, format) for job, format in formats)
        workers = min(room, default=0)
    began = time.monotonic()
    with compilation.Compiler(workers) as compiler:
        _, refused = compiler.compile(list(jobs), float("inf"), progress)
    return Ready(len(jobs), workers, time.monotonic() - began, refused)
