"""How fast both models write, on the machine at hand."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from statistics import median
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moefold import Baseline, Checkpoint, Context, Metrics, Saved, Stage, hookimpl, stage
from moefold.errors import InputError
from moefold_plugins.whole_model import greedy, quiet, whole_model

Batch = Annotated[int, Field(ge=1)]


@stage("evaluate.speed", repeatable=False)
def evaluate_speed(
    checkpoint: Checkpoint,
    saved: Saved,
    baseline: Baseline,
    context: Context,
    *,
    batches: Annotated[list[Batch], Field(min_length=1, description="how many prompts go together, each timed")] = [1],  # noqa: B006
    length: Annotated[int, Field(ge=1, description="tokens of a prompt: the starts of samples of the first text")] = 64,
    new: Annotated[int, Field(ge=1, description="tokens to write")] = 64,
    rounds: Annotated[int, Field(ge=1, description="how often; the median counts, after one round to warm up")] = 3,
) -> Metrics:
    """New tokens per second of both models in transformers; each is loaded whole, one after the other.

    Prompts are read in that time, too. Times are of this machine at that moment: what else runs on it counts.
    """
    name, samples = next(iter(baseline.texts.items()))
    if samples.shape[1] < length:
        raise InputError(f"the samples of {name} have {samples.shape[1]} tokens, and a prompt wants {length}")
    prompts = [samples[torch.arange(batch) % len(samples), :length].long() for batch in batches]
    with quiet():
        before = _seconds(str(checkpoint.path), prompts, new, rounds, context.device)
        after = _seconds(saved.path, prompts, new, rounds, context.device)
    rows = [
        {
            "prompts at a time": batch,
            "tokens / s before": batch * new / own,
            "after": batch * new / other,
            "times as fast": own / other,
        }
        for batch, own, other in zip(batches, before, after, strict=True)
    ]
    return Metrics(f"speed of generation on {_machine(context.device)}", rows)


def _seconds(path: str, prompts: Sequence[Tensor], new: int, rounds: int, device: torch.device) -> list[float]:
    """The median time of each batch."""
    model = whole_model(path, device)
    settings = greedy(model, new, to_the_end=True)
    return [median(_times(model, ids.to(device), settings, rounds)) for ids in prompts]


def _times(model: Any, ids: Tensor, settings: Any, rounds: int) -> list[float]:
    found = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        int(out[0, -1])  # waits for the device
        found.append(time.perf_counter() - begun)
    return found[1:]


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [evaluate_speed]
