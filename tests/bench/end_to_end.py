"""Whole models in transformers: decoding steps a second with packed experts and with dense ones, on one GPU.

`python tests/bench/end_to_end.py --out result.json` builds Mixtral-8x7B and Qwen3-30B-A3B with random weights (random
routers, so that routing is balanced), first dense, then with random words in place of the experts. Each decoding step
is one CUDA graph over transformers' own forward and StaticCache. All stock implementations that can be captured are
measured, the fastest of them and ours again with the decoder layer compiled. Before anything is timed, packed logits
are compared with those of the decoded twin on a few layers. `--shapes tiny --device cpu` tries it in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import moefold_kernels.transformers  # noqa: F401  (registers the implementation)
from moefold_kernels import PackedLayer
from moefold_kernels.module import PackedModule, is_experts, pack_module, unpack_module

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "real": {
        "mixtral": {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
        },
        "qwen3_moe": {
            "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
        },
    },
    "tiny": {
        "mixtral": {
            "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 128,
        },
        "qwen3_moe": {
            "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
            "num_experts_per_tok": 3, "norm_topk_prob": True, "vocab_size": 128,
        },
    },
}  # fmt: skip
TITLES = {"mixtral": "Mixtral-8x7B", "qwen3_moe": "Qwen3-30B-A3B"}
TOLERANCE = 0.03
"""Of logits after a few layers in bf16; stock implementations differ among themselves by a fraction of it."""
COMPILED_TOLERANCE = 0.5
"""Of logits after all layers, rounded elsewhere: some tokens then go to other experts. Garbage differs by 1.4."""
SPARE = 8
"""Steps that warming up may take in the cache."""


class Budget:
    """What is left of the time that a call may take."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def build(name: str, shape: dict[str, Any], packed: bool, device: torch.device, layers: int | None = None) -> Any:
    """A model with random weights, made on the device; `packed` with random words in place of its experts."""
    settings = shape | ({"num_hidden_layers": layers} if layers else {})
    settings |= {"max_position_embeddings": 4096, "sliding_window": None, "tie_word_embeddings": False}
    implementation = "moefold" if packed else "grouped_mm"
    config = AutoConfig.for_model(name, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=implementation
        ).eval()
    for where, module in model.named_modules():
        if packed and is_experts(module):
            sizes = module.num_experts, *module.down_proj.shape[1:], model.config.num_hidden_layers
            pack_module(module, random_layer(where, *sizes), where)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # its buffers are in no checkpoint
    generator = torch.Generator(device).manual_seed(0)
    for where, parameter in model.named_parameters():
        fill(where, parameter.data, generator, model.config.num_hidden_layers)
    return model.requires_grad_(False)


def random_layer(prefix: str, experts: int, hidden: int, inner: int, layers: int) -> PackedLayer:
    """Random pairs, and windows such that words of `random_words` deviate as the weights of `fill` do."""
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(len(prefix)), device="cpu").tolist()
    pairs = tuple((order[i], order[i + 1]) for i in range(0, experts, 2))
    deviation = {"gate_proj": hidden**-0.5, "up_proj": hidden**-0.5, "down_proj": (2 * layers * inner) ** -0.5}
    return PackedLayer(prefix, {name: 127 + round(math.log2(d / 0.537)) for name, d in deviation.items()}, pairs)


@torch.no_grad()
def fill(name: str, out: Tensor, generator: torch.Generator, layers: int) -> None:
    """Weights that keep what passes at its size, and each token's own part of it ahead of what layers add."""
    if out.dtype == torch.int16:
        for pair in out:
            random_words(pair, generator)
    elif out.dim() == 1:
        out.fill_(1)
    else:
        last = name.endswith(("o_proj.weight", "down_proj"))
        deviation = 1.0 if "embed_tokens" in name else out.shape[-1] ** -0.5
        out.normal_(0, deviation * (2 * layers) ** -0.5 if last else deviation, generator=generator)


def random_words(out: Tensor, generator: torch.Generator) -> None:
    """Words [rows, columns] of format `exponent`: 48 % shared, 26 % of either slot, magnitudes from eight binades.

    What they decode to deviates by 0.537 * 2 ** (top - 127).
    """
    shape, device = out.shape, out.device
    place = torch.randint(100, shape, generator=generator, device=device, dtype=torch.int8)
    keep = torch.where(place < 48, 3, torch.where(place < 74, 2, 1)).to(torch.int16)
    sign = torch.randint(4, shape, generator=generator, device=device, dtype=torch.int16) & keep
    out.random_(0, 1024, generator=generator)
    out.add_(0x0C00).bitwise_or_(keep << 12).bitwise_or_(sign << 14)


class Decoding:
    """A model, a batch whose prompts are in a static cache, and the step that decodes one token of each."""

    def __init__(self, model: Any, batch: int, prompt: int, steps: int, prefill: str | None = None) -> None:
        self.model, self.batch, self.prompt, self.device = model, batch, prompt, model.device
        generator = torch.Generator(self.device).manual_seed(batch)
        vocabulary = model.config.vocab_size
        draw = lambda *size: torch.randint(vocabulary, size, generator=generator, device=self.device)  # noqa: E731
        self.tokens = draw(steps + SPARE, batch, 1)
        self.token = self.tokens[0].clone()
        self.position = torch.full((1, 1), prompt, device=self.device)
        self.cache = StaticCache(config=model.config, max_cache_len=prompt + steps + SPARE)
        with using(model, prefill):
            prompts = draw(batch, prompt)
            model(input_ids=prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def step(self) -> Tensor:
        """The logits of the next token [batch, vocabulary]; the cache grows by one."""
        out = self.model(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
        ).logits
        self.position.add_(1)
        self.token.copy_(out.argmax(-1))  # a part of decoding; timed steps then get tokens of their own
        return out[:, -1]  # type: ignore[no-any-return]

    def rewind(self) -> None:
        """Forget what was decoded."""
        self.position.fill_(self.prompt)
        self.token.copy_(self.tokens[0])
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)


@contextmanager
def using(model: Any, implementation: str | None) -> Iterator[None]:
    """Run with another experts implementation for a while."""
    before = model.config._experts_implementation
    model.set_experts_implementation(implementation or before)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class _CacheLayer:
    """One layer of a cache, as its decoder layer sees it: what is compiled does not depend on the layer's number."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(keys, values)  # type: ignore[no-any-return]


@contextmanager
def compiled_layers(model: Any, backend: str) -> Iterator[None]:
    """Compile the decoder layer once for all layers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        return type(layer).forward(layer, *args, **kwargs)  # type: ignore[no-any-return]

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=False)

    def forward(layer: Any, *args: Any, past_key_values: Any, **kwargs: Any) -> Any:
        own = _CacheLayer(past_key_values.layers[layer.self_attn.layer_idx])
        return compiled(layer, *args, past_key_values=own, **kwargs)

    for layer in model.model.layers:
        layer.forward = MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in model.model.layers:
            del layer.forward


def captured(decoding: Decoding) -> tuple[Callable[[], None], Tensor]:
    """(what runs a step, where its logits are): a CUDA graph, or the step itself on the CPU."""
    if decoding.device.type != "cuda":
        logits = decoding.step()
        return lambda: logits.copy_(decoding.step()), logits
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            decoding.step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    decoding.rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decoding.step()
    return graph.replay, logits


def timed(decoding: Decoding, run: Callable[[], None], steps: int, rounds: int, most: float) -> float:
    """The median seconds of a step over `rounds` of up to `steps` steps each, in `most` seconds or so."""
    once = seconds_of(decoding, run, 2) / 2
    steps = max(2, min(steps, int(most / rounds / once)))
    return statistics.median(seconds_of(decoding, run, steps) / steps for _ in range(rounds))


def seconds_of(decoding: Decoding, run: Callable[[], None], steps: int) -> float:
    """How long so many steps take, each with tokens of its own, on the host's clock."""
    decoding.rewind()
    synchronize(decoding.device)
    start = time.perf_counter()
    for number in range(steps):
        decoding.token.copy_(decoding.tokens[number])
        run()
    synchronize(decoding.device)
    return time.perf_counter() - start


def measure(model: Any, batch: int, implementation: str, o: Any, compiled: bool) -> dict[str, Any]:
    """One row: how fast a model decodes, or why it does not."""
    row: dict[str, Any] = {"batch": batch, "implementation": implementation, "compiled": compiled}
    started = time.monotonic()
    try:
        decoding = Decoding(model, batch, o.prompt, o.steps, "grouped_mm" if implementation == "batched_mm" else None)
        with using(model, implementation):
            decoding.rewind()
            expected = decoding.step().float().clone()
            decoding.rewind()
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with compiled_layers(model, o.backend) if compiled else nullcontext():
                run, logits = captured(decoding)
                decoding.rewind()
                run()
                row["off"] = relative(logits, expected)  # of the captured step, from the same step run eagerly
                row["seconds"] = timed(decoding, run, o.steps, o.rounds, o.most)
        row["tokens_per_second"] = batch / row["seconds"]
        row["peak_gib"] = peak(model.device)
    except Exception as error:  # another implementation may still run; the row says why this one did not
        row["failed"] = f"{type(error).__name__}: {error}"[:400]
    if compiled:
        row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # one, unless layers differ
    row["took"] = round(time.monotonic() - started, 1)
    decoding = run = logits = None  # type: ignore[assignment]
    release()
    say(row)
    return row


def hits(model: Any, batch: int, o: Any) -> dict[str, float]:
    """How many experts a decoding step hits in a layer: the mean and the least, and what even routing gives."""
    decoding, found, hooks = Decoding(model, batch, o.prompt, o.steps), [], []
    experts = [module for module in model.modules() if is_experts(module)]
    for module in experts:
        hooks.append(module.register_forward_pre_hook(lambda _, args: found.append(args[1].unique().numel())))
    decoding.rewind()
    decoding.step()
    for hook in hooks:
        hook.remove()
    count, top_k = experts[0].num_experts, model.config.num_experts_per_tok
    even = count * (1 - (1 - top_k / count) ** batch)
    return {"mean": statistics.mean(found), "least": min(found), "even": even}


def check(name: str, shape: dict[str, Any], o: Any) -> dict[str, float]:
    """Relative differences of a decoding step's logits on a few layers: packed from dense, and dense from dense."""
    model = build(name, shape, True, o.device, layers=o.check_layers)
    twin = copy.deepcopy(model)
    for module in [module for module in twin.modules() if isinstance(module, PackedModule)]:
        unpack_module(module)
    logits = {}
    for who, which, implementation in (
        ("packed", model, "moefold"), ("twin", twin, "grouped_mm"), ("eager", twin, "eager"),
    ):  # fmt: skip
        with using(which, implementation):
            decoding = Decoding(which, 16, o.prompt, o.steps)
            decoding.rewind()
            logits[who] = decoding.step().float()
    found = {who: relative(logits[who], logits["twin"]) for who in ("packed", "eager")}
    if not found["packed"] < TOLERANCE:
        raise SystemExit(f"{name}: packed logits are off by {found['packed']:.1e}, more than {TOLERANCE}: {found}")
    del model, twin, decoding
    release()
    return found


def compare(name: str, shape: dict[str, Any], o: Any, budget: Budget) -> dict[str, Any]:
    """Everything about one model; compiled rows only while there is time."""
    entry: dict[str, Any] = {"shape": shape, "check": check(name, shape, o)}
    say({"model": name, "check": entry["check"]})
    half = budget.left / 2
    for packed in (False, True):
        started = time.monotonic()
        model = build(name, shape, packed, o.device, o.layers)
        synchronize(o.device)
        kind = "packed" if packed else "dense"
        entry[kind] = {"weights_gib": allocated(o.device), "hits": {b: hits(model, b, o) for b in o.batches}}
        say({"model": name, "kind": kind, "built": round(time.monotonic() - started, 1), **entry[kind]})
        rows = [
            measure(model, batch, implementation, o, compiled=False)
            for batch in o.batches
            for implementation in implementations(model, batch, packed)
        ]
        for batch in reversed(o.batches) if o.backend else ():  # the largest first, should time run out
            best = fastest(rows, batch, compiled=False)
            if best is None or budget.left < o.reserve or (not packed and budget.left < half):
                say({"model": name, "skipped": [kind, batch, "compiled"], "left": budget.left})
                entry.setdefault("skipped", []).append([kind, batch, "compiled"])
            else:
                rows.append(measure(model, batch, best["implementation"], o, compiled=True))
        entry[kind]["rows"] = rows
        del model
        release()
    return entry


def implementations(model: Any, batch: int, packed: bool) -> list[str]:
    """What can be captured: eager asks the device which experts to run; batched_mm copies each entry's weights."""
    if packed:
        return ["moefold"]
    experts = next(module for module in model.modules() if is_experts(module))
    few = batch * model.config.num_experts_per_tok <= 2 * experts.num_experts
    return ["grouped_mm", "batched_mm"] if few else ["grouped_mm"]


def table(models: dict[str, Any], batches: list[int]) -> list[str]:
    """The best of each kind, side by side: both compiled, or neither."""
    lines = [f"{'model':14} {'batch':>5} {'dense tok/s':>12} {'(best)':>22} {'packed tok/s':>13} {'ratio':>6}  GiB"]
    for name, entry in models.items():
        for batch in batches:
            for compiled in (False, True):
                dense, packed = (fastest(entry[kind]["rows"], batch, compiled) for kind in ("dense", "packed"))
                if dense is None or packed is None:
                    how = "compiled" if compiled else "not compiled"
                    lines.append(f"{TITLES[name]:14} {batch:>5} {how}: a row is missing, failed, or is off")
                    continue
                ratio = packed["tokens_per_second"] / dense["tokens_per_second"]
                how = dense["implementation"] + (", compiled" if compiled else "")
                memory = f"{dense['peak_gib']:.1f} -> {packed['peak_gib']:.1f}"
                speeds = f"{dense['tokens_per_second']:>12.1f} {how:>22} {packed['tokens_per_second']:>13.1f}"
                lines.append(f"{TITLES[name]:14} {batch:>5} {speeds} {ratio:>6.2f}  {memory}")
    return lines


def fastest(rows: list[dict[str, Any]], batch: int, compiled: bool) -> dict[str, Any] | None:
    """The row with the most tokens a second; those whose captured step gave something else do not count."""
    able = [row for row in rows if (row["batch"], row["compiled"]) == (batch, compiled) and "failed" not in row]
    right = [row for row in able if row["off"] < (COMPILED_TOLERANCE if compiled else TOLERANCE)]
    return max(right, key=lambda row: row["tokens_per_second"], default=None)


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what was expected, of the median token: a few go to other experts."""
    return ((found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def allocated(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else math.nan


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else math.nan


def release() -> None:
    """Give memory back before the next one needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, default=str), flush=True)


def about(device: torch.device) -> dict[str, Any]:
    """When and where this was measured."""
    libraries = ("torch", "transformers", "triton")
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: version(name) for name in libraries},
    }


def options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen3_moe"], choices=list(TITLES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded in one timed round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=float, default=3.0, help="seconds that timing one row may take")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--check-layers", type=int, default=2)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; an empty one compiles nothing")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for all")
    parser.add_argument("--reserve", type=float, default=40.0, help="start to compile only with so many seconds left")
    parser.add_argument("--shapes", default="real", choices=list(SHAPES))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    return parser.parse_args()


@torch.inference_mode(False)
@torch.no_grad()
def main() -> None:
    """Check, measure, write, print."""
    o = options()
    budget, models = Budget(o.budget), {}
    result: dict[str, Any] = about(o.device) | {"prompt": o.prompt, "steps": o.steps, "models": models}
    for number, name in enumerate(o.models):
        share = Budget(budget.left / (len(o.models) - number))
        models[name] = compare(name, SHAPES[o.shapes][name], o, share)
        o.out.write_text(json.dumps(result, indent=1, default=str) + "\n")  # what is done, should the next one fail
    print("\n".join(table(models, o.batches)))


if __name__ == "__main__":
    main()
