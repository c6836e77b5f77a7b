"""The sizes of a model's routed experts, from its config.json alone: of a model of the hub no weights are fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moefold import fused
from moefold.checkpoint import Checkpoint
from moefold.errors import CheckpointError
from moefold.hooks import Registry
from moefold.models import check

TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
"""What configurations of transformers call it."""


@dataclass(frozen=True)
class Sizes:
    """One kind of layer; `top_k` is None when config.json does not say it in words that are known."""

    experts: int
    hidden: int
    inner: int
    top_k: int | None


def sizes(name: str, registry: Registry) -> list[Sizes]:
    """Every different kind of layer with routed experts, of a model that ships, a directory, or a model of the hub."""
    from moefold.meta import on_meta  # transformers is slow to import

    path = Path(str(registry.models.get(name, name))).expanduser().absolute()
    if not path.exists():
        check(name, registry)
        path = _config_of_hub(name)
    checkpoint = Checkpoint(path)
    _ = checkpoint.config  # says what is wrong with it
    model: Any = on_meta(checkpoint, torch.bfloat16)
    config = model.config.get_text_config()
    top_k = next((int(getattr(config, key)) for key in TOP_K if getattr(config, key, None)), None)
    found = [_one(module, top_k) for module in model.modules() if fused.is_fused(module)]
    if not found:
        raise CheckpointError(f"{name} has no layer with routed experts in transformers' fused interface")
    return list(dict.fromkeys(found))


def _one(module: Any, top_k: int | None) -> Sizes:
    down = getattr(module, fused.parameters(module)[1])
    experts, hidden, inner = down.shape
    if module.is_transposed:  # [expert, inner, hidden]
        hidden, inner = inner, hidden
    return Sizes(experts, hidden, inner, top_k)


def _config_of_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: neither a local directory nor a model whose config.json the hub gives ({first}); "
            "check the spelling, log in if it is gated, give a directory, or its sizes (--hidden, ...)"
        ) from error
