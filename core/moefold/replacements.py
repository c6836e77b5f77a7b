"""What a checkpoint can have in place of a layer's own experts; `save` writes each kind in its own form."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moefold.artifact import Artifact, Json
from moefold.artifacts import Experts, tensor_bytes


@dataclass(frozen=True)
class Replacement(Artifact):
    """Something that `save` can write in place of one layer's routed experts."""

    def bytes(self) -> int:
        """Bytes of the weight matrices that take the place of the layer's own."""
        raise NotImplementedError


@dataclass(frozen=True)
class Packed(Replacement):
    """One layer in a packed format: words per pair, and the experts left alone as they were."""

    format: str
    pairs: list[list[int]]
    """The two experts of each pair; a position in the inner list is a slot of the format."""
    dense: list[int]
    """The experts left alone, in the order of their rows in `experts`."""
    words: dict[str, Tensor]
    """"gate_proj", "up_proj", "down_proj" -> [pair, rows, columns] int16; in few-bit formats a row's planes and scales
    one after another (moefold_kernels.layout_pairs)."""
    experts: dict[str, Tensor]  # the same names -> [dense expert, rows, columns], source dtype
    settings: dict[str, Json]
    """What decoding needs beside the words, by matrix: for `exponent` the top exponent of the window, for few-bit pairs
    {"levels": [...], "columns": ...}."""
    counts: dict[str, Json]
    """Positions (one word each) by what they hold, over all pairs and matrices: weights, shared, own, other, zero,
    clipped, flushed."""
    route: list[int] | None = None
    """The expert that router output i means, where experts were merged before (None: expert i)."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """`gate_up_bias` and `down_bias` of experts that were merged before or whose neurons are in another order; else the
    source's own stay where they are."""
    pair_counts: dict[str, list[int]] = field(default_factory=dict)
    """`counts` of each pair by itself; empty where all pairs were packed in one pass, which counts them together."""

    def bytes(self) -> int:
        """Bytes of the packed and the dense experts' weights."""
        return sum(t.numel() * t.element_size() for t in (*self.words.values(), *self.experts.values()))

    def facts(self) -> dict[str, Json]:
        return {
            "format": self.format,
            "pairs": self.pairs,
            "dense": self.dense,
            "counts": self.counts,
            "pair_counts": self.pair_counts,
            "settings": self.settings,
            "route": self.route,
            "bytes": self.bytes(),
        }


@dataclass(frozen=True)
class Quantized(Replacement):
    """One layer's experts, each matrix quantised alike in a format of compressed-tensors (moefold.quantized)."""

    scheme: str
    group: int | None
    tensors: dict[str, Tensor]
    """`gate_proj.weight_packed`, `gate_proj.weight_scale` and so on -> [expert, ...]."""
    route: list[int] | None = None
    """The expert that router output i means, where experts were merged before (None: expert i), or pruned (-1)."""
    figures: dict[str, Json] = field(default_factory=dict)
    """What its maker measured, for the report."""

    @property
    def count(self) -> int:
        """How many experts there are."""
        return next(iter(self.tensors.values())).shape[0]

    @property
    def pruned(self) -> bool:
        """Whether router outputs are gone, rather than led to other experts."""
        return self.route is not None and -1 in self.route

    def matrices(self) -> list[str]:
        """The standard names of the weight matrices."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self.tensors))

    def bytes(self) -> int:
        """Bytes of everything that is stored for the matrices: values, scales, shapes."""
        return sum(tensor_bytes(tensor) for tensor in self.tensors.values())

    def facts(self) -> dict[str, Json]:
        return {
            "scheme": self.scheme,
            "group": self.group,
            "experts": self.count,
            "route": self.route,
            "bytes": self.bytes(),
            "figures": self.figures,
        }


@dataclass(frozen=True)
class Reduced(Experts, Replacement):
    """Fewer experts than the router has outputs: merged (`route` says which one an output means) or pruned (-1).

    A kind of `Experts`, for calibrating, merging or packing further; an input takes it only where it is named
    (`needs: {experts: ID}`), because the model's own experts are always there.
    """

    groups: list[list[int]] = field(default_factory=list)
    """Of the experts that its maker was given, those that each expert stands for."""
    figures: dict[str, Json] = field(default_factory=dict)
    """What its maker measured, for the report; `thin`: numbers of experts that were fitted on few tokens."""

    @property
    def pruned(self) -> bool:
        """Whether router outputs are gone, rather than led to other experts."""
        return self.route is not None and bool((self.route < 0).any())

    def bytes(self) -> int:
        return tensor_bytes(self.gate_up) + tensor_bytes(self.down)

    def facts(self) -> dict[str, Json]:
        return {
            "experts": self.count,
            "outputs": None if self.route is None else len(self.route),
            "pruned": self.pruned,
            "groups": self.groups,
            "bytes": self.bytes(),
            "figures": self.figures,
        }


@dataclass(frozen=True)
class Unpacked(Experts):
    """A packed layer's experts as they read: what the next layer is calibrated through."""


@dataclass(frozen=True)
class Aligned(Experts):
    """Experts whose neurons were put in another order, which changes nothing that they compute."""
