"""What merging any two experts would cost, and the choice that is made of it: whom to merge, and in which format."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moefold.artifact import Artifact, Json
from moefold.artifacts import Groups
from moefold.errors import InputError


@dataclass(frozen=True)
class PairDamage(Artifact):
    """One layer: what merging any two of its experts would do to the layer's output, and the bytes it would take.

    A damage is the squared error of the layer's output, summed over both experts, mean over the layer's calibration
    tokens; `stream` is the mean squared length of what the decoder layer gives, to put layers beside each other.
    """

    damage: dict[str, Tensor]  # format -> [expert, expert] float32, symmetric
    tokens: Tensor  # [expert] int64: routed tokens
    peak: Tensor  # [expert] float32: the largest |output| value over routed tokens
    stream: float
    weights: int
    """Weights of one expert."""
    expert_bytes: int
    """Of one expert as it is."""
    pair_bytes: dict[str, int]
    """Of one pair, by format."""

    @property
    def count(self) -> int:
        """How many experts the layer has."""
        return len(self.tokens)

    def relative(self, format: str, pair: tuple[int, int]) -> float:
        """The damage of a pair in the unit in which layers compare."""
        return float(self.damage[format][pair]) / max(self.stream, 1e-30)

    def facts(self) -> dict[str, Json]:
        return {
            "tokens": self.tokens.tolist(),
            "peak": [float(f"{value:.5g}") for value in self.peak.tolist()],
            "stream": self.stream,
            "expert_bytes": self.expert_bytes,
            "pair_bytes": self.pair_bytes,
        }


@dataclass(frozen=True)
class MergePlan(Artifact):
    """Which experts of each layer merge, and in which format; what no pair names stays as it is."""

    layers: dict[str, dict[str, Json]]
    """Decoder layer -> `format` (None where nothing merges), `pairs`, `alone`, `damage` of each pair (None: not known)
    in the unit in which layers compare: squared error relative to what the layer gives."""
    model: dict[str, list[int]]
    """Decoder layer -> number of experts, and of the weights of one: tells a plan for another model."""
    budget: dict[str, Json] = field(default_factory=dict)
    """What was `asked`, the bytes that this is, expert bytes `before` and `after`, `formats` to choose from, the sum
    of `damage`, and `damage_with_all_formats` where some were left out; empty for a plan written by hand."""
    protected: dict[str, list[int]] = field(default_factory=dict)
    """Decoder layer -> experts that were not to be merged."""

    def layer(self, number: int) -> dict[str, Json]:
        """Raises InputError for a layer that the plan does not name."""
        if str(number) not in self.layers:
            raise InputError(f"the plan has no layer {number}; it names {', '.join(self.layers)}")
        return self.layers[str(number)]

    def groups(self, number: int) -> Groups:
        """The layer's pairs, with the format that they are to be merged for."""
        layer = self.layer(number)
        return Groups(layer["pairs"], layer["alone"], layer["format"])

    def predicted(self, number: int) -> float | None:
        """The damage of all pairs of a layer; None where that of one is not known."""
        parts = self.layer(number)["damage"]
        return None if any(part is None for part in parts) else sum(parts)

    def facts(self) -> dict[str, Json]:
        return {"layers": self.layers, "budget": self.budget, "protected": self.protected}
