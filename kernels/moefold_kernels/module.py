"""A stock experts module whose weights are packed: the stock names decode when they are read.

`pack_module` gives an instance of any class under transformers' `use_experts_implementation` integer parameters and
moves it to a subclass on which `gate_up_proj` (`up_proj` where there is no gate) and `down_proj` are properties, in
the module's own layout. So every stock experts implementation stays correct; it is only slow. The fast one, `moefold`,
reads the words themselves (implementation.py).
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from moefold_kernels import layout, layout_pairs
from moefold_kernels.activation import Known, recognise_module
from moefold_kernels.checkpoint import PackedLayer
from moefold_kernels.errors import FormatError
from moefold_kernels.levels import coded, layer_tables
from moefold_kernels.places import tables
from moefold_kernels.reference import PackedExperts
from moefold_kernels.reference_pairs import LeveledExperts
from moefold_kernels.routed import RoutedModule, bias_names, check_outputs, put, resize, route_table, spread

GATE_UP_PACKED, DOWN_PACKED = "gate_up_packed", "down_packed"
GATE_UP_DENSE, DOWN_DENSE = "gate_up_dense", "down_dense"
KEPT = ("packed_layer", "arrived", "known_activation", "fallback", "_decoded", "full_inner", "hidden", "whole", "coded")
"""What a packed module has beside parameters and buffers."""
ENDS = {"words": "packed", "low": "low", "scale": "group", "dense": "dense"}
"""What the parameters hold -> how their names end, after gate_up_ and down_; none begins with another (5.17)."""


class PackedModule(RoutedModule):
    """What a packed experts module has beside its stock class; never instantiated by itself."""

    packed_layer: PackedLayer
    gate_up_packed: Tensor  # [pair, 2 * inner, hidden] int16, gate before up (few bits: int32, by rows or in bands)
    down_packed: Tensor  # [pair, hidden, inner] int16; few-bit formats have .._low and .._group as well
    full_inner: int
    """The experts' inner width; on one of several ranks it may be less."""
    hidden: int
    """The rows of the down projection, on every rank."""
    gate_up_dense: Tensor  # [expert left alone, 2 * inner, hidden]; only where there are such experts
    down_dense: Tensor  # [expert left alone, hidden, inner]
    dtype_like: Tensor  # [0]: a buffer that follows the dtype the model is moved to
    places: Tensor  # [expert] int32: where its weights are
    placed: Tensor  # [place] int32: the inverse
    levels: Tensor  # [3, INTEGERS] int32: levels.py; only in few-bit formats
    whole: tuple[tuple[int, int], tuple[int, int]]
    """Lines and widths of gate_up_packed and down_packed, where they are not split over ranks."""
    coded: bool
    """Whether all levels are e4m3 numbers times a factor (levels.coded): looked at once, and not while it is traced."""
    known_activation: Known
    """What the stock module computes between its projections."""
    fallback: str | None
    """The stock implementation for when `moefold`, taken by default, cannot; None where the user named `moefold`."""
    is_transposed: bool
    is_concatenated: bool
    arrived: set[str]
    """The packed parameters that a checkpoint has filled."""
    _decoded: dict[str, Tensor] | None

    def packed_experts(self) -> PackedExperts:
        """The layer as the kernels see it; the matrices are views of the parameters."""
        layer = self.packed_layer
        parts = {part: self._views(part) for part in layer.parts}
        dense = self._views("dense") if layer.dense else {}
        if layer.format == layout.EXPONENT:
            return PackedExperts(parts["words"], dense, layer.window, layer.pairs, layer.dense)
        columns = {name: self.inner if name == "down_proj" else self.hidden for name in layer.matrix}
        self._check_part()
        rest = layer.format, parts.get("low", {}), parts["scale"], layer.levels, columns
        return LeveledExperts(parts["words"], dense, {}, layer.pairs, layer.dense, *rest)

    @property
    def inner(self) -> int:
        """The rows of the up projection; where experts are split, this rank's."""
        lines = self.gate_up_packed.shape[1] // (1 + self.packed_layer.gated)
        return lines * layout_pairs.BAND if self._banded(self.full_inner, self.hidden) else lines

    @property
    def split(self) -> bool:
        """Whether this is one of several ranks, with a part of what is packed."""
        return (tuple(self.gate_up_packed.shape[1:]), tuple(self.down_packed.shape[1:])) != self.whole

    def _banded(self, rows: int, columns: int) -> bool:
        return self.packed_layer.format != layout.EXPONENT and layout_pairs.banded(rows, columns)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        names = (name for part in self.packed_layer.parts for name in part_names(part))
        return {name: tuple(getattr(self, name).shape[1:]) for name in names}

    def _check_part(self) -> None:
        """Raise FormatError where ranks of a few-bit format cut what lies together, and would read others' columns.

        A part is right if it is what a matrix of its size has, by rows or in bands as the whole is.
        """
        if not self.split:
            return
        inner, whole, step = self.inner, (self.full_inner, self.hidden), layout_pairs.GROUP
        if self._banded(*whole[::-1]):
            step = layout_pairs.STEP
        if inner and not inner % step and self._shapes() == part_shapes(self.packed_layer, inner, self.hidden):
            return
        raise FormatError(
            f"{self.stock_class.__name__}: {self.packed_layer.format} keeps {step} of {self.full_inner} inner columns "
            "together, and these ranks would cut them; use fewer ranks, or device_map"
        )

    def _views(self, part: str) -> dict[str, Tensor]:
        """One part of every matrix."""
        gate_up, down = (getattr(self, name) for name in part_names(part))
        if not self.packed_layer.gated:
            return {"up_proj": gate_up, "down_proj": down}
        gate, up = gate_up.chunk(2, dim=1)
        return {"gate_proj": gate, "up_proj": up, "down_proj": down}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward; what it reads is decoded once (the eager implementation reads once per expert)."""
        self._decoded = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._decoded = None

    def table_values(self) -> dict[str, Tensor]:
        """Where each expert's weights are, and the route where experts were merged before they were packed."""
        layer = self.packed_layer
        places, placed = tables(layer.pairs, layer.dense)
        route = {} if layer.route is None else {"route": route_table(layer.route)}
        levels = {"levels": layer_tables(layer.format, layer.levels)} if layer.levels else {}
        return {"places": places, "placed": placed, **levels, **route}

    def stock_gate_up(self) -> Tensor:
        """Gate and up projections of every expert, in the stock module's own layout."""
        packed = self.packed_experts()
        if not self.packed_layer.gated:
            return self._stock("up_proj", lambda rows: packed.unpack("up_proj", rows), (self.inner, self.hidden))
        return self._stock("gate_up_proj", lambda rows: self._fill(packed, rows), (2 * self.inner, self.hidden))

    def stock_down(self) -> Tensor:
        """Down projections of every expert, in the stock module's own layout."""
        packed = self.packed_experts()
        return self._stock("down_proj", lambda rows: packed.unpack("down_proj", rows), (self.hidden, self.inner))

    def _fill(self, packed: PackedExperts, rows: Tensor) -> None:
        inner = self.inner
        gate, up = (rows[:, :inner], rows[:, inner:]) if self.is_concatenated else (rows[:, 0::2], rows[:, 1::2])
        packed.unpack("gate_proj", gate)
        packed.unpack("up_proj", up)

    @torch.no_grad()
    def _stock(self, name: str, fill: Any, sizes: tuple[int, int]) -> Tensor:
        if self._decoded is not None and name in self._decoded:
            return self._decoded[name]
        rows, columns = sizes
        shape = (columns, rows) if self.is_transposed else (rows, columns)
        out = torch.empty(
            self.packed_layer.experts, *shape, dtype=self.dtype_like.dtype, device=self.down_packed.device
        )
        fill(out.transpose(1, 2) if self.is_transposed else out)
        if self._decoded is not None:
            self._decoded[name] = out
        return out


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' experts interface."""
    return all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "is_concatenated", "_apply_gate"))


def pack_module(module: nn.Module, layer: PackedLayer, where: str) -> None:
    """Replace the weights of a stock experts module (on any device, meta included) by empty packed ones.

    Raises FormatError when the module and the checkpoint's entry do not fit each other.
    """
    flags: Any = module
    if bool(flags.has_gate) != layer.gated:
        raise FormatError(f"{where}: the checkpoint is {'' if layer.gated else 'not '}gated, the model is otherwise")
    down: Tensor = flags.down_proj
    check_outputs(module, layer.experts if layer.route is None else len(layer.route), where)
    del module._parameters[gate_up_name(layer)], module._parameters["down_proj"]
    if layer.route is not None:
        resize(module, bias_names(module), layer.experts)
    inner, hidden = stock_sizes(flags.is_transposed, down)
    rows = (2 if layer.gated else 1) * inner
    shapes = part_shapes(layer, inner, hidden)
    for name, shape in shapes.items():
        kind = torch.int16 if layer.format == layout.EXPONENT or name in part_names("scale") else torch.int32
        words = torch.empty(len(layer.pairs), *shape, dtype=kind, device=down.device)
        module.register_parameter(name, nn.Parameter(words, requires_grad=False))
    dense = {GATE_UP_DENSE: (len(layer.dense), rows, hidden), DOWN_DENSE: (len(layer.dense), hidden, inner)}
    for name, size in dense.items() if layer.dense else ():
        module.register_parameter(name, nn.Parameter(torch.empty(size, dtype=down.dtype, device=down.device)))
    module.register_buffer("dtype_like", torch.empty(0, dtype=down.dtype, device=down.device), persistent=False)
    module.__class__ = _packed_class(cast(Any, type(module)), gate_up_name(layer))
    flags.packed_layer, flags.arrived, flags._decoded = layer, set(), None
    flags.full_inner, flags.hidden, flags.whole = inner, hidden, (shapes[GATE_UP_PACKED], shapes[DOWN_PACKED])
    flags.coded = coded(layer.format, layer.levels)
    flags.known_activation, flags.fallback = recognise_module(module), None
    flags.add_tables(down.device)
    flags._is_hf_initialized = True  # stock initialisation would write normal numbers over the words


def unpack_module(module: PackedModule, dtype: torch.dtype | None = None) -> None:
    """Make a packed module a stock one again, with decoded weights (in `dtype`, default the module's)."""
    stock = {gate_up_name(module.packed_layer): module.stock_gate_up(), "down_proj": module.stock_down()}
    biases = {name: module.get_parameter(name) for name in bias_names(module) if module.route is not None}
    values = {name: spread(module, value) for name, value in (stock | biases).items()}
    flags: Any = module
    flags.num_experts = len(values["down_proj"])
    for name in (name for part in ENDS for name in part_names(part)):
        module._parameters.pop(name, None)
    module.drop_tables("dtype_like")
    for name in KEPT:
        del module.__dict__[name]
    module.__class__ = module.stock_class  # type: ignore[assignment]  # back to what pack_module found
    for name, value in values.items():
        put(module, name, value.to(dtype or value.dtype))


def gate_up_name(layer: PackedLayer) -> str:
    """What the stock module calls its gate and up projections."""
    return "gate_up_proj" if layer.gated else "up_proj"


def stock_sizes(is_transposed: bool, down: Tensor) -> tuple[int, int]:
    """(inner, hidden) of a stock module by its down projection."""
    _, rows, columns = down.shape
    return (rows, columns) if is_transposed else (columns, rows)


def part_shapes(layer: PackedLayer, inner: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Of each packed parameter's pairs; gate and up lie behind one another."""
    shapes: dict[str, tuple[int, int]] = {}
    for part in layer.parts:
        (lines, width), down = layer.stored(part, inner, hidden), layer.stored(part, hidden, inner)
        shapes |= zip(part_names(part), (((1 + layer.gated) * lines, width), down), strict=True)
    return shapes


def part_names(part: str) -> tuple[str, str]:
    """The parameters that hold a part of ENDS."""
    return f"gate_up_{ENDS[part]}", f"down_{ENDS[part]}"


@functools.cache
def _packed_class(stock: type[nn.Module], gate_up: str) -> type[nn.Module]:
    names = {gate_up: property(PackedModule.stock_gate_up), "down_proj": property(PackedModule.stock_down)}
    return type(f"Packed{stock.__name__}", (PackedModule, stock), {"stock_class": stock, **names})
