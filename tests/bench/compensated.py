"""How long compensated merging of one layer takes on a GPU, and in how much memory: the stage `puzzlemoe.compensated`.

`python tests/bench/compensated.py --json FILE` takes Mixtral's shapes (8 experts, 4096 to 14336, top-2) and
Qwen3-30B-A3B's (128, 2048 to 768, top-8), each with 128 x 2048 calibration tokens: random experts, random tokens under
a random router with uneven use, tokens from the host as in a run. Reading the model and the calibration forward are not
counted. Before anything is timed, one small layer is merged on the GPU and on the CPU, and has to agree.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import samples, tiny
from moefold import Checkpoint, Context, Experts, Groups, Layer, Routed, Text
from moefold_plugins import compensated as stage
from moefold_plugins import pair_merging
from moefold_plugins.calibrate import forward, observe
from moefold_plugins.compensation import Walk
from moefold_plugins.moments import Calibration
from moefold_plugins.pairing import pair_by_usage

CLOSE = 2**-6
"""Two steps of bf16: sums in another order move what is rounded by a little, and about a fifth of all by one step."""


class Shape(NamedTuple):
    """One layer."""

    experts: int
    hidden: int
    inner: int
    top_k: int


SHAPES = {"mixtral": Shape(8, 4096, 14336, 2), "qwen3-30b": Shape(128, 2048, 768, 8)}


class Clock:
    """Seconds by part of the work; the device is waited for at the ends of each part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def on(self, owner: Any, function: str, name: str) -> None:
        """Count every call of `owner.function` as part `name`, for good: the program ends soon."""
        plain = getattr(owner, function)

        def timed(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return plain(*args, **options)

        setattr(owner, function, timed)


def agree(layer: Layer, device: torch.device) -> dict[str, float]:
    """Of one small layer merged on the device and on the CPU: equal weights, and the damages' difference."""
    contexts = [Context(d, torch.Generator()) for d in (torch.device("cpu"), device)]
    routed = forward(layer, Text("random", samples(32, 32).int()), None, None, contexts[0])
    found = {}
    for format in ("exponent", "pair6"):
        merges = [
            stage.compensated(
                layer, routed, layer.experts(), Groups([[0, 5], [3, 1], [2, 7]], [4, 6]), None, c, format=format
            )
            for c in contexts
        ]
        both = [(m.float(), merges[1].magnitude[n].cpu().float()) for n, m in merges[0].magnitude.items()]
        same = [(torch.isclose(a, b, rtol=CLOSE, atol=0)).float().mean() for a, b in both]
        cost = [torch.tensor(m.figures["damage"]["gate_up"] + m.figures["damage"]["down"]).sum() for m in merges]
        found |= {f"{format} same": float(min(same)), f"{format} damage": float((cost[1] / cost[0] - 1).abs())}
    return found


def random_layer(shape: Shape, tokens: int, device: torch.device) -> tuple[Experts, Routed]:
    """Experts on the device, tokens on the host, chosen by a random router with uneven use."""
    experts, hidden, inner, top_k = shape
    gate_up = torch.randn(experts, 2 * inner, hidden, device=device, dtype=torch.bfloat16) * hidden**-0.5
    down = torch.randn(experts, hidden, inner, device=device, dtype=torch.bfloat16) * inner**-0.5
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    x += torch.randn(tokens, 16, device=device, dtype=torch.bfloat16) @ torch.randn(
        16, hidden, device=device, dtype=torch.bfloat16
    )
    router = torch.randn(hidden, experts, device=device, dtype=torch.bfloat16) * hidden**-0.5
    logits = (x @ router).float() + torch.randn(experts, device=device)
    weights, index = logits.softmax(dim=1).topk(top_k)
    inputs = torch.empty(1, tokens, 0)  # only its shape is read
    return Experts(gate_up, down), Routed(inputs, x.cpu(), index.cpu(), weights.to(torch.bfloat16).cpu())


def timed(layer: Layer, shape: Shape, tokens: int, format: str, clock: Clock) -> dict[str, Any]:
    """One layer's seconds by part, and the memory."""
    context = Context(clock.device, torch.Generator())
    experts, routed = random_layer(shape, tokens, clock.device)
    pairs = pair_by_usage(layer, observe(layer, routed, experts, context))
    cuda = clock.device.type == "cuda"
    held = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    clock.seconds.clear()
    with clock.part("all"):
        merged = stage.compensated(layer, routed, experts, pairs, None, context, format=format)
    if not all(bool(part.isfinite().all()) for part in merged.magnitude.values()):
        sys.exit("a merged magnitude is not finite")
    count = merged.figures["tokens"].values()
    return {
        "seconds": dict(clock.seconds),
        "tokens_of_an_expert": [min(count), max(count)],
        "held_before_bytes": held,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "raised": merged.figures["raised"],
    }


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--formats", nargs="*", default=["exponent", "pair6"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "tokens": args.tokens}
    found |= {"torch": torch.__version__, "device": "cpu"}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        layer = Checkpoint.open(str(tiny("qwen3_moe", Path(folder)))).layers()[0]  # its kind of experts is what matters
        found["agreement"] = agree(layer, device)  # compiles the kernels, too
        print(found["agreement"], flush=True)
        close = all(v > 0.9 if "same" in name else v < 0.02 for name, v in found["agreement"].items())
        if not close:
            sys.exit(f"merged on {device} and on the CPU, one layer differs; nothing was timed")
        clock = Clock(device)
        clock.on(pair_merging, "factor", "cholesky")
        clock.on(Calibration, "__init__", "moments")
        clock.on(Calibration, "inputs", "moments")
        clock.on(Calibration, "changed", "moments, changed")
        clock.on(pair_merging, "matched", "neurons")
        clock.on(pair_merging, "pulled", "targets")
        clock.on(Walk, "first", "columns, first")
        clock.on(Walk, "again", "columns, again")
        for name in args.shapes:
            for format in args.formats:
                found[f"{name} {format}"] = timed(layer, SHAPES[name], args.tokens, format, clock)
                print(name, format, json.dumps(found[f"{name} {format}"]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
