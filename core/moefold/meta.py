"""The model that config.json describes, on `meta`: every shape, no weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init

from moefold.checkpoint import Checkpoint
from moefold.errors import CheckpointError
from moefold_kernels.grouped import fit

SUPPORTED = (
    "moefold reads the ForCausalLM models of transformers whose experts have its fused interface "
    "(Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek-V2/V3, GLM-4-MoE, GPT-OSS and others)"
)


def on_meta(checkpoint: Checkpoint, dtype: torch.dtype, changes: Mapping[str, int] | None = None) -> PreTrainedModel:
    """The causal language model that config.json describes, without weights; code from the checkpoint is never run.

    `changes` are keys of its text part that take other values.
    """
    make: Any = AutoModelForCausalLM.from_config
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
        vars(config).pop("quantization_config", None)  # moefold's own: experts are decoded here
        for key, value in (changes or {}).items():
            setattr(config.get_text_config(), key, value)
        with torch.device("meta"), init.no_init_weights(), init.meta_device_safe_creation_ops():
            model: PreTrainedModel = make(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, OSError, ImportError, LookupError, AttributeError, TypeError) as error:
        kind = checkpoint.config.get("model_type", "no model_type")
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{checkpoint.path / 'config.json'}: {kind}: no model can be made of it ({first}); {SUPPORTED}"
        raise CheckpointError(message) from error
    model.train(False)
    fit(model)
    return model


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """What `dtype="auto"` means in transformers: config.json's, or that of the first floating tensor."""
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if isinstance(name, str):
        found = getattr(torch, name.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(f"{checkpoint.path / 'config.json'}: dtype {name!r} is none that torch has")
        return found
    dtypes = (checkpoint.header(key)[1] for key in checkpoint.weight_map)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of a model by its full name; tied ones under each name."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
