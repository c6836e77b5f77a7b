"""How long compensated merging of one layer takes on a GPU, and in how much memory.

`python tests/bench/compensated.py --json FILE` takes Mixtral's shapes (8 experts, 4096 to 14336, top-2) and
Qwen3-30B-A3B's (128, 2048 to 768, top-8), each with 128 x 2048 calibration tokens: random experts, random tokens under
a random router with uneven use, tokens from the host as in a run. The layer's pairs are chosen by `pair.by_error` and
merged by `puzzlemoe.compensated`, once for each format, without and with `together`; of all, seconds by part of the
work ("other" is the rest) and the memory. Each merge is then packed: as it lies on the GPU, and from the host, where
the store of a run that goes on in another process has it. `--shapes deepseek-v3` is a layer of DeepSeek-V3's shapes
(256 experts, 7168 to 2048, top-8), which needs a GPU of 141 GB. Reading the model and the calibration forward are not
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import samples, tiny
from moefold import Checkpoint, Context, Experts, Groups, Layer, MergedPairs, Routed, Text
from moefold_plugins import compensated as stage
from moefold_plugins import pair_errors, pair_merging, pairing
from moefold_plugins.calibrate import forward
from moefold_plugins.compensation import Walk
from moefold_plugins.damage import CODECS
from moefold_plugins.lost import Lost
from moefold_plugins.moments import Calibration
from moefold_plugins.pair_merging import Merge

T = TypeVar("T")

CLOSE = 2**-6
"""Two steps of bf16: sums in another order move what is rounded by a little, and about a fifth of all by one step."""

WARM = 4096
"""Tokens of a first run of each shape, whose times are not kept."""


class Shape(NamedTuple):
    """One layer."""

    experts: int
    hidden: int
    inner: int
    top_k: int


SHAPES = {
    "mixtral": Shape(8, 4096, 14336, 2),
    "qwen3-30b": Shape(128, 2048, 768, 8),
    "deepseek-v3": Shape(256, 7168, 2048, 8),
}


class Clock:
    """Seconds by part of the work; the device is waited for at the ends of each part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def measured(self, work: Callable[[], T]) -> tuple[T, dict[str, Any]]:
        """What `work` gives, its seconds by part, and the device's memory before it and at its peak."""
        held = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        self.seconds.clear()
        self._wait()
        start = time.perf_counter()
        done = work()
        self._wait()
        whole = time.perf_counter() - start
        seconds = {**self.seconds, "other": whole - sum(self.seconds.values()), "all": whole}
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return done, {"seconds": seconds, "held_before_bytes": held, "peak_device_bytes": peak}

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
        """Count every call of `owner.function` as part `name`, for good: the program ends soon.

        No part may be called by another: it would count twice.
        """
        plain = getattr(owner, function)

        def timed(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return plain(*args, **options)

        setattr(owner, function, timed)

    def parts(self) -> None:
        """Name the parts of the work."""
        self.on(Calibration, "__init__", "moments")
        self.on(Calibration, "inputs", "moments")
        self.on(Calibration, "changed", "moments, changed")
        self.on(Merge, "__init__", "formats")
        self.on(Merge, "done", "gathering")
        self.on(pair_merging, "row_weights", "targets")
        self.on(pair_merging, "pulled", "targets")
        self.on(pair_merging, "left", "targets")
        self.on(pair_merging, "matched", "neurons")
        self.on(Lost, "add", "others' losses")
        self.on(Lost, "pull", "others' losses")
        self.on(pair_merging, "factor", "cholesky")
        self.on(Walk, "first", "columns, first")
        self.on(Walk, "again", "columns, again")
        self.on(pair_errors, "gathered", "neurons")
        self.on(pair_errors, "total", "errors of pairs")
        self.on(pairing, "perfect", "matching")


def agree(layer: Layer, device: torch.device) -> dict[str, float]:
    """Of one small layer merged on the device and on the CPU: equal weights, and the damages' difference.

    Weights are those of gate and up, of neurons in their own order: matched, two that count nearly the same may change
    places, which costs nothing; and down makes up for every little difference of gate and up (with activations and
    moments off by a step of bf16 here and there 71 to 94 % of it was equal, and its damage within 0.2 %). The figures
    are of down coded once.
    """
    contexts = [Context(d, torch.Generator()) for d in (torch.device("cpu"), device)]
    routed = forward(layer, Text("random", samples(32, 32).int()), None, None, contexts[0])
    groups, found = Groups([[0, 5], [3, 1], [2, 7]], [4, 6]), {}
    for format in ("exponent", "pair6"):
        for neurons in ("natural", "matched"):
            cpu, other = (
                stage.compensated(
                    layer, routed, layer.experts(), groups, None, c, format=format, neurons=neurons, together=False
                )
                for c in contexts
            )
            found |= {f"{format} {neurons} {part}": off for part, off in _costs(cpu, other).items()}
            if neurons == "natural":
                both = [(m.magnitude[n].cpu().float() for m in (cpu, other)) for n in ("gate_proj", "up_proj")]
                same = [(torch.isclose(a, b, rtol=CLOSE, atol=0)).float().mean() for a, b in both]
                found[f"{format} same"] = float(min(same))
    return found


def _costs(one: MergedPairs, other: MergedPairs) -> dict[str, float]:
    """How far the damages of another merge of the same pairs are off."""
    sums = [{part: torch.tensor(costs).sum() for part, costs in m.figures["damage"].items()} for m in (one, other)]
    return {part: float((sums[1][part] / cost - 1).abs()) for part, cost in sums[0].items()}


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


def timed(
    layer: Layer, shape: Shape, tokens: int, formats: list[str], together: list[bool], clock: Clock
) -> Iterator[tuple[str, Any]]:
    """What one layer took: its pairs', and then its merge in each format."""
    context = Context(clock.device, torch.Generator())
    experts, routed = random_layer(shape, tokens, clock.device)
    pairs, took = clock.measured(lambda: pairing.pair_by_error(layer, routed, experts, context))
    yield "pairs", took
    for format, once_more in product(formats, together):
        merge = partial(
            stage.compensated, layer, routed, experts, pairs, None, context, format=format, together=once_more
        )
        merged, took = clock.measured(merge)
        if not all(bool(part.isfinite().all()) for part in merged.magnitude.values()):
            sys.exit("a merged magnitude is not finite")
        count, figures = merged.figures["tokens"].values(), merged.figures
        took["packing"] = packing(merged, clock)
        del merged  # what lies on the device when the next format begins is the layer alone
        took |= {"tokens_of_an_expert": [min(count), max(count)], "raised": figures["raised"]}
        took |= {"pairs": len(pairs.members), "pairs_in_another_order": sum(figures["matched"])}
        yield f"{format} together" if once_more else format, took


def packing(merged: MergedPairs, clock: Clock) -> dict[str, Any]:
    """Packing a layer's merged pairs from the device and from the host, which must give the same words."""
    codec = CODECS[merged.format]()
    stored = merged.to(torch.device("cpu"))
    packed, here = clock.measured(lambda: codec.packed(merged))
    again, from_host = clock.measured(lambda: codec.packed(stored.to(clock.device)))
    if not all(torch.equal(words, again.words[name]) for name, words in packed.words.items()):
        sys.exit(f"{merged.format}: packed from the host, the words differ")
    return {"from_device": here, "from_host": from_host}


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="*", default=["mixtral", "qwen3-30b"], choices=list(SHAPES))
    parser.add_argument("--cold", action="store_true", help="without a first run, so times are with compilation")
    parser.add_argument("--formats", nargs="*", default=["exponent", "pair6"])
    parser.add_argument(
        "--together", nargs="*", type=int, default=[0, 1], choices=[0, 1], help="without, with, or both"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "tokens": args.tokens}
    found |= {"cold": args.cold, "torch": torch.__version__, "device": "cpu"}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        layer = Checkpoint.open(str(tiny("qwen3_moe", Path(folder)))).layers()[0]  # its kind of experts is what matters
        found["agreement"] = agree(layer, device)
        print(found["agreement"], flush=True)
        close = all(v > 0.9 if "same" in name else v < 0.02 for name, v in found["agreement"].items())
        if not close:
            sys.exit(f"merged on {device} and on the CPU, one layer differs; nothing was timed")
        clock = Clock(device)
        clock.parts()
        together = [bool(value) for value in args.together]
        for name in args.shapes:
            if not args.cold:
                for _ in timed(layer, SHAPES[name], min(WARM, args.tokens), args.formats, together, clock):
                    pass  # compiles the kernels for these shapes
            for part, took in timed(layer, SHAPES[name], args.tokens, args.formats, together, clock):
                found[f"{name} {part}"] = took
                print(name, part, json.dumps(took), flush=True)
                if args.json:  # what there is, should the rest not fit the time
                    args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
