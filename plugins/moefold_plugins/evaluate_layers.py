"""Where in the model the loss comes from: the original and the saved checkpoint side by side, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moefold import Baseline, Checkpoint, Context, Experts, Metrics, Saved, Stage, StreamedModel, hookimpl, stage
from moefold.errors import InputError, suggest

LOG = logging.getLogger("moefold.progress")  # "layer N of M" moves the bar of a stage that runs once


@dataclass
class Part:
    """Samples that go through both models together, and what enters the next decoder layer of each."""

    ids: Tensor  # [sample, length]
    own: Tensor  # [sample, length, hidden] of the original
    theirs: Tensor  # the same of the compressed model


@stage("evaluate.layers", version=2)
def evaluate_layers(
    checkpoint: Checkpoint,
    saved: Saved,
    baseline: Baseline,
    context: Context,
    *,
    text: Annotated[str | None, Field(description="name of an evaluation text (default: the first)")] = None,
    samples: Annotated[int, Field(ge=1, description="samples of it that go through both models")] = 4,
    batch: Annotated[int, Field(ge=1, description="samples in one forward pass")] = 4,
) -> Metrics:
    """How far each decoder layer of the saved checkpoint, read back from disk, is from the original's.

    Errors are relative, of a token's vector in length, and means over tokens (a few tokens of very large activations
    would decide a quotient of sums): `output_error` of a layer on what enters the original's, `update_error` the same
    in units of what the original's layer adds to its input, `cumulative_error` after all layers up to this one.
    `inverse_length`: the mean of 1 / the length of what the original's layer gives, by which an absolute error becomes
    such a relative one. `routing_overlap`: the share of the original's top-k choices that the compressed model, on its
    own inputs, makes too. `kept`: of packed layers, the share of each expert's weights that are not zero.
    """
    name = next(iter(baseline.losses)) if text is None else text
    if name not in baseline.texts:
        raise InputError(f"no text is called {name}{suggest(name, baseline.texts)}")
    before = StreamedModel(checkpoint, context.device)
    after = StreamedModel(Checkpoint.open(saved.path), context.device)
    parts = [
        Part(ids, before.embed(ids.to(context.device)).cpu(), after.embed(ids.to(context.device)).cpu())
        for ids in baseline.texts[name][:samples].long().split(batch)
    ]
    before.forget()
    after.forget()
    return Metrics(f"layer by layer, on {name}", list(_rows(before, after, parts)))


def _rows(before: StreamedModel, after: StreamedModel, parts: list[Part]) -> Iterator[dict[str, Any]]:
    for number in range(before.layer_count):
        LOG.info("layer %d of %d", number, before.layer_count)
        routed = number in before.expert_layers and number in after.expert_layers
        with before.loaded(number):  # one model's layer in memory at a time
            wanted = [_through(before, number, part.ids, part.own) for part in parts]
            chosen = [_choices(before, number, part.ids, part.own) for part in parts] if routed else []
        with _loaded(after, number) as kept:
            alone = [_through(after, number, part.ids, part.own) for part in parts]
            walked = [_through(after, number, part.ids, part.theirs) for part in parts]
            theirs = [_choices(after, number, part.ids, part.theirs) for part in parts] if routed else []
        added = [w.float() - p.own.float() for w, p in zip(wanted, parts, strict=True)]
        yield {
            "layer": number,
            "output_error": _error(alone, wanted, wanted),
            "update_error": _error(alone, wanted, added),
            "cumulative_error": _error(walked, wanted, wanted),
            "inverse_length": _inverse_length(wanted),
            "routing_overlap": _overlap(before.checkpoint, after.checkpoint, number, chosen, theirs),
            "kept": kept,
        }
        for part, own, other in zip(parts, wanted, walked, strict=True):
            part.own, part.theirs = own, other


@contextmanager
def _loaded(model: StreamedModel, number: int) -> Iterator[list[float] | None]:
    """A layer of the compressed model; gives the share of weights that packing kept of each expert, if it is packed."""
    packed = number in model.checkpoint.packed_layers
    experts = model.checkpoint.layer(number).experts(model.device) if packed else None
    with model.loaded(number, experts):  # not decoded twice
        yield None if experts is None else _kept(experts)


def _kept(experts: Experts) -> list[float]:
    """Of each expert, the share of its weights that are not zero."""
    matrices = list(experts.matrices().values())
    total = sum(matrix[0].numel() for matrix in matrices)
    counts = (sum(int(matrix[expert].count_nonzero()) for matrix in matrices) for expert in range(experts.count))
    return [round(count / total, 5) for count in counts]


def _through(model: StreamedModel, number: int, ids: Tensor, hidden: Tensor) -> Tensor:
    return model.through(number, ids.to(model.device), hidden.to(model.device)).cpu()


def _choices(model: StreamedModel, number: int, ids: Tensor, hidden: Tensor) -> Tensor:
    """The router's own choices, [token, top_k]."""
    return model.entering(number, ids.to(model.device), hidden.to(model.device))[1].cpu()


def _error(found: list[Tensor], wanted: list[Tensor], unit: list[Tensor]) -> float:
    """Mean over tokens of |found - wanted| / |unit|."""
    errors = [
        ((f.float() - w.float()).norm(dim=-1) / u.float().norm(dim=-1).clamp(min=1e-20)).flatten()
        for f, w, u in zip(found, wanted, unit, strict=True)
    ]
    return float(torch.cat(errors).double().mean())


def _inverse_length(wanted: list[Tensor]) -> float:
    lengths = torch.cat([part.float().norm(dim=-1).flatten() for part in wanted])
    return float(lengths.clamp(min=1e-20).reciprocal().double().mean())


def _overlap(
    before: Checkpoint, after: Checkpoint, number: int, chosen: list[Tensor], theirs: list[Tensor]
) -> float | None:
    """The share of the original's choices that are also the compressed model's; None where outputs have no match."""
    names = _outputs(before, after, number) if chosen else None
    if names is None:
        return None
    own, other = torch.cat(chosen), names[torch.cat(theirs)]
    return float((own[:, :, None] == other[:, None]).any(dim=2).double().mean())


def _outputs(before: Checkpoint, after: Checkpoint, number: int) -> Tensor | None:
    """The original's router output that each of the compressed model's is: pruning copies the rows that stay."""
    counts = before.layer(number).router_outputs, after.layer(number).router_outputs
    if counts[0] == counts[1]:
        return torch.arange(counts[0])
    own, other = (c.skeleton.router(number, "cpu")[0] for c in (before, after))
    same = (other[:, None] == own[None]).all(dim=2)  # [after, before]
    if not bool((same.sum(dim=1) == 1).all()):
        return None
    return same.long().argmax(dim=1)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [evaluate_layers]
