"""A compressed checkpoint's names and its entry in config.json: once, for the writer and for every reader.

    {experts}.{pair}.gate_proj.packed_weight   [inner, hidden] int16   (up_proj alike; down_proj [hidden, inner])
    {experts}.{number}.gate_proj.weight        the experts left alone, numbered from 0 on their own, source dtype
    {experts}.gate_up_proj                     [0]: the tripwire

`{experts}` is the prefix that the source's own files use, and so are the matrices' names (Mixtral: w1, w3, w2). The
names are 2-D and per pair because vLLM's loader takes them for experts; the suffix must not begin with `weight`, on
which transformers 5.17's patterns would match. The tripwire makes a stock transformers without this package raise
instead of initialising experts at random. Layers that were merged and not packed: entry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moefold_kernels import layout
from moefold_kernels.entry import MERGED, MergedLayer, check_keys, check_prefix, is_name, read_merged, read_route
from moefold_kernels.errors import FormatError
from moefold_kernels.quantized import MATRICES, check_matrices
from moefold_kernels.reference import decode

METHOD = "moefold"
VERSION = 1
PACKED_SUFFIX = "packed_weight"
GATED = ("gate_proj", "up_proj", "down_proj")
UNGATED = ("up_proj", "down_proj")

Json = Any


@dataclass(frozen=True)
class PackedLayer:
    """One decoder layer's entry: which experts share words, and where everything is called what."""

    prefix: str
    """The experts' module in the names of the checkpoint's files."""
    window: Mapping[str, int]
    """The window's top (a biased bf16 exponent) per matrix."""
    pairs: tuple[tuple[int, int], ...]
    """The original numbers of the experts in slots 0 and 1."""
    dense: tuple[int, ...] = ()
    """The original numbers of the experts left alone, in the order of their files."""
    matrix: Mapping[str, str] = field(default_factory=lambda: {name: name for name in GATED})
    """Standard name -> name in the files."""
    format: str = layout.EXPONENT
    route: tuple[int, ...] | None = None
    """The expert that router output i means, when experts were merged away (None: expert i)."""

    @property
    def experts(self) -> int:
        """How many experts the layer has."""
        return layout.SLOTS * len(self.pairs) + len(self.dense)

    @property
    def gated(self) -> bool:
        """Whether gate and up projections are fused in the model."""
        return "gate_proj" in self.matrix

    @property
    def tripwire(self) -> str:
        """The zero-element tensor that keeps stock readers from passing over the packed experts."""
        return f"{self.prefix}.{'gate_up_proj' if self.gated else 'up_proj'}"

    def packed(self, pair: int, matrix: str) -> str:
        """The name of one pair's words."""
        return f"{self.prefix}.{pair}.{self.matrix[matrix]}.{PACKED_SUFFIX}"

    def alone(self, number: int, matrix: str) -> str:
        """The name of a matrix of the expert `dense[number]`."""
        return f"{self.prefix}.{number}.{self.matrix[matrix]}.weight"

    def shapes(self, inner: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor that the layer has in place of its experts' weight matrices, with its shape."""
        for matrix in self.matrix:
            shape = (hidden, inner) if matrix == "down_proj" else (inner, hidden)
            yield from ((self.packed(pair, matrix), shape) for pair in range(len(self.pairs)))
            yield from ((self.alone(number, matrix), shape) for number in range(len(self.dense)))
        yield self.tripwire, (0,)

    def to_json(self) -> dict[str, Json]:
        """The entry as config.json has it."""
        return {
            "prefix": self.prefix,
            "format": self.format,
            "window": dict(self.window),
            "pairs": [list(pair) for pair in self.pairs],
            "dense": list(self.dense),
            "route": None if self.route is None else list(self.route),
            "matrix": dict(self.matrix),
        }


LayerEntry = PackedLayer | MergedLayer


def write_config(layers: Mapping[int, LayerEntry], matrices: Mapping[str, Json] | None = None) -> dict[str, Json]:
    """config.json's `quantization_config` for these decoder layers.

    `matrices`: that of compressed-tensors, when every expert's matrices are stored as it says (quantized.py).
    """
    entries = {str(number): layers[number].to_json() for number in sorted(layers)}
    head = {"quant_method": METHOD, "version": VERSION} | ({} if matrices is None else {MATRICES: dict(matrices)})
    return head | {"layers": entries}


def read_config(config: Mapping[str, Json]) -> dict[int, LayerEntry]:
    """The packed and merged decoder layers by number; the layers not listed are stock.

    Raises FormatError, with the place in config.json, for anything that this version would not write.
    """
    where = "quantization_config"
    if config.get("quant_method") != METHOD:
        raise FormatError(f"{where}.quant_method is {config.get('quant_method')!r}, not {METHOD!r}")
    if config.get("version") != VERSION:
        raise FormatError(f"{where}.version is {config.get('version')!r}, this moefold reads {VERSION}: use another")
    check_keys(where, {MATRICES: None} | dict(config), {"quant_method", "version", MATRICES, "layers"})
    layers = config["layers"]
    if not isinstance(layers, Mapping):
        raise FormatError(f"{where}.layers is a {type(layers).__name__}, not an object of decoder layers")
    if bad := [name for name in layers if not name.isdecimal()]:
        raise FormatError(f"{where}.layers: {bad[0]!r} is not the number of a decoder layer")
    read = {int(name): _read_layer_entry(f"{where}.layers.{name}", entry) for name, entry in layers.items()}
    if len({layer.prefix for layer in read.values()}) != len(layers):
        raise FormatError(f"{where}.layers: two entries are for one layer; each needs a number and prefix of its own")
    check_matrices(f"{where}.{MATRICES}", config.get(MATRICES))
    if config.get(MATRICES) is not None and not all(isinstance(layer, MergedLayer) for layer in read.values()):
        raise FormatError(
            f"{where}.{MATRICES}: packed layers have words of their own; leave it out, or the packed layers"
        )
    return read


def read_layer(get: Callable[[str], Tensor], layer: PackedLayer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The decoded matrices of every expert, in the order before packing: standard name -> [expert, rows, columns].

    `get` gives a tensor by its name in the files; it is asked for one pair's matrix at a time. `dtype` is the
    experts' (default: that of the experts left alone, bfloat16 where there are none).
    """
    return {matrix: _read_matrix(get, layer, matrix, dtype) for matrix in layer.matrix}


def fuse(matrices: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(gate_up [expert, 2 * inner, hidden], down [expert, hidden, inner]) of `read_layer`'s matrices."""
    up = matrices["up_proj"]
    gate_up = torch.cat([matrices["gate_proj"], up], dim=1) if "gate_proj" in matrices else up
    return gate_up, matrices["down_proj"]


def _read_matrix(get: Callable[[str], Tensor], layer: PackedLayer, matrix: str, dtype: torch.dtype | None) -> Tensor:
    first = get(layer.packed(0, matrix))
    stored = get(layer.alone(0, matrix)).dtype if layer.dense else torch.bfloat16
    out = first.new_empty(layer.experts, *first.shape, dtype=dtype or stored)
    for index, pair in enumerate(layer.pairs):
        words = get(layer.packed(index, matrix)) if index else first
        if words.shape != first.shape:
            name, shapes = layer.packed(index, matrix), f"{list(words.shape)}, that of pair 0 {list(first.shape)}"
            raise FormatError(f"{name} is {shapes}; the checkpoint is damaged, download or save it again")
        for slot, expert in enumerate(pair):
            out[expert] = decode(words, layer.window[matrix], slot)
    for number, expert in enumerate(layer.dense):
        out[expert] = get(layer.alone(number, matrix))
    return out


def _read_layer_entry(where: str, entry: Json) -> LayerEntry:
    if not isinstance(entry, Mapping):
        raise FormatError(f"{where} is a {type(entry).__name__}, not an object")
    return read_merged(where, entry) if entry.get("format") == MERGED else _read_packed(where, entry)


def _read_packed(where: str, entry: Mapping[str, Json]) -> PackedLayer:
    check_keys(where, entry, {"prefix", "format", "window", "pairs", "dense", "route", "matrix"})
    if entry["format"] != layout.EXPONENT:
        raise FormatError(f"{where}.format is {entry['format']!r}; this version knows {layout.EXPONENT}, {MERGED}")
    check_prefix(where, entry["prefix"])
    matrix, window = entry["matrix"], entry["window"]
    if not isinstance(matrix, Mapping) or set(matrix) not in (set(GATED), set(UNGATED)):
        raise FormatError(f"{where}.matrix has to name {', '.join(GATED)} (or {', '.join(UNGATED)})")
    if not all(map(is_name, matrix.values())) or len(set(matrix.values())) != len(matrix):
        raise FormatError(f"{where}.matrix: {sorted(map(str, matrix.values()))} are no names of different tensors")
    if not isinstance(window, Mapping) or set(window) != set(matrix):
        raise FormatError(f"{where}.window has to have one exponent for each of {', '.join(sorted(matrix))}")
    for name, top in window.items():
        try:
            layout.check_top(top)
        except FormatError as error:
            raise FormatError(f"{where}.window.{name}: {error}") from error
    pairs, dense = _read_members(where, entry["pairs"], entry["dense"])
    route = None if entry["route"] is None else read_route(where, entry["route"])
    if route is not None and max(route) + 1 != layout.SLOTS * len(pairs) + len(dense):
        raise FormatError(f"{where}.route leads to {max(route) + 1} experts, pairs and dense name another number")
    names = GATED if "gate_proj" in matrix else UNGATED
    return PackedLayer(
        prefix=entry["prefix"],
        window={name: window[name] for name in names},
        pairs=pairs,
        dense=dense,
        matrix={name: matrix[name] for name in names},
        route=route,
    )


def _read_members(where: str, pairs: Json, dense: Json) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    lists = isinstance(pairs, list) and isinstance(dense, list)
    if not lists or not pairs or not all(isinstance(pair, list) and len(pair) == layout.SLOTS for pair in pairs):
        raise FormatError(f"{where}: pairs is a list of at least one [i, j], and dense is a list of experts")
    members = [expert for pair in pairs for expert in pair] + dense
    if not all(type(expert) is int for expert in members) or sorted(members) != list(range(len(members))):
        raise FormatError(f"{where}: pairs and dense together have to name each expert 0 .. {len(members) - 1} once")
    return tuple((pair[0], pair[1]) for pair in pairs), tuple(dense)
