"""Stand-ins for parts of a model, with which its own forward runs around one decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moefold.errors import CheckpointError

Forward = Callable[..., Any]


class Stop(Exception):  # noqa: N818  (not an error: how a forward is left early)
    """Leaves the model's forward with what was asked for."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.arguments = arguments

    def result(self, wrap: Callable[[Tensor], Any]) -> Tensor:
        """The hidden states in what a decoder layer returned."""
        (out,) = self.arguments
        hidden: Tensor = out[0] if wrap is tupled else out
        return hidden

    @staticmethod
    def at_entry(*args: Any, **kwargs: Any) -> None:
        """A decoder layer's forward that stops with the hidden states that enter."""
        raise Stop((hidden_of(args, kwargs),))

    @staticmethod
    def after(forward: Forward, hidden: Tensor) -> Forward:
        """A decoder layer's forward that runs on `hidden` and stops with the result."""
        fed = feed(forward, hidden)

        def stop(*args: Any, **kwargs: Any) -> None:
            raise Stop((fed(*args, **kwargs),))

        return stop

    @staticmethod
    def at_experts(module: nn.Module, args: tuple[Any, ...]) -> None:
        """A pre-hook of an experts module that stops with its arguments."""
        if len(args) != 3:
            raise CheckpointError(f"{type(module).__name__} takes other arguments than (hidden, index, weights)")
        raise Stop(args)


class Unfit(Exception):  # noqa: N818  (turned into a CheckpointError)
    """The model does not keep the contract that running layer by layer needs."""


def bare(hidden: Tensor) -> Any:
    return hidden


def tupled(hidden: Tensor) -> Any:
    return (hidden,)


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a decoder layer's arguments."""
    hidden = args[0] if args else kwargs["hidden_states"]
    if not isinstance(hidden, Tensor):
        raise Unfit("a decoder layer gets no tensor of hidden states")
    return hidden


def feed(forward: Forward, hidden: Tensor) -> Forward:
    """A decoder layer's forward that takes `hidden` for the hidden states it is called with."""

    def fed(*args: Any, **kwargs: Any) -> Any:
        return forward(hidden, *args[1:], **kwargs) if args else forward(**kwargs | {"hidden_states": hidden})

    return fed


def beside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    named = {f"argument {place}": value for place, value in enumerate(args[1:], 1)}
    return named | {name: value for name, value in kwargs.items() if args or name != "hidden_states"}


def compare(one: Any, other: Any, name: str = "arguments") -> None:
    """That what a layer gets beside hidden states is plain, and the same whatever the hidden states are."""
    if isinstance(one, dict) and one:
        for key in one:
            compare(one[key], other[key], str(key))
    elif isinstance(one, list | tuple) and (one or isinstance(one, tuple)):
        for left, right in zip(one, other, strict=True):
            compare(left, right, name)
    elif isinstance(one, Tensor):
        if not torch.equal(one, other):
            raise Unfit(f"{name} depends on the hidden states of earlier layers")
    elif one is not None and not isinstance(one, bool | int | float | str | torch.dtype | torch.device):
        raise Unfit(f"{name} is a {type(one).__name__}, in which layers may leave state for each other")


def rerouted(route: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A pre-hook that sends router output i to expert `route[i]`."""

    def remap(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, index, weights = args
        return hidden, route.to(index.device)[index].to(index.dtype), weights

    return remap


@contextmanager
def replaced(module: Any, forward: Forward) -> Iterator[None]:
    """Another forward for one module; whatever instance attribute there was comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
