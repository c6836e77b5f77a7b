"""An experts module with fewer experts than its router has outputs: indices go through a route before the forward.

Inside, everything is over the fewer experts, so that every stock experts implementation runs them as its own.
`merge_module` moves a stock module to such a subclass; a packed module (module.py) is one, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from moefold_kernels.entry import MergedLayer
from moefold_kernels.errors import FormatError


class RoutedModule(nn.Module):
    """What our experts modules have beside their stock class: tables that are in no file, the route among them."""

    stock_class: type[nn.Module]
    route: Tensor | None  # [router output] int64: the expert it means; None: the expert of its own number

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward, with experts in place of router outputs in `top_k_index`."""
        if self.route is None:
            return super().forward(*args, **kwargs)
        return super().forward(*self._rerouted(*args, **kwargs))

    def _rerouted(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        route = cast(Tensor, self.route)
        return hidden_states, route[top_k_index].to(top_k_index.dtype), top_k_weights

    def table_values(self) -> dict[str, Tensor]:
        """The values of the module's own buffers; they move with it, and are saved nowhere."""
        raise NotImplementedError

    def fill_tables(self) -> None:
        """Write the tables, which no checkpoint has; whoever makes memory for a module on meta calls this."""
        for name, table in self.table_values().items():
            buffer: Tensor = getattr(self, name)
            if not buffer.is_meta:
                buffer.copy_(table)

    def add_tables(self, device: torch.device) -> None:
        """Give the module its buffers."""
        values = self.table_values()
        if "route" not in values:
            self.route = None  # not an empty buffer, for which accelerate's offloading has no place
        for name, table in values.items():
            self.register_buffer(name, table.to(device), persistent=False)

    def drop_tables(self, *others: str) -> None:
        """Take the buffers from the module again, and `others`."""
        self.__dict__.pop("route", None)
        for name in (*self.table_values(), *others):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """As every module does it, and `to_empty` leaves tables that mean something."""
        were_meta = any(self._is_meta(name) for name in self.table_values())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        if were_meta:
            self.fill_tables()
        return self

    def _is_meta(self, name: str) -> bool:
        return bool(getattr(self, name).is_meta)


class MergedModule(RoutedModule):
    """What an experts module of merged experts has beside its stock class; never instantiated by itself."""

    merged_layer: MergedLayer

    def table_values(self) -> dict[str, Tensor]:
        """The route."""
        return {"route": route_table(self.merged_layer.route)}


def route_table(route: Sequence[int]) -> Tensor:
    """A route as the index of a tensor of experts, on the CPU."""
    return torch.tensor(route, dtype=torch.int64, device="cpu")


def merge_module(module: nn.Module, layer: MergedLayer, where: str) -> None:
    """Replace the parameters of a stock experts module (on any device, meta included) by empty ones of fewer experts.

    Raises FormatError when the module and the checkpoint's entry do not fit each other.
    """
    flags: Any = module
    check_outputs(module, len(layer.route), where)
    device: torch.device = flags.down_proj.device
    resize(module, stock_names(module), layer.experts)
    module.__class__ = _merged_class(cast(Any, type(module)))
    flags.merged_layer = layer
    flags.add_tables(device)


def unmerge_module(module: MergedModule, dtype: torch.dtype | None = None) -> None:
    """Make a module of merged experts a stock one again, in which they are repeated (in `dtype`, default their own)."""
    values = {name: spread(module, cast(Tensor, getattr(module, name))) for name in stock_names(module)}
    flags: Any = module
    flags.num_experts = len(module.merged_layer.route)
    module.drop_tables()
    del module.__dict__["merged_layer"]
    module.__class__ = module.stock_class  # type: ignore[assignment]  # back to what merge_module found
    for name, value in values.items():
        put(module, name, value.to(dtype or value.dtype))


def spread(module: RoutedModule, values: Tensor) -> Tensor:
    """One row for each expert -> one for each router output."""
    return values.detach() if module.route is None else values.detach()[module.route]


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """A parameter that transformers must not initialise."""
    parameter = nn.Parameter(value)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark
    module.register_parameter(name, parameter)


def check_outputs(module: nn.Module, outputs: int, where: str) -> None:
    """Raise FormatError unless a stock experts module has an expert for each router output."""
    experts = len(module.get_parameter("down_proj"))
    if experts != outputs:
        raise FormatError(f"{where}: the checkpoint lists {outputs} experts, the model has {experts}")


def resize(module: nn.Module, names: Iterable[str], experts: int) -> None:
    """Other, empty, parameters of another number of experts."""
    for name in names:
        old = module.get_parameter(name)
        new = torch.empty(experts, *old.shape[1:], dtype=old.dtype, device=old.device)
        module.register_parameter(name, nn.Parameter(new, requires_grad=old.requires_grad))
    flags: Any = module
    flags.num_experts = experts  # every stock implementation counts by it


def stock_names(module: Any) -> list[str]:
    """The stock module's own names for (gate and) up weights, down weights, and their biases."""
    return [*weight_names(module), *bias_names(module)]


def weight_names(module: Any) -> list[str]:
    """Those of the weights."""
    return ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]


def bias_names(module: Any) -> list[str]:
    """Those of the biases, if it has any."""
    return [f"{name}_bias" for name in weight_names(module)] if module.has_bias else []


@functools.cache
def _merged_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"Merged{stock.__name__}", (MergedModule, stock), {"stock_class": stock})
