"""What every artifact is: a frozen dataclass that knows how to save and load itself.

Its fields are tensors, dicts of tensors, or plain JSON. It is stored as one safetensors file: the tensors as they are,
everything else as JSON in one metadata key (files with two keys are written in random key order).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moefold.errors import StoreError

Json = Any
"""A value that JSON can hold."""


def finite(value: Json) -> Json:
    """The value with null for what JSON has no number for: NaN and infinity, for which readers refuse a document."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


T = TypeVar("T")

_KEY = "moefold"


@dataclass(frozen=True)
class Artifact:
    """A value on an edge of the plan; subclasses say what it holds."""

    transient: ClassVar[bool] = False
    """True for a value that lives in memory only (it holds a recipe, not results); its stage is `keep="never"`."""

    def save(self, path: Path) -> None:
        """Write the artifact to one safetensors file."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Json] = {}
        groups: list[str] = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                tensors[item.name] = value
            elif isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
                groups.append(item.name)
                tensors.update({f"{item.name}/{key}": tensor for key, tensor in value.items()})
            else:
                plain[item.name] = value
        try:
            header = json.dumps({"type": type(self).__name__, "plain": plain, "groups": groups})
        except TypeError as error:
            raise StoreError(
                f"{type(self).__name__} holds something that is neither tensor nor JSON: {error}"
            ) from error
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path, metadata={_KEY: header})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote, as the kind of it that was saved; tensors are on the CPU."""
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            kind = next((k for k in _kinds(cls) if header and k.__name__ == header["type"]), None)
            if kind is None:
                raise StoreError(f"{path} does not hold a {cls.__name__}; delete it, and it is computed again")
            values: dict[str, Any] = dict(header["plain"]) | {name: {} for name in header["groups"]}
            for key in file.keys():  # noqa: SIM118  (safe_open is no dict)
                name, _, inner = key.partition("/")
                if inner:
                    values[name][inner] = file.get_tensor(key)
                else:
                    values[name] = file.get_tensor(key)
        return kind(**values)

    def intact(self) -> bool:
        """Whether what the artifact points to outside the store is still as it was written."""
        return True

    def facts(self) -> dict[str, Json]:
        """Small figures for the report: JSON, no tensors."""
        return {}


def _kinds(artifact: type[T]) -> Iterator[type[T]]:
    yield artifact
    for kind in artifact.__subclasses__():
        yield from _kinds(kind)
