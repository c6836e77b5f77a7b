"""What the entries of decoder layers in config.json share, and that of a layer whose experts were merged.

Merged experts lie in the files as the source's own do, numbered from 0 (or as one fused tensor of fewer experts); the
router is the source's. A stock transformers without this package raises: it finds fewer experts than config.json
promises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moefold_kernels.errors import FormatError

MERGED = "merged"
_FUSED = {f"{name}_proj{end}" for name in ("gate_up", "up", "down") for end in ("", "_bias")}
"""What transformers calls the tensors of all experts of a layer."""

Json = Any


@dataclass(frozen=True)
class MergedLayer:
    """One decoder layer's entry: its experts were merged, and are stored in the source's own form."""

    prefix: str
    """The experts' module in the names of the checkpoint's files."""
    route: tuple[int, ...]
    """The expert that router output i means."""

    @property
    def experts(self) -> int:
        """How many experts the layer has."""
        return max(self.route) + 1

    def to_json(self) -> dict[str, Json]:
        """The entry as config.json has it."""
        return {"prefix": self.prefix, "format": MERGED, "route": list(self.route)}

    def check_files(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise FormatError unless the files, by their tensors' shapes, hold just the merged experts."""
        counted: dict[str, set[int]] = {}
        for name in shapes:
            if name.startswith(f"{self.prefix}."):
                head, _, rest = name.removeprefix(f"{self.prefix}.").partition(".")
                if head.isdecimal():
                    counted.setdefault(rest, set()).add(int(head))
                elif not rest and head in _FUSED:  # Laguna keeps a bias of the router among its experts
                    counted[head] = set(range(shapes[name][0] if shapes[name] else 0))
        if not counted:
            raise FormatError(f"{self.prefix}: no expert is in the checkpoint's files; save or download it again")
        for name, found in counted.items():
            if wrong := sorted(found ^ set(range(self.experts))):
                raise FormatError(
                    f"{self.prefix}: {name} of expert {wrong[0]} is missing in the checkpoint's files, or one too many "
                    f"by the route onto {self.experts} experts; save or download it again"
                )


def read_merged(where: str, entry: Mapping[str, Json]) -> MergedLayer:
    """The entry of a merged layer; raises FormatError, with the place in config.json."""
    check_keys(where, entry, {"prefix", "format", "route"})
    check_prefix(where, entry["prefix"])
    route = read_route(where, entry["route"])
    if max(route) + 1 == len(route):
        raise FormatError(f"{where}.route leads to as many experts as the router has outputs; leave the entry out")
    return MergedLayer(entry["prefix"], route)


def read_route(where: str, route: Json) -> tuple[int, ...]:
    """A list that leads each router output to an expert, and to every expert at least one."""
    if not isinstance(route, list) or not route or not all(type(expert) is int for expert in route):
        raise FormatError(f"{where}.route is no list of experts, one for each router output")
    if set(route) != set(range(max(route) + 1)):
        raise FormatError(f"{where}.route has to lead to each expert 0 .. {max(route)}, and to no other")
    return tuple(route)


def check_prefix(where: str, prefix: Json) -> None:
    """Raise FormatError unless it names a module."""
    if not is_name(prefix):
        raise FormatError(f"{where}.prefix is {prefix!r}, not the name of the experts' module")


def is_name(value: Json) -> bool:
    """Whether it can be (part of) a tensor's name; transformers takes names for regular expressions."""
    return isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*", value) is not None


def check_keys(where: str, entry: Mapping[str, Json], known: set[str]) -> None:
    """Raise FormatError for a key too many or too few."""
    if unknown := sorted(set(entry) - known):
        raise FormatError(f"{where}.{unknown[0]}: unknown key; known: {', '.join(sorted(known))}")
    if missing := sorted(known - set(entry)):
        raise FormatError(f"{where}.{missing[0]} is missing")
