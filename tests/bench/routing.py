"""Routing alone, by either way: `python tests/bench/routing.py OUT.json` (a CUDA device).

Checked against a stable sort first; then medians of CUDA-graph replays of 20 routings one behind another, so kernels
are chained as in a layer.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from moefold_kernels.triton import e4m3_launch, routing
from moefold_kernels.triton.plans import Plan, Tile

EACH, REPLAYS = 20, 21
SHAPES = {"mixtral-8x7b": (8, 2, 4096), "qwen3-30b-a3b": (128, 8, 2048), "deepseek-v3": (256, 8, 7168)}
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
WAYS = {"comparing": 2**30, "chunks": 0}
"""routing.FEW."""
MOST_COMPARED = 4096
"""Entries beyond which comparing all with all is not tried."""


def routed(experts: int, top_k: int, tokens: int, hidden: int, terms: bool, device: torch.device) -> dict[str, Any]:
    """Arguments of `routing.route`: balanced random choices, pairs in order."""
    generator = torch.Generator(device).manual_seed(tokens)
    index = torch.rand(tokens, experts, generator=generator, device=device).topk(top_k).indices
    places = torch.arange(experts, dtype=torch.int32, device=device)
    tile = Tile("overlapped", 64, 0, 64, 64, 8, 2)
    x = torch.randn(tokens, hidden, generator=generator, device=device).bfloat16()
    rows = routing.Rows(x, *e4m3_launch.empty(tokens, hidden, x, 1)) if terms else None
    plan = Plan(tile, tile)
    given = {"top_k_index": index, "places": places, "pairs": experts // 2, "alone": 0, "plan": plan, "chain": True}
    return given | {"rows": rows}


def measure(given: dict[str, Any]) -> float:
    """Microseconds of one."""
    found = routing.route(**given)
    flat = given["top_k_index"].flatten()
    if not torch.equal(found.order.long(), flat.argsort(stable=True)):
        raise SystemExit("the order is wrong")
    counts = flat.bincount(minlength=len(given["places"])).cumsum(0)
    if not torch.equal(found.offsets[1 : len(counts) + 1].long(), counts):
        raise SystemExit("the offsets are wrong")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [routing.route(**given) for _ in range(EACH)]
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / EACH)
    assert all(torch.equal(one.order, found.order) for one in kept)
    return statistics.median(times)


def main() -> None:
    """All shapes."""
    device, cells = torch.device("cuda"), []
    for shape, (experts, top_k, hidden) in SHAPES.items():
        for tokens in TOKENS:
            for way, few in WAYS.items():
                if few and tokens * top_k > MOST_COMPARED:
                    continue
                routing.FEW = few
                both = [measure(routed(experts, top_k, tokens, hidden, terms, device)) for terms in (False, True)]
                cells.append({"shape": shape, "tokens": tokens, "way": way, "us": both[0], "us with terms": both[1]})
                print(f"{shape:16}{tokens:6} {way:10} {both[0]:6.2f} us, with terms {both[1]:6.2f}", flush=True)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    Path(sys.argv[1]).write_text(json.dumps({"about": about, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
