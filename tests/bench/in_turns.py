"""Cells timed in turns: contenders and plans of one shape and number of tokens beside one another, in one call.

`python tests/bench/in_turns.py OUT.json qwen3-30b-a3b:2,512:packed,pair8 mixtral-8x7b:64:pair4` compiles what it needs
in parallel, checks every one against float64 (balanced, skewed, poisoned), and times rounds of all of a cell in turns,
so that a clock that falls is alike for all; ratios are against the first named. With `--plans FILE`, lines such as

    qwen3-30b-a3b:512:pair8,pair6 | overlapped_pair 64+16 64x64 w8 s2 / overlapped_pair 64+16 64x64 w4 s2 b4

are plans that are timed beside the one that is chosen. A shape may also be HIDDENxINNERxEXPERTSxTOP_K. What is wrong or
cannot be run is said, and not timed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moefold_kernels.bench import CONTENDERS, SHAPES, Bench, Contender, ahead, find, kernel, record
from moefold_kernels.bench.cases import Case, Shape, cases
from moefold_kernels.bench.published import VLLM
from moefold_kernels.errors import WrongResultError
from moefold_kernels.triton import compilation, configs
from moefold_kernels.triton.plans import Plan, Tile, join

BURST = 3
"""Rounds whose median is given beside that of all: the clock has not fallen yet."""
FLAGS = {"w": "warps", "s": "stages", "g": "group", "k": "splits", "a": "ahead", "r": "registers", "b": "blocks"}


Given = dict[tuple[str, int, str], list[Plan]]
"""Plans to try, by shape, tokens and contender."""


class Cell(NamedTuple):
    """One shape and number of tokens, with the contenders to be timed in turns."""

    shape: Shape
    tokens: int
    names: tuple[str, ...]

    def plans(self, given: Given, device: torch.device) -> Iterator[tuple[str, Plan]]:
        """Of each contender the plan that a layer would be run with, then those given for it."""
        for name in self.names:
            chosen = configs.choose(ahead.of_shape(self.shape, self.tokens, CONTENDERS[name]), device)
            for plan in dict.fromkeys([chosen, *given.get((self.shape.name, self.tokens, name), ())]):
                yield name, plan


def cells(text: str) -> Iterator[Cell]:
    """Those that SHAPE:TOKENS:CONTENDERS names."""
    name, tokens, names = text.split(":")
    if re.fullmatch(r"\d+(x\d+){3}", name):
        hidden, inner, experts, top_k = map(int, name.split("x"))
        shape = Shape(name, experts, hidden, inner, top_k)
    else:
        shape = find("shape", name, SHAPES)
    for count in tokens.split(","):
        yield Cell(shape, int(count), tuple(names.split(",")))


def tile(text: str) -> Tile:
    """What `str(Tile)` writes, read back."""
    mode, entries, size, *rest = text.split()
    tokens, _, extra = entries.partition("+")
    rows, columns = size.split("x")
    more = {FLAGS[word[0]]: int(word[1:]) for word in rest if word != "e4m3"}
    return Tile(mode, int(tokens), int(extra or 0), int(rows), int(columns), terms=2 * ("e4m3" in rest), **more)


def plan(text: str) -> Plan:
    """What `str(Plan)` writes, read back, or what is joined."""
    if text.startswith("joined "):
        return join(tile(text.removeprefix("joined ")))
    first, second = text.split("/")
    return Plan(tile(first), tile(second))


def plans(path: Path | None) -> Given:
    """Those of a file."""
    found: Given = {}
    for line in path.read_text().splitlines() if path else ():
        if line := re.sub(r"#.*", "", line).strip():
            where, text = line.split("|")
            for cell in cells(where.strip()):
                for name in cell.names:
                    found.setdefault((cell.shape.name, cell.tokens, name), []).append(plan(text.strip()))
    return found


def with_plan(name: str, chosen: Plan) -> Contender:
    """A contender whose layer is cut so."""
    one = CONTENDERS[name]
    weights = kernel.dense_weights if one.reads == "experts" else kernel.packed_weights
    return Contender(
        f"{name} [{chosen}]", one.reads, lambda experts: kernel.layer(weights(experts), chosen), one.can, one.format
    )


def compile_all(wanted: Iterable[tuple[Cell, str, Plan]], device: torch.device, workers: int | None) -> None:
    """Fill Triton's cache; what cannot be compiled is said."""
    plans = ((cell.shape, cell.tokens, CONTENDERS[name], chosen) for cell, name, chosen in wanted)
    ready = ahead.compile_plans(plans, device, workers=workers)
    for job, why in ready.refused.items():
        print(f"cannot: {job.shape.name} {job.tokens} {job.format} {job.plan}: {why}")
    print(f"{ready.plans} plans compiled by {ready.workers} processes in {ready.seconds:.0f} s", flush=True)


@torch.no_grad()
def measure(bench: Bench, cell: Cell, given: Given, rounds: int) -> list[dict[str, Any]]:
    """Check each, then time all in turns."""
    (case,) = cases([cell.shape], [cell.tokens])
    skewed = Case(cell.shape, cell.tokens, "skewed")
    made, found = [], []
    for name, chosen in cell.plans(given, bench.device):
        contender = with_plan(name, chosen)
        try:
            error = bench.check(skewed, contender)
            prepared = bench.prepare(case, contender)
        except WrongResultError as wrong:
            print(f"WRONG: {wrong}", flush=True)
            continue
        except torch.OutOfMemoryError:
            raise
        except Exception as refused:  # whatever a compiler or a launch raises condemns one plan
            print(f"cannot: {case.name} {name} {chosen}: {compilation.reason(refused)}", flush=True)
            continue
        made.append(prepared)
        shipped = chosen == configs.choose(ahead.of_shape(cell.shape, cell.tokens, CONTENDERS[name]), bench.device)
        found.append(
            {"shape": cell.shape.name, "tokens": cell.tokens, "name": name, "plan": str(chosen), "chosen": shipped}
            | {"error": prepared.info["error"], "skewed": error, "floor": prepared.info["floor"]}
        )
    turns = [[one.rounds() for one in made] for _ in range(rounds)]
    for info, times in zip(found, zip(*turns, strict=True), strict=True):
        info |= {"us": statistics.median(times) * 1e6, "burst": statistics.median(times[:BURST]) * 1e6}
        print(told(info, found[0]), flush=True)
    return found


def told(info: dict[str, Any], first: dict[str, Any]) -> str:
    """One plan's line."""
    us, known = info["us"], VLLM.get(info["shape"], {}).get(info["tokens"])
    against = f", {known.microseconds / us:.2f}x of vLLM's" if known else ""
    return (
        f"{info['shape']} {info['tokens']:5} {info['name']:8} {us:7.1f} us ({info['burst']:.1f}), "
        f"{first['us'] / us:.3f} ({first['burst'] / info['burst']:.3f}), {info['floor'] * 1e6 / us:.0%} of its floor"
        f"{against}, error {info['error']:.1e}, skewed {info['skewed']:.1e}"
        f"{', chosen' if info['chosen'] else ''}: {info['plan']}"
    )


def main() -> None:
    """Compile, check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("cells", nargs="+", metavar="SHAPE:TOKENS:CONTENDERS")
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, help="of a cell; by default as many as the benchmark has")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after so long")
    args = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = [cell for text in args.cells for cell in cells(text)]
    given = plans(args.plans)
    compile_all(((cell, *one) for cell in wanted for one in cell.plans(given, device)), device, args.workers)
    bench = Bench(device, args.batches)
    ceilings = bench.ceilings
    print(f"reads {ceilings.read_bandwidth / 1e12:.3f} TB/s, {ceilings.matmul_rate / 1e12:.0f} TFLOP/s", flush=True)
    about = {"machine_info": record.machine(device), "date": time.strftime("%Y-%m-%d"), "rounds": args.rounds}
    about |= {"read_bandwidth": ceilings.read_bandwidth, "matmul_rate": ceilings.matmul_rate}
    entries: list[dict[str, Any]] = []
    for cell in sorted(wanted, key=lambda one: one.shape.name):  # weights of one shape at a time
        if time.monotonic() - began > args.seconds:
            print(f"no time for {cell.shape.name} {cell.tokens}")
            continue
        entries += measure(bench, cell, given, args.rounds)
        args.out.write_text(json.dumps(about | {"cells": entries}, indent=1) + "\n")
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
