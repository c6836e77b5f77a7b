"""How well a model predicts text, before and after."""

from __future__ import annotations

import logging
import math
from statistics import fmean
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moefold import Baseline, Checkpoint, Context, Metrics, Saved, Stage, StreamedModel, Text, hookimpl, stage
from moefold.errors import InputError, TextError, suggest
from moefold_plugins.finite import finite

LOG = logging.getLogger("moefold.progress")  # "layer N of M" moves the bar of a stage that runs once

Gate = Annotated[
    dict[str, Annotated[float, Field(allow_inf_nan=False)]],
    Field(description="text -> largest increase of the loss (nats per token) with which the run passes"),
]
Batch = Annotated[int, Field(ge=1, description="samples in one forward pass")]


def losses(checkpoint: Checkpoint, texts: dict[str, Tensor], device: torch.device, batch: int) -> dict[str, float]:
    """Mean negative log-likelihood of each text in nats per token: the mean of `sample_losses`."""
    return {name: fmean(values) for name, values in sample_losses(checkpoint, texts, device, batch).items()}


def sample_losses(
    checkpoint: Checkpoint, texts: dict[str, Tensor], device: torch.device, batch: int
) -> dict[str, list[float]]:
    """Mean negative log-likelihood of each sample in nats per token, one decoder layer in memory at a time.

    `texts` are `[sample, length]` token ids; the first token of a sample predicts and is not predicted.
    """
    streamed = StreamedModel(checkpoint, device)
    parts = [(name, ids.long()) for name, tokens in texts.items() for ids in tokens.split(batch)]
    hidden = [streamed.embed(ids.to(device)).cpu() for _, ids in parts]
    for number in range(streamed.layer_count):
        LOG.info("layer %d of %d", number, streamed.layer_count)
        with streamed.loaded(number):
            given = (
                streamed.through(number, ids.to(device), h.to(device))
                for (_, ids), h in zip(parts, hidden, strict=True)
            )
            hidden = [finite(one, f"what decoder layer {number} gives is").cpu() for one in given]
    found: dict[str, list[float]] = {name: [] for name in texts}
    for (name, ids), h in zip(parts, hidden, strict=True):
        for row, state in zip(ids, h, strict=True):  # a sample at a time: logits are [length, vocabulary] in float32
            logits = streamed.head(state[None].to(device))[0, :-1].float()
            target = row[1:].to(device)
            found[name].append(float(F.cross_entropy(logits, target, reduction="sum").double()) / len(target))
    return found


@stage("evaluate.baseline", version=2)
def evaluate_baseline(
    checkpoint: Checkpoint, texts: tuple[Text, ...], context: Context, *, batch: Batch = 8
) -> Baseline:
    """The uncompressed model's loss on each text; kept, so that every method compared with it costs only its own."""
    tokens = {text.name: text.tokens for text in texts}
    if len(tokens) != len(texts):
        raise TextError(f"two texts have one name ({', '.join(t.name for t in texts)}); evaluate each once")
    samples = sample_losses(checkpoint, tokens, context.device, batch)
    means = {name: _mean(values, f"the model's loss on {name} is") for name, values in samples.items()}
    return Baseline(means, tokens, {t.name: t.bytes for t in texts}, samples)


@stage("evaluate.perplexity", version=2)
def evaluate_perplexity(
    saved: Saved,
    baseline: Baseline,
    context: Context,
    *,
    batch: Batch = 8,
    gate: Gate = {},  # noqa: B006
) -> Metrics:
    """The saved checkpoint's loss and perplexity on each text, read back from disk, beside the uncompressed model's."""
    for name in gate:
        if name not in baseline.losses:
            raise InputError(f"gate: no text is called {name}{suggest(name, baseline.losses)}")
    after = sample_losses(Checkpoint.open(saved.path), baseline.texts, context.device, batch)
    rows = [_row(name, baseline, after[name]) | _judged(name, baseline, after[name], gate) for name in baseline.losses]
    return Metrics("loss and perplexity", rows)


def _row(name: str, baseline: Baseline, samples: list[float]) -> dict[str, Any]:
    before, after = baseline.losses[name], _mean(samples, f"the saved checkpoint's loss on {name} is")
    return {
        "text": name,
        "tokens": baseline.texts[name].numel(),
        "loss_before": before,
        "loss_after": after,
        "loss_increase": after - before,
        "perplexity_before": perplexity(before),
        "perplexity_after": perplexity(after),
        "bits_per_byte_before": baseline.bits_per_byte(name, before),
        "bits_per_byte_after": baseline.bits_per_byte(name, after),
        "samples_before": [round(value, 7) for value in baseline.samples.get(name, ())],
        "samples_after": [round(value, 7) for value in samples],
    }


def _mean(losses: list[float], what: str) -> float:
    """The mean; raises StageError where it is NaN or infinite: such a model predicts nothing."""
    return float(finite(torch.tensor(fmean(losses), dtype=torch.float64), what))


def perplexity(loss: float) -> float:
    """exp(loss), and infinity where a float cannot hold that."""
    return math.exp(loss) if loss < 700 else math.inf


def _judged(name: str, baseline: Baseline, samples: list[float], gate: dict[str, float]) -> dict[str, Any]:
    if name not in gate:
        return {}
    return {"gate": gate[name], "passed": fmean(samples) - baseline.losses[name] <= gate[name]}


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [evaluate_baseline, evaluate_perplexity]
