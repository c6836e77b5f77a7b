"""The fused merge-and-pack pass on layers of real shapes with random weights: right first, then how fast.

`python tests/bench/packing_pass.py OUT.json` needs a CUDA device and 12 GB on it. Words and counts of every block size
are compared with the definition (over poisoned words), then a whole layer (the pass over the largest weight and the
pass that packs, for each matrix) is timed as a CUDA graph, beside the device's own copy in the same process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from moefold_kernels import layout, reference
from moefold_kernels.triton.pack import LARGEST_BLOCKS, PACK_BLOCKS, Block, largest_exponent, pack_pairs

SHAPES = {  # experts, hidden, inner
    "Mixtral-8x7B": (8, 4096, 14336),
    "Qwen3-30B-A3B": (128, 2048, 768),
    "DeepSeek-MoE-16B": (64, 2048, 1408),
}
POISON = 0x5A5A
THRESHOLD = 0.4
REPEATS = 30


class Layer(NamedTuple):
    """One layer's inputs and outputs, allocated once."""

    matrices: dict[str, Tensor]  # [expert, rows, columns] bfloat16
    norms: dict[str, Tensor]  # [expert, columns] float32
    pairs: Tensor  # [pair, 2] int32
    words: dict[str, Tensor]  # [pair, rows, columns] int16
    tops: Tensor  # [matrix] int64
    counts: Tensor  # [matrix, count] int64

    @property
    def positions(self) -> int:
        return sum(words.numel() for words in self.words.values())


def layer_of(experts: int, hidden: int, inner: int, zeros: float = 0.0) -> Layer:
    """Random normal weights, of which a share is zero in both experts of a pair, and norms of experts with tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    gate_up = torch.empty(experts, 2 * inner, hidden, dtype=torch.bfloat16, device="cuda")
    down = torch.empty(experts, hidden, inner, dtype=torch.bfloat16, device="cuda")
    for weights in (gate_up, down):
        weights.normal_(std=weights.shape[2] ** -0.5, generator=generator)
        if zeros:
            weights *= torch.rand(weights.shape[1:], device="cuda", generator=generator) >= zeros
    matrices = {"gate_proj": gate_up[:, :inner], "up_proj": gate_up[:, inner:], "down_proj": down}
    norms = {n: torch.rand(experts, w.shape[2], device="cuda", generator=generator) + 0.5 for n, w in matrices.items()}
    pairs = torch.randperm(experts, device="cuda", generator=generator).view(-1, 2).int()
    words = {n: torch.empty(len(pairs), *w.shape[1:], dtype=torch.int16, device="cuda") for n, w in matrices.items()}
    counts = torch.zeros(3, len(reference.PACK_COUNTS), dtype=torch.int64, device="cuda")
    return Layer(matrices, norms, pairs, words, torch.ones(3, dtype=torch.int64, device="cuda"), counts)


def find_tops(layer: Layer, block: Block) -> None:
    """The pass over the largest weight, for every matrix."""
    layer.tops.fill_(1)
    for number, weights in enumerate(layer.matrices.values()):
        largest_exponent(weights, layer.pairs.view(-1), layer.tops[number : number + 1], block)


def pack(layer: Layer, block: Block) -> None:
    """The pass that packs, for every matrix."""
    layer.counts.zero_()
    for number, (name, weights) in enumerate(layer.matrices.items()):
        top, counts = layer.tops[number : number + 1], layer.counts[number]
        pack_pairs(weights, layer.pairs, layer.norms[name], THRESHOLD, top, layer.words[name], counts, block)


def check(layer: Layer) -> None:
    """Every block gives the definition's tops, words and counts; leaves the right words there."""
    for block in LARGEST_BLOCKS:
        find_tops(layer, block)
        for top, weights in zip(layer.tops.tolist(), layer.matrices.values(), strict=True):
            least, most = torch.aminmax(weights)
            expected = int(torch.maximum(-least, most).view(torch.int16)) >> layout.FRACTION_BITS
            if top != expected:
                sys.exit(f"{block}: the largest exponent is {top}, not {expected}")
    pairs = layer.pairs.tolist()
    for number, (name, weights) in enumerate(layer.matrices.items()):
        top = layer.tops[number : number + 1]
        words, counts = reference.pack_pairs(weights, pairs, layer.norms[name], THRESHOLD, int(top))
        for block in PACK_BLOCKS:
            out = layer.words[name].fill_(POISON)
            _, found = pack_pairs(weights, layer.pairs, layer.norms[name], THRESHOLD, top, out, block=block)
            if not torch.equal(out, words):
                sys.exit(f"{name}, {block}: {int((out != words).sum())} of {words.numel()} words are wrong")
            if found.tolist() != counts.tolist():
                sys.exit(f"{name}, {block}: counts are {found.tolist()}, not {counts.tolist()}")
        del words


def seconds(work: Callable[[], Any], graph: bool = True) -> float:
    """The median of warm runs: replays of a CUDA graph, or launches as they come."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    run = work
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
        run = captured.replay
    times = []
    for _ in range(REPEATS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes a second that a large copy on the device reads and writes."""
    source = torch.randint(-(2**30), 2**30, (1 << 29,), dtype=torch.int32, device="cuda")  # 2 GiB
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))


def measure(name: str, layer: Layer, copy: float, blocks: tuple[Block, ...]) -> dict[str, Any]:
    """One layer: each pass by itself and both together, against the copy."""
    read = 2 * sum(weights.numel() for weights in layer.matrices.values())
    moved = read + 2 * layer.positions
    largest = {str(block): seconds(lambda block=block: find_tops(layer, block)) for block in LARGEST_BLOCKS}
    aminmax = seconds(lambda: [torch.aminmax(weights) for weights in layer.matrices.values()])
    packing = {str(block): seconds(lambda block=block: pack(layer, block)) for block in blocks}

    def both() -> None:
        find_tops(layer, LARGEST_BLOCKS[0])
        pack(layer, blocks[0])

    print(f"\n{name}: {len(layer.pairs)} pairs, {read / 1e9:.2f} GB of weights", flush=True)
    for what, found, size in (("largest", largest, read), ("pack", packing, moved)):
        for block, took in found.items():
            print(f"  {what:8}{took * 1e3:7.3f} ms {size / took / 1e12:6.2f} TB/s {size / took / copy:5.0%}  {block}")
    whole, launched = seconds(both), seconds(both, graph=False)
    print(
        f"  torch.aminmax {aminmax * 1e3:.3f} ms; a layer {whole * 1e3:.3f} ms, without a graph {launched * 1e3:.3f} ms"
    )
    return {
        "name": name,
        "pairs": len(layer.pairs),
        "weight_bytes": read,
        "moved_bytes": moved,
        "seconds": {"largest": largest, "aminmax": aminmax, "pack": packing, "layer": whole, "launched": launched},
        "of_copy": {block: moved / took / copy for block, took in packing.items()},
        "counts": dict(zip(reference.PACK_COUNTS, layer.counts.sum(0).tolist(), strict=True)),
    }


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device")
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a copy reads and writes {copy / 1e12:.2f} TB/s")
    rows = []
    for name in args.shapes:
        layer = layer_of(*SHAPES[name])
        check(layer)
        rows.append(measure(name, layer, copy, PACK_BLOCKS))
        del layer
    if args.shapes:  # what the second look of a program costs, where every program takes it
        layer = layer_of(*SHAPES[args.shapes[0]], zeros=0.001)
        check(layer)
        rows.append(measure(f"{args.shapes[0]}, one position in 1000 zero", layer, copy, PACK_BLOCKS[:1]))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    report = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": versions,
        "copy_bytes_per_second": copy,
        "repeats": REPEATS,
        "layers": rows,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
