"""Where each expert's weights are: first the two slots of every pair, then the experts that were left alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tables(pairs: Sequence[Sequence[int]], alone: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(places [expert], placed [place]), int32 on the CPU: an expert's place, and the inverse.

    Place 2 * pair + slot is a slot of a pair; places from 2 * pairs on are the experts alone, in their order.
    """
    placed = torch.tensor([*(expert for pair in pairs for expert in pair), *alone], dtype=torch.int32, device="cpu")
    return placed.argsort().to(torch.int32), placed
