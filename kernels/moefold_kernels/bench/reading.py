"""A Triton kernel that reads memory and does nothing else: what reading can reach on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefold_kernels.triton.portability import after_the_one_before

BLOCKS = ((2048, 4), (4096, 8), (8192, 8))  # elements of a tile, warps
PROGRAMS = (4, 8, 16)  # per multiprocessor


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]  # Triton's language has no types
    source, sums, where, count, BLOCK: tl.constexpr, CHAIN: tl.constexpr, AHEAD: tl.constexpr
):
    program = tl.program_id(0)
    begin, step = program * BLOCK, tl.num_programs(0) * BLOCK
    total = tl.zeros([BLOCK], dtype=tl.int32)
    if AHEAD:  # nothing that the kernel before writes
        total += tl.load(source + begin + tl.arange(0, BLOCK), mask=begin < count, other=0)
        begin += step
    after_the_one_before(CHAIN)
    if where is not None:
        source += tl.multiple_of(tl.load(where), BLOCK)
    for start in range(begin, count, step):
        total += tl.load(source + start + tl.arange(0, BLOCK))
    tl.store(sums + program, tl.sum(total, axis=0))


def readers(processors: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways to read an int32 tensor of less than 2 ** 31 elements, a multiple of the largest tile; each gives sums."""
    for block, warps in BLOCKS:
        for per_processor in PROGRAMS:
            yield reader(block, warps, processors * per_processor)


def reader(
    block: int, warps: int, programs: int, chain: bool = False, ahead: bool = False, where: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """One of them; with `chain` a launch may begin while the one before ends, and reads once that has ended.

    `ahead`: it has each program's first tile read before that. `where` ([1] int32, a number of whole tiles): how much
    further on the others lie, which is itself read first, once the one before has ended, as an index is.
    """

    def read(source: Tensor) -> Tensor:
        sums = torch.empty(programs, dtype=torch.int32, device=source.device)
        options: dict[str, Any] = {"BLOCK": block, "CHAIN": chain, "AHEAD": ahead, "num_warps": warps}
        if chain:
            options["launch_pdl"] = True
        _read[(programs,)](source, sums, where, source.numel(), **options)
        return sums

    return read
