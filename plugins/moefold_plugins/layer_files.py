"""One layer's place in a checkpoint's files, when its routed experts were replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from moefold import Json
from moefold_kernels import LayerEntry

Export = Literal["route", "expanded"]


@dataclass(frozen=True)
class LayerFiles:
    """One replaced layer, as it is to be written."""

    kind: str
    """One word for people: packed, merged, pruned, ..."""
    experts: int
    """How many there are now."""
    bytes: int
    """Of what takes the place of the experts' weight matrices."""
    drops: frozenset[str]
    """The source's tensors that are not copied."""
    tensors: Iterable[tuple[str, Tensor]]
    """What is written instead, made one by one."""
    entry: LayerEntry | None = None
    """The layer's own place in config.json's `quantization_config`; None: stock readers need none."""
    config: Mapping[str, Json] = field(default_factory=dict)
    """Keys of config.json (of its text part, for composite models) that change; every layer has to say the same."""
    quantization: Mapping[str, Json] | None = None
    """compressed-tensors' own `quantization_config`, for the whole model; every layer has to say the same."""
