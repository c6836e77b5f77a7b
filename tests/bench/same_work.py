"""What a token waits for: `python tests/bench/same_work.py OUT.json SHAPE ... [--contenders packed,dense]`.

A layer of one token reads each choice's expert, or its pair, by two kernels (by_entry.py). Two ways to see what that
takes beside reading, with everything else as it is:

- *Fewer bytes.* A token's choices lie within fewer and fewer experts or pairs: launches, programs, loads and products
  are the same, and what is read again comes from L2. Were memory all that a layer waits for, a byte less would save
  what reading it takes.
- *No waits.* The second kernel does not wait for the first, or neither waits for the one before. That is wrong: down
  may read what another token left. But as many bytes are read by as many instructions, so what is saved is the time in
  which memory has nothing to do because a kernel waits.

What is not wrong on purpose is checked against float64 (fresh tensors poisoned, and a round of what is timed). All of a
contender are timed in turns, as replays of a CUDA graph over 64 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from moefold_kernels.bench import (
    CONTENDERS,
    SHAPES,
    Contender,
    ahead,
    ceilings,
    correctness,
    find,
    record,
    routing,
    timing,
)
from moefold_kernels.bench.cases import Case, Shape
from moefold_kernels.bench.correctness import Expected
from moefold_kernels.bench.routing import Batch
from moefold_kernels.bench.weights import random_experts
from moefold_kernels.reference import PackedExperts
from moefold_kernels.triton import by_entry, by_entry_launch, configs

BATCHES = 64
IMPORT = "import after_the_one_before, ask"
IMPORTS = (IMPORT, f"{IMPORT}, launch_the_next, wait_for_the_one_before")
WAIT, THERE = "    after_the_one_before(CHAIN)\n", "    launch_the_next(CHAIN)\n"
GATE_UP, OUT = "    own = tl.load", "    tl.store(out + (place_of(row)"
DOWN, OUTPUT = "    return (planes", "        tl.store(out + token.to(tl.int64) * out_row + at"
"""What each kernel does behind its wait, and where it waits instead: before it writes, so that none overtakes two."""
DOWN_GOES_ON = (WAIT + DOWN, THERE + DOWN), (OUTPUT, f"        wait_for_the_one_before(CHAIN)\n{OUTPUT}")
BOTH_GO_ON = (*DOWN_GOES_ON, (WAIT + GATE_UP, THERE + GATE_UP), (OUT, f"    wait_for_the_one_before(CHAIN)\n{OUT}"))
WAYS = {"as it is": (), "down does not wait": DOWN_GOES_ON, "neither waits": BOTH_GO_ON}


def unwaiting(changes: Sequence[tuple[str, str]], folder: Path) -> ModuleType:
    """by_entry.py with other waits, as a module of its own."""
    text = Path(by_entry.__file__).read_text()
    for own, other in (IMPORTS, *changes):
        if text.count(own) != 1:
            raise SystemExit(f"by_entry.py has other waits than same_work.py knows: no {own!r}, or several")
        text = text.replace(own, other)
    path = folder / f"by_entry_{len(changes)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def launching(module: ModuleType) -> Iterator[None]:
    """Layers by this module's kernels."""
    own = by_entry_launch.by_entry
    by_entry_launch.by_entry = module
    try:
        yield
    finally:
        by_entry_launch.by_entry = own


def within(experts: PackedExperts, shape: Shape, units: int, reads: str, generator: torch.Generator) -> Batch:
    """A token whose choices go in turn to so many random units: experts, or either expert of pairs."""
    batch = routing.draw(Case(shape, 1), generator)
    turn = torch.arange(shape.top_k, device=generator.device) % units
    if reads == "experts":
        index = torch.randperm(shape.experts, generator=generator, device=generator.device)[:units][turn]
    else:
        pairs = torch.tensor(experts.pairs, device=generator.device)
        drawn = pairs[torch.randperm(len(pairs), generator=generator, device=generator.device)[:units]]
        index = drawn[turn, torch.randint(2, turn.shape, generator=generator, device=generator.device)]
    return Batch(batch.hidden, index[None], batch.top_k_weights)


class Measured:
    """One contender's ways, all timed in turns."""

    def __init__(self, shape: Shape, contender: Contender, device: torch.device, bandwidth: float) -> None:
        self.shape, self.contender, self.device = shape, contender, device
        self.generator = torch.Generator(device).manual_seed(1)
        self.experts = random_experts(shape, self.generator, contender.format)
        self.call = contender.prepare(self.experts)
        unit = shape.pair_bytes(contender.format) if contender.reads == "pairs" else shape.unit_bytes
        self.floor = unit / bandwidth * 1e6
        self.rounds: list[timing.Rounds] = []
        self.entries: list[dict[str, Any]] = []

    def add(self, units: int, way: str, module: ModuleType) -> None:
        """Get a way ready, checked if it waits."""
        drawn = self.experts, self.shape, units, self.contender.reads, self.generator
        batches = [within(*drawn) for _ in range(BATCHES)]
        entry: dict[str, Any] = {"shape": self.shape.name, "name": self.contender.name, "units": units, "way": way}
        with launching(module):
            made = timing.rounds(self.device, self.call, batches)
        if module is by_entry:
            expected = Expected(self.experts, batches[0], self.generator)
            with correctness.poisoned():
                error = expected.error(self.call(batches[0]))
            made()
            entry["error"] = max(error, expected.error(made.outputs[0]))
        self.rounds.append(made)
        self.entries.append(entry | {"floor": units * self.floor})

    def measure(self, rounds: int) -> list[dict[str, Any]]:
        """An entry for each way."""
        turns = [[one() for one in self.rounds] for _ in range(rounds)]
        first = self.entries[0]
        for entry, times in zip(self.entries, zip(*turns, strict=True), strict=True):
            entry["us"] = statistics.median(times) * 1e6
            told = f"{entry['shape']} {entry['name']:8} {entry['units']} read, {entry['way']}: {entry['us']:.2f} us"
            saved = f"{first['us'] - entry['us']:.2f} of {first['floor'] - entry['floor']:.2f}"
            print(f"{told}, floor {entry['floor']:.2f}; saves {saved}", flush=True)
        return self.entries


@torch.no_grad()
def main() -> None:
    """Check, time, tell, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--contenders", default="packed")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = ceilings.measure(device).read_bandwidth
    print(f"reads {bandwidth / 1e12:.3f} TB/s", flush=True)
    about = {"machine_info": record.machine(device), "date": time.strftime("%Y-%m-%d"), "rounds": args.rounds}
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        modules = {way: unwaiting(changes, Path(folder)) if changes else by_entry for way, changes in WAYS.items()}
        for text in args.shapes:
            shape = find("shape", text, SHAPES)
            for name in args.contenders.split(","):
                contender = find("contender", name, CONTENDERS)
                if not configs.choose(ahead.of_shape(shape, 1, contender), device).by_entry:
                    raise SystemExit(f"{shape.name}: one token of {name} does not go by entry")
                measured = Measured(shape, contender, device, bandwidth)
                for units in range(shape.top_k, 0, -1):
                    measured.add(units, "as it is", by_entry)
                for way in list(WAYS)[1:]:
                    measured.add(shape.top_k, way, modules[way])
                entries += measured.measure(args.rounds)
                found = about | {"read_bandwidth": bandwidth, "entries": entries}
                args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
