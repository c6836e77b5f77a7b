"""Whether two results are the same, bit for bit, and where they are not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moefold.artifact import Artifact
from moefold.artifacts import PairMerge
from moefold.stage import Layers


def difference(one: Any, other: Any, place: str = "") -> str | None:
    """Where and how `other` is not `one`; None where it is. Functions are not compared, recipes by what they give."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return _tensors(one, other, place)
    if type(one) is not type(other):
        return f"{place} is a {type(one).__name__} and then a {type(other).__name__}"
    if isinstance(one, Artifact):
        return _first(_fields(one), _fields(other), place)
    if isinstance(one, Mapping):
        return _first(one, other, place)
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{place} has {len(one)} values and then {len(other)}"
        return _first(dict(enumerate(one)), dict(enumerate(other)), place)
    if callable(one) or one == other or (one != one and other != other):
        return None
    return f"{place} is {one!r} and then {other!r}"


def snapshot(value: Any) -> Any:
    """A copy that keeps nothing in common with the value, to be compared later."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, PairMerge):
        return value  # its experts and figures are what its stage was given, and are looked at there
    if isinstance(value, Artifact):
        return dataclasses.replace(value, **{name: snapshot(part) for name, part in _stored(value).items()})
    if isinstance(value, Layers):
        return Layers({number: snapshot(value[number]) for number in value})
    if isinstance(value, Mapping):
        return {name: snapshot(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(part) for part in value)
    return copy.copy(value)


def _stored(value: Artifact) -> dict[str, Any]:
    return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}


def _fields(value: Artifact) -> dict[str, Any]:
    found = _stored(value)
    if isinstance(value, PairMerge):
        found |= {f"merged {name}": [tuple(p) for p in value.merged(name)] for name in value.experts.matrices()}
    return found


def _first(one: Mapping[Any, Any], other: Mapping[Any, Any], place: str) -> str | None:
    if set(one) != set(other):
        return f"{place or 'it'} has {list(one)} and then {list(other)}"
    parts = (difference(one[name], other[name], f"{place}.{name}" if place else str(name)) for name in one)
    return next((found for found in parts if found), None)


def _tensors(one: Any, other: Any, place: str) -> str | None:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return f"{place} is a {type(one).__name__} and then a {type(other).__name__}"
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{place} is {one.dtype} {list(one.shape)} and then {other.dtype} {list(other.shape)}"
    first, second = (tensor.detach().cpu().contiguous().flatten() for tensor in (one, other))
    if first.numel() and not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
        apart = int((first.view(torch.uint8) != second.view(torch.uint8)).sum())
        return f"{place} differs in {apart} of {first.numel() * first.element_size()} bytes"
    return None
