"""Small layers by every kind of kernel, for compute-sanitizer to look at; each is compared with float64, too.

`python tests/bench/sanitized.py --compile` first, which compiles the kernels in parallel; then

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/bench/sanitized.py

and again with `--tool synccheck` or `racecheck`; `--part 2/8` is the second of eight parts, for as many processes.
Of few bits, planes lie in bands in one shape, in another those of down in rows (then as in the ragged one plain kernels
take them); tokens of the long one are rewritten by routing's.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import torch
from in_turns import plan, with_plan

from moefold_kernels import layout_pairs
from moefold_kernels.bench import CONTENDERS, Bench, Case, Shape, ahead
from moefold_kernels.errors import KernelsError

BANDS = Shape("bands", experts=4, hidden=512, inner=512, top_k=2)
MIXED = Shape("mixed", experts=4, hidden=512, inner=320, top_k=2)
LONG = Shape("long", experts=4, hidden=1024, inner=512, top_k=2)
RAGGED = Shape("ragged", experts=4, hidden=200, inner=136, top_k=2)
FEW = tuple(layout_pairs.MAGNITUDE_BITS)


class Look(NamedTuple):
    """A plan on some layers."""

    plan: str
    shapes: tuple[Shape, ...]
    tokens: int
    names: tuple[str, ...]


LOOKS = (
    Look("slot 16 32x128 w4 s3 / slot 16 64x128 w4 s3", (BANDS, RAGGED), 1, ("packed", "dense")),
    Look("entry 1 4x256 w2 s2 / entry 1 8x256 w4 s1 k2 r128 b4", (BANDS, RAGGED), 3, ("packed", "dense")),
    Look("entry 1 2x512 w1 s1 / entry 1 2x256 w1 s2", (BANDS, MIXED, RAGGED), 3, FEW),
    Look("pair 16 32x64 w4 s3 / pair 16 64x64 w4 s3 k2", (BANDS, RAGGED), 9, ("packed", "dense")),
    Look("joined pair 16 32x64 w4 s3", (BANDS,), 9, ("packed", "dense")),
    Look("joined streamed 16 64x64 w8 s8", (BANDS, MIXED), 30, ("packed",)),
    Look("joined streamed 16+16 64x128 w8 s2", (BANDS,), 50, ("packed",)),
    Look("joined streamed 32+8 64x128 w8 s3", (BANDS,), 100, ("packed",)),
    Look("overlapped_pair 32 32x64 w4 s4 / overlapped_pair 32 64x64 w4 s4", (BANDS,), 40, ("packed",)),
    Look("overlapped 64 64x64 w8 s4 / overlapped 64 128x64 w8 s4", (BANDS,), 100, ("packed",)),
    Look("overlapped 256+32 64x64 w8 s4 g2 / overlapped 256+32 128x64 w8 s4 g2 b2", (BANDS,), 600, ("packed",)),
    Look("slot 16 32x64 w4 s2 / slot 16 64x64 w4 s2", (RAGGED,), 3, FEW),
    Look("overlapped 4 64x256 w8 s2 e4m3 r64 / overlapped_pair 4 64x256 w4 s2 k2 e4m3", (BANDS, MIXED), 3, FEW),
    Look("overlapped_pair 8 64x256 w8 s2 e4m3 / overlapped_pair 8 64x128 w4 s3 e4m3", (BANDS, MIXED, LONG), 14, FEW),
    Look("overlapped_pair 32 64x256 w8 s2 e4m3 r128 / overlapped_pair 32 128x256 w8 s2 e4m3 r128", (BANDS,), 50, FEW),
    Look("overlapped_pair 64+16 64x64 w8 s2 / overlapped_pair 64+16 64x64 w4 s2 b2", (BANDS, MIXED), 150, FEW),
    Look("overlapped_pair 64+32 64x64 w8 s2 b2 / overlapped_pair 64+32 64x64 w4 s2 b2", (BANDS,), 170, FEW),
    Look("overlapped 64 64x64 w8 s2 b4 / overlapped 64 128x64 w8 s2 b2", (BANDS,), 90, FEW),
    Look("overlapped 128+32 128x64 w8 s2 g2 / overlapped 128+32 128x64 w8 s2 g2 b2", (BANDS,), 300, FEW),
    Look("overlapped 256+32 64x64 w8 s2 g2 b2 / overlapped 256+32 128x64 w8 s2 g2 b4", (BANDS, MIXED), 600, FEW),
    Look("overlapped 64 64x256 w8 s2 e4m3 r128 / overlapped 64 64x128 w4 s2 e4m3", (LONG,), 600, FEW),
)


def main() -> int:
    """Run all; how many were wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--part", default="1/1")
    args = parser.parse_args()
    part, _, parts = args.part.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        parser.error(f"--part {args.part}: write 2/8 for the second of eight parts")
    device, wrong = torch.device("cuda"), 0
    every = [(look, shape, name) for look in LOOKS for shape in look.shapes for name in look.names]
    every = every[int(part) - 1 :: int(parts)]
    if args.compile:
        given = ((shape, one.tokens, CONTENDERS[name], plan(one.plan)) for one, shape, name in every)
        for job, why in ahead.compile_plans(given, device).refused.items():
            print(f"cannot be compiled: {job.shape.name}, {job.format}: {job.plan}: {why}", flush=True)
    bench = Bench(device, batches=1)
    for look, shape, name in every:
        what = f"{shape.name}, {look.tokens} tokens, {name}: {look.plan}"
        try:
            error = bench.check(Case(shape, look.tokens, "skewed"), with_plan(name, plan(look.plan)))
            torch.cuda.synchronize()
        except KernelsError as problem:
            wrong += 1
            print(f"WRONG {what}: {problem}", flush=True)
        else:
            print(f"{error:.1e} {what}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
