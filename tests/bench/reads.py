"""What reading alone takes, for as few bytes as a layer reads: `python tests/bench/reads.py OUT.json 72 100 182`.

The read bandwidth that the benchmark compares with is that of 4 GiB at once. A layer of few tokens reads 70 to 300 MB,
in launches that wait for one another: a few microseconds in which memory has nothing to do. So here kernels that only
read take so many MB (10 ** 6 bytes), each time others of 4 GiB, as replays of one CUDA graph: in one launch; in one
that may begin while the one before ends (programmatic dependent launch), but reads nothing before that has ended; and
in two such launches, of two thirds and of one, as gate and up and down are; in two of which the second reads its
programs' first tiles before it waits, as down does; and in the same two, each of which reads behind its wait where the
rest lies, as gate and up read an index, and as down reads activations before it has registers for more words. The
fastest of the tiles and numbers of programs that reading.py has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefold_kernels.bench import ceilings, record, timing
from moefold_kernels.bench.reading import BLOCKS, PROGRAMS, reader

REGIONS, ROUNDS = 64, 9
UNIT = max(block for block, _ in BLOCKS)
"""Numbers of int32: whole tiles of each way."""
WAYS = tuple((block, warps, programs) for block, warps in BLOCKS for programs in PROGRAMS)


def launched(reads: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Any]:
    """A function that reads a tensor of whole UNITs in so many launches, one or two; it gives the sums of each."""

    def one(source: Tensor) -> list[Tensor]:
        first = (source.numel() if len(reads) == 1 else 2 * source.numel() // 3) // UNIT * UNIT
        parts = (source[:first], source[first:])
        return [read(part) for read, part in zip(reads, parts, strict=False)]

    return one


def right(call: Callable[[Tensor], Any], source: Tensor) -> bool:
    """Whether all of it was read; sums of int32 overflow alike."""
    found = sum(part.sum(dtype=torch.int32) for part in call(source))
    return int(found) == int(source.sum(dtype=torch.int32))


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
    there = torch.zeros(1, dtype=torch.int32, device=device)
    kinds: dict[str, Sequence[dict[str, Any]]] = {
        "one launch": [{}],
        "one chained": [{"chain": True}],
        "two chained": [{"chain": True}] * 2,
        "two chained, one ahead": [{"chain": True}, {"chain": True, "ahead": True}],
        "the same, looked up": [{"chain": True, "where": there}, {"chain": True, "ahead": True, "where": there}],
    }
    print(f"4 GiB: {large / 1e12:.3f} TB/s", flush=True)
    found = []
    for megabytes in args.megabytes:
        count = round(megabytes * 1e6 / 4 / UNIT) * UNIT
        step = (source.numel() - count) // (REGIONS - 1) // UNIT * UNIT
        order = [region * 27 % REGIONS for region in range(REGIONS)]  # what comes next does not lie beside
        inputs = [source[region * step :][:count] for region in order]
        entry: dict[str, Any] = {"megabytes": 4 * count / 1e6, "floor": 4 * count / large * 1e6}
        for kind, launches in kinds.items():
            times = {}
            for block, warps, programs in WAYS:
                call = launched([reader(block, warps, processors * programs, **how) for how in launches])
                if not right(call, inputs[0]):
                    raise SystemExit(f"{kind}, {block} numbers, {programs} programs: not all was read")
                once = timing.rounds(device, call, inputs)
                times[block, warps, programs] = statistics.median(once() for _ in range(ROUNDS)) * 1e6
            best = min(times, key=lambda way: times[way])
            entry[kind] = {"us": times[best], "share": entry["floor"] / times[best], "way": best}
        found.append(entry)
        told = ", ".join(f"{kind} {entry[kind]['us']:.2f} us ({entry[kind]['share']:.1%})" for kind in kinds)
        print(f"{entry['megabytes']:.1f} MB, floor {entry['floor']:.2f} us: {told}", flush=True)
        about = {"machine_info": record.machine(device), "date": time.strftime("%Y-%m-%d"), "rounds": ROUNDS}
        args.out.write_text(json.dumps(about | {"read_bandwidth": large, "reads": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
