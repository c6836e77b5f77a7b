"""A compressed checkpoint's names and its entry in config.json: once, for the writer and for every reader.

    {experts}.{pair}.gate_proj.packed_weight   [inner, hidden] int16   (up_proj alike; down_proj [hidden, inner])
    {experts}.{number}.gate_proj.weight        the experts left alone, numbered from 0 on their own, source dtype
    {experts}.gate_up_proj                     [0]: the tripwire

and in place of the first, in the few-bit pair formats (layout_pairs.py), whose levels are in config.json,

    {experts}.{pair}.gate_proj.packed_weight         [inner, words] int32: the nibble plane
    {experts}.{pair}.gate_proj.packed_weight_low     [inner, words] int32: the other bits of the levels; not of pair4
    {experts}.{pair}.gate_proj.packed_weight_group   [inner, groups] int16: the bits of the scales, which are bf16

or, of a matrix that lies in bands, [inner / 16, 16 * words] and so on (layout_pairs.stored).

`{experts}` is the prefix that the source's own files use, and so are the matrices' names (Mixtral: w1, w3, w2). The
names are 2-D and per pair because vLLM's loader takes them for experts; the suffix must not begin with `weight`, on
which transformers 5.17's patterns would match. The tripwire makes a stock transformers without this package raise
instead of initialising experts at random. Layers that were merged and not packed: entry.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moefold_kernels import layout, layout_pairs
from moefold_kernels.entry import MERGED, MergedLayer, check_keys, check_prefix, is_name, read_merged, read_route
from moefold_kernels.errors import FormatError
from moefold_kernels.layout_pairs import VERSIONS
from moefold_kernels.quantized import MATRICES, check_matrices

METHOD = "moefold"
VERSION = 1
PACKED_SUFFIX = "packed_weight"
PARTS = {"words": PACKED_SUFFIX, "low": f"{PACKED_SUFFIX}_low", "scale": f"{PACKED_SUFFIX}_group"}
"""What a pair's matrix has in the files -> how the names end."""
FORMATS = (layout.EXPONENT, *layout_pairs.MAGNITUDE_BITS)
GATED = ("gate_proj", "up_proj", "down_proj")
UNGATED = ("up_proj", "down_proj")

Json = Any


@dataclass(frozen=True)
class PackedLayer:
    """One decoder layer's entry: which experts share words, and where everything is called what."""

    prefix: str
    """The experts' module in the names of the checkpoint's files."""
    window: Mapping[str, int]
    """The window's top (a biased bf16 exponent) per matrix; empty in the few-bit formats."""
    pairs: tuple[tuple[int, int], ...]
    """The original numbers of the experts in slots 0 and 1."""
    dense: tuple[int, ...] = ()
    """The original numbers of the experts left alone, in the order of their files."""
    matrix: Mapping[str, str] = field(default_factory=lambda: {name: name for name in GATED})
    """Standard name -> name in the files."""
    format: str = layout.EXPONENT
    route: tuple[int, ...] | None = None
    """The expert that router output i means, when experts were merged away (None: expert i)."""
    levels: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The levels per matrix in the few-bit formats; empty in `exponent`."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What a pair's matrix has in the files, of PARTS."""
        if self.format == layout.EXPONENT:
            return ("words",)
        return tuple(layout_pairs.planes(self.format, 0))

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

    def packed(self, pair: int, matrix: str, part: str = "words") -> str:
        """The name of one pair's words, or of another of `parts`."""
        return f"{self.prefix}.{pair}.{self.matrix[matrix]}.{PARTS[part]}"

    def alone(self, number: int, matrix: str) -> str:
        """The name of a matrix of the expert `dense[number]`."""
        return f"{self.prefix}.{number}.{self.matrix[matrix]}.weight"

    def shapes(self, inner: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor that the layer has in place of its experts' weight matrices, with its shape."""
        for matrix in self.matrix:
            shape = (hidden, inner) if matrix == "down_proj" else (inner, hidden)
            for pair in range(len(self.pairs)):
                yield from ((self.packed(pair, matrix, part), self.stored(part, *shape)) for part in self.parts)
            yield from ((self.alone(number, matrix), shape) for number in range(len(self.dense)))
        yield self.tripwire, (0,)

    def stored(self, part: str, rows: int, columns: int) -> tuple[int, int]:
        """The shape that a part of a matrix of this shape has."""
        if self.format == layout.EXPONENT:
            return rows, columns
        return layout_pairs.stored(self.format, rows, columns)[part]

    def to_json(self) -> dict[str, Json]:
        """The entry as config.json has it."""
        window, levels = dict(self.window), {name: list(values) for name, values in self.levels.items()}
        return {
            "prefix": self.prefix,
            "format": self.format,
            **({"layout": VERSIONS[self.format]} if self.format in VERSIONS else {}),
            **({"window": window} if self.format == layout.EXPONENT else {"levels": levels}),
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


def _read_layer_entry(where: str, entry: Json) -> LayerEntry:
    if not isinstance(entry, Mapping):
        raise FormatError(f"{where} is a {type(entry).__name__}, not an object")
    return read_merged(where, entry) if entry.get("format") == MERGED else _read_packed(where, entry)


def _read_packed(where: str, entry: Mapping[str, Json]) -> PackedLayer:
    if entry.get("format", layout.EXPONENT) not in FORMATS:
        raise FormatError(f"{where}.format is {entry['format']!r}; this version knows {', '.join(FORMATS)}, {MERGED}")
    exponent = entry.get("format", layout.EXPONENT) == layout.EXPONENT
    values = "window" if exponent else "levels"
    version = VERSIONS.get(entry.get("format", layout.EXPONENT))
    if version is not None:
        _check_layout(where, entry, version)
    keys = {"prefix", "format", values, "pairs", "dense", "route", "matrix"} | ({"layout"} if version else set())
    check_keys(where, entry, keys)
    check_prefix(where, entry["prefix"])
    matrix = entry["matrix"]
    if not isinstance(matrix, Mapping) or set(matrix) not in (set(GATED), set(UNGATED)):
        raise FormatError(f"{where}.matrix has to name {', '.join(GATED)} (or {', '.join(UNGATED)})")
    if not all(map(is_name, matrix.values())) or len(set(matrix.values())) != len(matrix):
        raise FormatError(f"{where}.matrix: {sorted(map(str, matrix.values()))} are no names of different tensors")
    names = GATED if "gate_proj" in matrix else UNGATED
    window = _read_window(where, entry["window"], names) if exponent else {}
    levels = {} if exponent else _read_levels(where, entry["format"], entry["levels"], names)
    pairs, dense = _read_members(where, entry["pairs"], entry["dense"])
    route = None if entry["route"] is None else read_route(where, entry["route"])
    if route is not None and max(route) + 1 != layout.SLOTS * len(pairs) + len(dense):
        raise FormatError(f"{where}.route leads to {max(route) + 1} experts, pairs and dense name another number")
    return PackedLayer(
        prefix=entry["prefix"],
        window=window,
        pairs=pairs,
        dense=dense,
        matrix={name: matrix[name] for name in names},
        format=entry["format"],
        route=route,
        levels=levels,
    )


def _check_layout(where: str, entry: Mapping[str, Json], version: int) -> None:
    """That a format's bits lie where this version has them."""
    if "layout" not in entry:
        raise FormatError(
            f"{where} is {entry['format']} without layout, as an earlier moefold laid its bits out; this one reads "
            f"layout {version}: compress the model again, or use the moefold that wrote it"
        )
    if type(entry["layout"]) is not int or entry["layout"] != version:
        raise FormatError(
            f"{where}.layout of {entry['format']} is {entry['layout']!r}, this moefold reads {version}: compress the "
            "model again, or use the moefold that wrote it"
        )


def _read_window(where: str, window: Json, names: Sequence[str]) -> dict[str, int]:
    if not isinstance(window, Mapping) or set(window) != set(names):
        raise FormatError(f"{where}.window has to have one exponent for each of {', '.join(sorted(names))}")
    for name, top in window.items():
        try:
            layout.check_top(top)
        except FormatError as error:
            raise FormatError(f"{where}.window.{name}: {error}") from error
    return {name: window[name] for name in names}


def _read_levels(where: str, format: str, levels: Json, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    if not isinstance(levels, Mapping) or set(levels) != set(names):
        raise FormatError(f"{where}.levels has to have a list of levels for each of {', '.join(sorted(names))}")
    for name, values in levels.items():
        try:
            layout_pairs.check_levels(format, values if isinstance(values, list) else [])
        except FormatError as error:
            raise FormatError(f"{where}.levels.{name}: {error}") from error
    return {name: tuple(levels[name]) for name in names}


def _read_members(where: str, pairs: Json, dense: Json) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    lists = isinstance(pairs, list) and isinstance(dense, list)
    if not lists or not pairs or not all(isinstance(pair, list) and len(pair) == layout.SLOTS for pair in pairs):
        raise FormatError(f"{where}: pairs is a list of at least one [i, j], and dense is a list of experts")
    members = [expert for pair in pairs for expert in pair] + dense
    if not all(type(expert) is int for expert in members) or sorted(members) != list(range(len(members))):
        raise FormatError(f"{where}: pairs and dense together have to name each expert 0 .. {len(members) - 1} once")
    return tuple((pair[0], pair[1]) for pair in pairs), tuple(dense)
