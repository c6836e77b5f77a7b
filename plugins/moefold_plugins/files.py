"""What the files of a checkpoint hold where a layer's routed experts were replaced: one function for each kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moefold import ExpertNames, Json, Layer, Packed, Replacement
from moefold.errors import FormatError
from moefold_kernels import PackedLayer, layout


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
    entry: PackedLayer | None = None
    """The layer's own place in config.json's `quantization_config`; None: stock readers need none."""
    config: Mapping[str, Json] = field(default_factory=dict)
    """Keys of config.json (of its text part, for composite models) that change; every layer has to say the same."""


def layer_files(layer: Layer, value: Replacement) -> LayerFiles | None:
    """The files of a layer whose experts `value` replaces; None where it replaces nothing (a skipped layer)."""
    place = layer.names()
    if isinstance(value, Packed):
        return _packed(place, value) if value.pairs else None
    raise FormatError(f"save does not know how to write {type(value).__name__}; give it what a pack.* stage makes")


def _packed(place: ExpertNames, value: Packed) -> LayerFiles:
    if value.format != layout.EXPONENT:
        raise FormatError(f"format {value.format} has no checkpoint layout; save knows {layout.EXPONENT}")
    pairs = tuple((first, second) for first, second in value.pairs)
    matrix = {name: place.matrix[name] for name in value.words}
    entry = PackedLayer(place.prefix, value.settings, pairs, tuple(value.dense), matrix)
    return LayerFiles(
        "packed", entry.experts, value.bytes(), frozenset(place.keys), _packed_tensors(entry, value), entry
    )


def _packed_tensors(entry: PackedLayer, value: Packed) -> Iterator[tuple[str, Tensor]]:
    for matrix, words in value.words.items():
        for pair in range(len(value.pairs)):
            yield entry.packed(pair, matrix), words[pair]
        for number in range(len(value.dense)):
            yield entry.alone(number, matrix), value.experts[matrix][number]
    yield entry.tripwire, torch.empty(0, dtype=torch.bfloat16)
