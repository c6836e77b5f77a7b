"""The kinds of values that flow between the built-in stages; plugins add their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from moefold.artifact import Artifact, Json


@dataclass(frozen=True)
class Text(Artifact):
    """Tokenised text: equal-length samples, ready for a forward pass."""

    name: str
    tokens: Tensor  # [sample, length] int32
    bytes: int = 0
    """UTF-8 bytes of the text that the tokens stand for (0: not known)."""
    sources: list[Json] = field(default_factory=list)
    """Where the text came from and how much of it, for the report."""

    def facts(self) -> dict[str, Json]:
        samples, length = self.tokens.shape
        return {"name": self.name, "samples": samples, "length": length, "bytes": self.bytes, "sources": self.sources}


@dataclass(frozen=True)
class Experts(Artifact):
    """One layer's routed experts, fused, gate rows before up rows, whatever the family's own order.

    `gate_up` is `[expert, 2 * inner, hidden]` (`[expert, inner, hidden]` when `gated` is false: families with an up
    projection only), `down` is `[expert, hidden, inner]`. `route[i]` is the expert that router output i now means
    (None: expert i), so that merging never edits the router.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None  # [expert, 2 * inner]
    down_bias: Tensor | None = None  # [expert, hidden]
    gated: bool = True
    route: Tensor | None = None  # [router output] int64

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.down.shape[0]

    @property
    def inner(self) -> int:
        """The width of an expert's hidden activations."""
        return self.down.shape[2]

    def matrices(self) -> dict[str, Tensor]:
        """The weight matrices by their standard names, as views: `[expert, rows, columns]`."""
        if not self.gated:
            return {"up_proj": self.gate_up, "down_proj": self.down}
        return {
            "gate_proj": self.gate_up[:, : self.inner],
            "up_proj": self.gate_up[:, self.inner :],
            "down_proj": self.down,
        }


@dataclass(frozen=True)
class Routed(Artifact):
    """What entered a layer's experts in calibration, and what entered its decoder layer (to go on from)."""

    layer_input: Tensor  # [sample, length, hidden]
    tokens: Tensor  # [token, hidden]
    top_k_index: Tensor  # [token, top_k] int64
    top_k_weights: Tensor  # [token, top_k]


@dataclass(frozen=True)
class Activity(Artifact):
    """What merging needs to know of calibration, per expert.

    Norms are L2 norms over the tokens routed to an expert, one per input column: of the expert's inputs for gate and
    up, of its hidden activations for down. Experts in `starved` saw fewer than `minimum` tokens; their norms stand
    for `minimum` tokens typical of the whole layer (root mean square over all its tokens, times sqrt(minimum)).
    """

    tokens: Tensor  # [expert] int64: routed tokens
    input_norm: Tensor  # [expert, hidden] float32
    inner_norm: Tensor  # [expert, inner] float32
    total: int = 0
    """Tokens that entered the layer."""
    minimum: int = 0
    starved: list[int] = field(default_factory=list)

    def norm(self, matrix: str, expert: int) -> Tensor:
        """The norm per input column that belongs to `gate_proj`, `up_proj` or `down_proj` of one expert."""
        return self.norms(matrix)[expert]

    def norms(self, matrix: str) -> Tensor:
        """The same of every expert: [expert, columns]."""
        return self.inner_norm if matrix == "down_proj" else self.input_norm

    def facts(self) -> dict[str, Json]:
        counts = self.tokens.tolist()
        return {"tokens": counts, "total": self.total, "minimum": self.minimum, "starved": self.starved}


@dataclass(frozen=True)
class Similarity(Artifact):
    """How alike a layer's experts are: symmetric, larger is more alike."""

    matrix: Tensor  # [expert, expert] float32
    metric: str

    def facts(self) -> dict[str, Json]:
        return {"metric": self.metric}


@dataclass(frozen=True)
class Groups(Artifact):
    """Which experts of a layer go together; `alone` are the experts that stay as they are."""

    members: list[list[int]]
    alone: list[int]

    def facts(self) -> dict[str, Json]:
        return {"members": self.members, "alone": self.alone}


class MergedPair(NamedTuple):
    """Two experts' matrices as one: expert s reads `(-1) ** negative[s] * keep[s] * magnitude`."""

    magnitude: Tensor  # [rows, columns] float32, >= 0
    negative: Tensor  # [2, rows, columns] bool
    keep: Tensor  # [2, rows, columns] bool


@dataclass(frozen=True)
class DualMask:
    """PuzzleMoE's rule, exactly as `moefold_kernels.reference.merge_pair` defines it, with what it needs to know."""

    norms: Mapping[str, Tensor]  # matrix -> [expert, columns] float32
    threshold: float


@dataclass(frozen=True)
class PairMerge(Artifact):
    """A recipe for merged pairs, carried out one matrix at a time, so that no second copy of a layer exists.

    `merge(matrix, pair)` computes one pair's merged matrix; `matrix` is a key of `experts.matrices()` and `pair` an
    index into `pairs`.
    """

    transient: ClassVar[bool] = True
    experts: Experts
    pairs: list[list[int]]
    alone: list[int]
    merge: Callable[[str, int], MergedPair]
    rule: DualMask | None = None
    """Given when `merge` does no more and no less than this: a codec may then merge and encode in one pass."""

    def merged(self, matrix: str) -> Iterator[MergedPair]:
        """One matrix of every pair, in order."""
        return (self.merge(matrix, pair) for pair in range(len(self.pairs)))


@dataclass(frozen=True)
class Packed(Artifact):
    """One layer in a packed format: words per pair, and the experts left alone as they were."""

    format: str
    pairs: list[list[int]]
    """The two experts of each pair; a position in the inner list is a slot of the format."""
    dense: list[int]
    """The experts left alone, in the order of their rows in `experts`."""
    words: dict[str, Tensor]  # "gate_proj", "up_proj", "down_proj" -> [pair, rows, columns] int16
    experts: dict[str, Tensor]  # the same names -> [dense expert, rows, columns], source dtype
    settings: dict[str, Json]
    """What decoding needs beside the words, by matrix; for `exponent`: the top exponent of the window."""
    counts: dict[str, Json]
    """Positions (one word each) by what they hold, over all pairs and matrices: weights, shared, own, other, zero,
    clipped, flushed."""

    def bytes(self) -> int:
        """Bytes of the packed and the dense experts."""
        return sum(t.numel() * t.element_size() for t in (*self.words.values(), *self.experts.values()))

    def facts(self) -> dict[str, Json]:
        return {
            "format": self.format,
            "pairs": self.pairs,
            "dense": self.dense,
            "counts": self.counts,
            "settings": self.settings,
            "bytes": self.bytes(),
        }


@dataclass(frozen=True)
class Baseline(Artifact):
    """Texts, and how well the uncompressed model predicts each of them."""

    losses: dict[str, float]
    """Mean negative log-likelihood, nats per token, by text name."""
    texts: dict[str, Tensor]  # name -> [sample, length] int32
    bytes: dict[str, int]

    def bits_per_byte(self, name: str, loss: float) -> float | None:
        """A loss in nats per token as bits per UTF-8 byte of that text; None where its bytes are not known."""
        samples, length = self.texts[name].shape
        return loss * samples * (length - 1) / math.log(2) / self.bytes[name] if self.bytes[name] else None

    def facts(self) -> dict[str, Json]:
        return {"losses": self.losses, "bytes": self.bytes}


@dataclass(frozen=True)
class Metrics(Artifact):
    """Figures that a stage measured, for the report: a table of rows, and what they are about."""

    title: str
    rows: list[dict[str, Json]]

    def facts(self) -> dict[str, Json]:
        return {"title": self.title, "rows": self.rows}


def tensor_bytes(tensor: Tensor) -> int:
    """The bytes that a tensor's values take."""
    return tensor.numel() * tensor.element_size()


def as_index(values: list[int]) -> Tensor:
    """A list of expert numbers as an index tensor."""
    return torch.tensor(values, dtype=torch.int64)
