"""A checkpoint loaded whole in transformers, as those who use it load it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would break the run's."""
    from transformers.utils import logging  # slow to import, and plugins load with every command

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def whole_model(path: str, device: torch.device) -> Any:
    """The model of a directory, on one device, in the dtype of its files, with experts that can run its sizes."""
    import transformers  # as above

    from moefold_kernels.grouped import fit

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", device_map=str(device), trust_remote_code=False, local_files_only=True
    )
    fit(model)
    return model


def greedy(model: Any, new: int, *, to_the_end: bool = False) -> Any:
    """Settings of `generate` for the most likely tokens; `to_the_end`: as many as asked for, also after an end."""
    import transformers

    return transformers.GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new if to_the_end else None,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=_padding(model),
    )


def _padding(model: Any) -> int:
    """What stands after the end of a text that ended before the others: nothing reads it."""
    known = (model.generation_config.pad_token_id, model.generation_config.eos_token_id, 0)
    first = next(token for token in known if token is not None)
    return int(first[0] if isinstance(first, list) else first)
