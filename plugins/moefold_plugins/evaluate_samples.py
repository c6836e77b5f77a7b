"""What the model writes, before and after: for people, who read text more readily than nats."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moefold import Baseline, Checkpoint, Context, Metrics, Saved, Stage, hookimpl, stage
from moefold.errors import InputError
from moefold_plugins.whole_model import greedy, quiet, whole_model


@stage("evaluate.samples")
def evaluate_samples(
    checkpoint: Checkpoint,
    saved: Saved,
    baseline: Baseline,
    context: Context,
    *,
    prompts: Annotated[int, Field(ge=1, description="prompts from each evaluation text: the starts of samples")] = 2,
    length: Annotated[int, Field(ge=1, description="tokens of a prompt")] = 48,
    new: Annotated[int, Field(ge=1, description="tokens to write")] = 32,
) -> Metrics:
    """How both models go on from the same prompts, greedily; each is loaded whole, one after the other."""
    ids = {name: baseline.texts[name][:prompts, :length].long() for name in baseline.losses}
    if short := [name for name, prompt in ids.items() if prompt.shape[1] < length]:
        raise InputError(f"the samples of {', '.join(short)} are shorter than a prompt of {length} tokens")
    with quiet():
        before = _written(str(checkpoint.path), ids, new, context)
        after = _written(saved.path, ids, new, context)
    tokenizer = checkpoint.tokenizer()

    def read(tokens: Tensor) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    rows = []
    for name, prompt in ids.items():
        for start, own, other in zip(prompt, before[name], after[name], strict=True):
            rows.append({
                "text": name,
                "prompt": read(start),
                "before": read(own),
                "after": read(other),
                "same_tokens": _alike(own, other),
                "new_tokens": new,
            })  # fmt: skip
    return Metrics("generation samples", rows)


def _written(path: str, prompts: dict[str, Tensor], new: int, context: Context) -> dict[str, Tensor]:
    """The new tokens by text, [prompt, new]; shorter than `new` where the model came to its end before."""
    model = whole_model(path, context.device)
    settings = greedy(model, new)
    found = {}
    for name, ids in prompts.items():
        ids = ids.to(context.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        found[name] = out[:, ids.shape[1] :].cpu()
    return found


def _alike(own: Tensor, other: Tensor) -> int:
    """How many tokens both wrote before they parted."""
    count = min(len(own), len(other))
    differ = (own[:count] != other[:count]).nonzero()
    return int(differ[0]) if len(differ) else count


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [evaluate_samples]
