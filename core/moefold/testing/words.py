"""What a codec's words are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from moefold.testing.failures import CheckError


def parts(words: Any) -> dict[str, Tensor]:
    """The tensors that words are made of, by name: one, or the planes of a format that has several."""
    if isinstance(words, Tensor):
        return {"words": words}
    if isinstance(words, Mapping):
        return {str(name): part for name, part in words.items()}
    if hasattr(words, "_asdict"):
        return parts(words._asdict())
    if isinstance(words, Iterable):
        return {f"words {index}": part for index, part in enumerate(words)}
    raise CheckError(f"words are {type(words).__name__}; a codec gives tensors")
