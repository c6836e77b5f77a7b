"""Which experts transformers' default implementation, `grouped_mm`, can run: those whose rows are whole 16 bytes.

torch's grouped product refuses other strides ("strides should be multiple of 16 bytes"), on every device, and
transformers takes it whatever the sizes are. The plain loop over experts, `eager`, runs any.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from moefold_kernels.module import PackedModule, is_experts

BYTES = 16
"""What the rows of tokens, of hidden activations and of weights have to be a multiple of."""

_log = logging.getLogger(__name__)


def refusal(module: Any, dtype: torch.dtype | None = None) -> str:
    """Why `grouped_mm` cannot run an experts module in a dtype (None: its own); empty where it can."""
    packed = isinstance(module, PackedModule)  # its weights would be decoded only to be looked at
    sizes = (module.hidden, module.inner) if packed else tuple(module.down_proj.shape[1:])
    kind = dtype or (module.dtype_like if packed else module.down_proj).dtype
    least = BYTES // kind.itemsize
    if not any(size % least for size in sizes):
        return ""
    return (
        f"torch's grouped_mm wants multiples of {least} in {str(kind).removeprefix('torch.')}, and these experts are "
        f"{' by '.join(map(str, sorted(sizes)))}"
    )


def runnable(module: Any, name: str, dtype: torch.dtype | None = None) -> str:
    """The stock implementation to run a module where transformers would take `name`."""
    return "eager" if name == "grouped_mm" and refusal(module, dtype) else name


def fit(model: nn.Module) -> None:
    """Have `eager` run those of a model's experts that `grouped_mm` cannot."""
    for module in filter(is_experts, model.modules()):
        config: Any = module.config
        if runnable(module, config._experts_implementation) != config._experts_implementation:
            config._experts_implementation = "eager"


def say(model: nn.Module) -> None:
    """Log, once a process, why a model's experts run slower than most."""
    why = next(filter(None, map(refusal, filter(is_experts, model.modules()))), "")
    if why:
        _say_once(
            f"{type(model).__name__}: experts run one by one (eager), because {why}; "
            'transformers\' from_pretrained needs experts_implementation="eager", too'
        )


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)
