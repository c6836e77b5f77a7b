"""What the model writes, before and after: for people, who read text more readily than nats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from moefold import Baseline, Checkpoint, Context, Metrics, Saved, Stage, hookimpl, stage
from moefold.errors import InputError


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
    with _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would break the run's."""
    from transformers.utils import logging  # slow to import, and plugins load with every command

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _written(path: str, prompts: dict[str, Tensor], new: int, context: Context) -> dict[str, Tensor]:
    """The new tokens by text, [prompt, new]; shorter than `new` where the model came to its end before."""
    import transformers  # as above

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", device_map=str(context.device), trust_remote_code=False, local_files_only=True
    )
    settings = transformers.GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=_padding(model),
    )
    found = {}
    for name, ids in prompts.items():
        ids = ids.to(context.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        found[name] = out[:, ids.shape[1] :].cpu()
    return found


def _padding(model: Any) -> int:
    """What stands after the end of a text that ended before the others: nothing reads it."""
    known = (model.generation_config.pad_token_id, model.generation_config.eos_token_id, 0)
    first = next(token for token in known if token is not None)
    return int(first[0] if isinstance(first, list) else first)


def _alike(own: Tensor, other: Tensor) -> int:
    """How many tokens both wrote before they parted."""
    count = min(len(own), len(other))
    differ = (own[:count] != other[:count]).nonzero()
    return int(differ[0]) if len(differ) else count


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [evaluate_samples]
