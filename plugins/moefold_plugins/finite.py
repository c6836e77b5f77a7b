"""NaN and infinities are said where they come up, instead of going into merges, choices and losses."""

from __future__ import annotations

import math

from torch import Tensor

from moefold.errors import StageError

REMEDY = "check the checkpoint for NaN or infinite weights; in float16, whether that holds what the model computes"


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; by the extremes, which takes no memory."""
    return not tensor.numel() or all(math.isfinite(float(end)) for end in tensor.detach().aminmax())


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself; raises StageError, which says `what` it is, where an entry is NaN or infinite."""
    if not is_finite(tensor):
        raise StageError(f"{what} not finite; {REMEDY}")
    return tensor
