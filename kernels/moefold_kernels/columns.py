"""A strip of columns of two experts into one magnitude an element, each column's error pushed on: who can, and how.

For the merge that makes up for errors column by column. For column k of a strip, in turn, and each row:

    w_s = target_s[k] + sum_{j<k} (whole_s - read_s)[j] follow_s[j, k]    for both slots s; w_s takes target's place

    shared         m = share_0 |w_0| + share_1 |w_1|    read_0 = m, read_1 = m
    only slot 0    m = |w_0|                            read_0 = m, read_1 = 0
    only slot 1    m = |w_1|                            read_0 = 0, read_1 = m

with m rounded to what the format has; the first of those whose `sum_s c_s (|w_s| - read_s)^2` is least, with the signs
of w. An error costs c_s = cost_s[k] weight_s[row], and share_s = c_s / (c_0 + c_1). Who has no GPU does the same in
torch, column by column (tests hold the kernel to it).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STRIP = 32
"""At most so many columns at once: a program keeps what each got wrong in registers."""


class Rounding(NamedTuple):
    """The magnitudes that a format has: bf16 numbers in a window, or levels times scales."""

    smallest: float = 0.0
    """Below it is zero; only without levels."""
    largest: float = torch.inf
    """Above it is this; only without levels."""
    levels: Tensor | None = None  # [levels] float32, increasing: bf16(level * scale) is read
    bounds: Tensor | None = None  # [levels - 1] float32: above bounds[i], in units of the scale, comes levels[i + 1]
    scale: Tensor | None = None  # [pair, rows] bfloat16: of all columns of the strip


def can_code(device: torch.device) -> tuple[bool, str]:
    """Whether strips can be coded at once there, and why not."""
    if device.type != "cuda":
        return False, "strips at once are for CUDA devices"
    if torch.version.hip is not None:
        return False, "strips at once were never tried on ROCm"
    try:
        import moefold_kernels.triton.columns  # noqa: F401
    except ImportError as error:
        return False, f"triton cannot be imported: {error}"
    return True, "a Triton kernel codes strips of columns"


def code_strip(
    target: Tensor, whole: Tensor, follow: Tensor, cost: Tensor, weight: Tensor, rounding: Rounding
) -> Tensor:
    """What both slots read, [pair, 2, columns, rows] float32 (bf16 numbers); overwrites `target`, as said above.

    `target` and `whole` are [pair, 2, columns, rows], `follow` [pair, 2, columns, columns], `cost` [pair, 2, columns]
    and `weight` [pair, 2, rows], positive; all float32. Raises FormatError for other shapes or types.
    """
    from moefold_kernels.triton.columns import code

    return code(target, whole, follow, cost, weight, rounding)
