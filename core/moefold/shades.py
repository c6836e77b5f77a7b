"""A similarity matrix in a report: 256 shades between the least and the largest value, one byte an entry.

Enough for a picture, and a sixteenth of what the numbers take as text: 60 layers of 128 experts are 1.3 MB.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

import torch
from torch import Tensor

from moefold.artifact import Json


def encode(matrix: Tensor) -> dict[str, Json]:
    """Levels of a square matrix; the diagonal (an expert and itself) does not stretch the range."""
    count = len(matrix)
    values = matrix.double().cpu()
    aside = values[~torch.eye(count, dtype=torch.bool)]
    finite = aside[aside.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    span = high - low if high > low else 1.0
    levels = ((values.nan_to_num(low) - low) / span * 255).round().clamp(0, 255).to(torch.uint8)
    levels.fill_diagonal_(255)
    text = base64.b64encode(levels.contiguous().numpy().tobytes()).decode("ascii")
    return {"count": count, "low": low, "high": high, "levels": text}


def decode(told: Mapping[str, Json]) -> Tensor:
    """The matrix that `encode` was given, to within half a level: [expert, expert] float64."""
    raw = bytearray(base64.b64decode(told["levels"]))
    levels = torch.frombuffer(raw, dtype=torch.uint8).view(told["count"], told["count"]).double()
    matrix: Tensor = told["low"] + levels / 255 * (told["high"] - told["low"])
    return matrix
