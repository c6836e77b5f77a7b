"""A Triton kernel that reads memory and does nothing else: what reading can reach on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = ((2048, 4), (4096, 8), (8192, 8))  # elements of a tile, warps
PROGRAMS = (4, 8, 16)  # per multiprocessor


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]  # Triton's language has no types
    source, sums, count, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(program * BLOCK, count, tl.num_programs(0) * BLOCK):
        total += tl.load(source + start + tl.arange(0, BLOCK))
    tl.store(sums + program, tl.sum(total, axis=0))


def readers(processors: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways to read an int32 tensor of less than 2 ** 31 elements, a multiple of the largest tile; each gives sums."""
    for block, warps in BLOCKS:
        for per_processor in PROGRAMS:
            yield _reader(block, warps, processors * per_processor)


def _reader(block: int, warps: int, programs: int) -> Callable[[Tensor], Tensor]:
    def read(source: Tensor) -> Tensor:
        sums = torch.empty(programs, dtype=torch.int32, device=source.device)
        _read[(programs,)](source, sums, source.numel(), BLOCK=block, num_warps=warps)  # pyright: ignore[reportCallIssue]
        return sums

    return read
