"""How long it takes to merge a model's layers on a GPU, and in how much memory: the stages of the pipeline `mergemoe`.

`python tests/bench/merging.py --layers 24 --json FILE` takes Qwen1.5-MoE's shapes (60 experts to 30, 2048 to 1408) and
128 x 2048 calibration tokens. Every layer has fresh random experts and fresh random tokens under a random router, in
memory: reading the model and the calibration forward are not counted; tokens come from the host in every stage, as they
do in a run. Before anything is timed, one small layer is merged on the GPU and on the CPU, and has to agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import samples, tiny
from moefold import Activity, Checkpoint, Context, Experts, Groups, Layer, Routed, Text
from moefold_plugins.align import align
from moefold_plugins.calibrate import forward, observe
from moefold_plugins.grouping import group_by_use
from moefold_plugins.mergemoe import mergemoe
from moefold_plugins.similarity import similarity_gated_outputs

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 1408, 60, 4


def small_layer(folder: Path) -> Layer:
    """A layer of the same kind of experts; its config is what matters, experts are given from outside."""
    return Checkpoint.open(str(tiny("qwen3_moe", folder))).layers()[0]


def agree(layer: Layer, device: torch.device) -> float:
    """The relative difference of one small layer's merged down projections on the device and on the CPU."""
    cpu = Context(torch.device("cpu"), torch.Generator())
    gpu = Context(device, torch.Generator())
    routed = forward(layer, Text("random", samples(32, 32).int()), None, None, cpu)
    experts = layer.experts()
    groups = Groups([[0, 5], [3, 1], [2, 7]], [4, 6])
    merged = []
    for context in (cpu, gpu):
        activity = observe(layer, routed, experts, context)
        merged.append(mergemoe(layer, routed, experts, groups, activity, context, ridge=1e-2).down.float().cpu())
    return float((merged[0] - merged[1]).norm() / merged[0].norm())


def random_layer(tokens: int, device: torch.device) -> tuple[Experts, Routed]:
    """Experts on the device, tokens on the host, chosen by a random router with uneven use."""
    gate_up, down = _in_pairs(2 * INNER, HIDDEN, device), _in_pairs(HIDDEN, INNER, device)
    x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    router = torch.randn(HIDDEN, EXPERTS, device=device, dtype=torch.bfloat16) * HIDDEN**-0.5
    logits = (x @ router).float() + torch.randn(EXPERTS, device=device)
    weights, index = logits.softmax(dim=1).topk(TOP_K)
    length = 2048 if tokens % 2048 == 0 else tokens
    inputs = torch.empty(tokens // length, length, 0)  # only its shape is read
    return Experts(gate_up, down), Routed(inputs, x.cpu(), index.cpu(), weights.to(torch.bfloat16).cpu())


def _in_pairs(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Random matrices, of which the first and second half have 0.8 of their values in common, pair by pair."""
    own = torch.randn(EXPERTS, rows, columns, device=device, dtype=torch.bfloat16) * columns**-0.5
    shared = torch.randn(EXPERTS // 2, rows, columns, device=device, dtype=torch.bfloat16) * columns**-0.5
    return 0.6 * own + 0.8 * shared.repeat(2, 1, 1)


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    took: dict[str, float] = defaultdict(float)

    def timed(name, stage, *inputs, **options):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        value = stage(*inputs, **options)
        if cuda:
            torch.cuda.synchronize()
        took[name] += time.perf_counter() - start
        return value

    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        layer = small_layer(Path(folder))
        difference = agree(layer, device)
        if difference > 2e-2:
            sys.exit(f"merged on {device} and on the CPU, one layer differs by {difference:.1e}; nothing was timed")
        context = Context(device, torch.Generator())
        peak, chosen = 0, []
        for number in range(args.layers):
            experts, routed = random_layer(args.tokens, device)
            layer = replace(layer, number=0)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            activity: Activity = timed("observe", observe, layer, routed, experts, context)
            similarity = timed("similarity.gated_outputs", similarity_gated_outputs, layer, routed, experts, context)
            timed("group.by_use", group_by_use, layer, activity, similarity, experts=EXPERTS // 2)
            groups = Groups([[e, e + EXPERTS // 2] for e in range(EXPERTS // 2)], [])  # every merged expert is fitted
            aligned = timed("align", align, experts, groups, context)
            merged = timed("mergemoe", mergemoe, layer, routed, aligned, groups, activity, context)
            if not bool(merged.down.isfinite().all()) or merged.count != EXPERTS // 2:
                sys.exit(f"layer {number}: {merged.count} experts, finite: {bool(merged.down.isfinite().all())}")
            chosen += [fit["ridge"] for fit in merged.figures["fits"].values()]
            peak = max(peak, torch.cuda.max_memory_allocated() if cuda else 0)
            print(number, {k: round(v, 2) for k, v in took.items()}, flush=True)
    found = {
        "shapes": f"{EXPERTS} experts to {EXPERTS // 2}, {HIDDEN} -> {INNER}, top-{TOP_K}",
        "layers": args.layers,
        "tokens": args.tokens,
        "seconds": dict(took),
        "merging_seconds": sum(took.values()) - took["observe"],
        "peak_device_bytes": peak,
        "ridges": {str(r): chosen.count(r) for r in set(chosen)},
        "cpu_gpu_difference": difference,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
    }
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
