"""What reading alone takes, for as few bytes as a layer reads: `python tests/bench/reads.py OUT.json 72 100 182`.

The read bandwidth that the benchmark compares with is that of 4 GiB at once. A layer of few tokens reads 70 to 300 MB,
in launches that wait for one another: a few microseconds in which memory has nothing to do. So here kernels that only
read take so many MB (10 ** 6 bytes), each time others of 4 GiB, as replays of one CUDA graph: in one launch; in one
that may begin while the one before ends (programmatic dependent launch), but reads nothing before that has ended; and
in two such launches, of two thirds and of one, as gate and up and down are. The fastest of some tiles and numbers of
programs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefold_kernels.bench import ceilings, record, timing
from moefold_kernels.triton.portability import after_the_one_before

REGIONS, ROUNDS = 64, 9
UNIT = 8192
"""Numbers of int32: whole tiles of each way."""
WAYS = tuple((block, warps, programs) for block, warps in ((2048, 4), (4096, 8)) for programs in (4, 8, 16))


@triton.jit
def _read(source, sums, count, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    after_the_one_before(CHAIN)
    for start in range(program * BLOCK, count, tl.num_programs(0) * BLOCK):
        total += tl.load(source + start + tl.arange(0, BLOCK))
    tl.store(sums + program, tl.sum(total, axis=0))


def reader(way: tuple[int, int, int], processors: int, chain: bool, launches: int) -> Any:
    """A function that reads an int32 tensor of whole UNITs; it gives the last launch's sums."""
    block, warps, programs = way
    grid = (processors * programs,)
    more = {"launch_pdl": True} if chain else {}

    def read(source: Tensor) -> Tensor:
        count = source.numel()
        first = count if launches == 1 else 2 * count // 3 // UNIT * UNIT
        for part in (source[:first], source[first:]):
            if part.numel():
                sums = torch.empty(grid[0], dtype=torch.int32, device=source.device)
                _read[grid](part, sums, part.numel(), BLOCK=block, CHAIN=chain, num_warps=warps, **more)
        return sums

    return read


def main() -> None:
    """Time, tell, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("megabytes", type=float, nargs="+")
    args = parser.parse_args()
    device = torch.device("cuda")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    large = ceilings.measure(device).read_bandwidth
    source = torch.randint(-(2**31), 2**31 - 1, (1 << 30,), dtype=torch.int32, device=device)
    kinds = {"one launch": (False, 1), "one chained": (True, 1), "two chained": (True, 2)}
    print(f"4 GiB: {large / 1e12:.3f} TB/s", flush=True)
    found = []
    for megabytes in args.megabytes:
        count = round(megabytes * 1e6 / 4 / UNIT) * UNIT
        step = (source.numel() - count) // (REGIONS - 1) // UNIT * UNIT
        order = [region * 27 % REGIONS for region in range(REGIONS)]  # what comes next does not lie beside
        inputs = [source[region * step :][:count] for region in order]
        entry: dict[str, Any] = {"megabytes": 4 * count / 1e6, "floor": 4 * count / large * 1e6}
        for kind, (chain, launches) in kinds.items():
            times = {}
            for way in WAYS:
                once = timing.rounds(device, reader(way, processors, chain, launches), inputs)
                times[way] = statistics.median(once() for _ in range(ROUNDS)) * 1e6
            best = min(times, key=lambda way: times[way])
            entry[kind] = {"us": times[best], "share": entry["floor"] / times[best], "way": best}
        found.append(entry)
        told = ", ".join(f"{kind} {entry[kind]['us']:.2f} us ({entry[kind]['share']:.1%})" for kind in kinds)
        print(f"{entry['megabytes']:.1f} MB, floor {entry['floor']:.2f} us: {told}", flush=True)
        about = {"machine_info": record.machine(device), "date": time.strftime("%Y-%m-%d"), "rounds": ROUNDS}
        args.out.write_text(json.dumps(about | {"read_bandwidth": large, "reads": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
