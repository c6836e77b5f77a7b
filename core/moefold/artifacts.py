"""The kinds of values that flow between the built-in stages; plugins add their own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from moefold.artifact import Artifact, Json
from moefold.errors import InputError


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
        return {
            "name": self.name,
            "samples": samples,
            "length": length,
            "bytes": self.bytes,
            "digest": digest(self.tokens),
            "sources": self.sources,
        }


@dataclass(frozen=True)
class Experts(Artifact):
    """One layer's routed experts, fused, gate rows before up rows, whatever the family's own order.

    `gate_up` is `[expert, 2 * inner, hidden]` (`[expert, inner, hidden]` when `gated` is false: families with an up
    projection only), `down` is `[expert, hidden, inner]`. `route[i]` is the expert that router output i now means
    (None: expert i), so that merging never edits the router; -1: the output is gone, and so is its router row
    (pruning: the router chooses among the others).
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

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        values: dict[str, Json] = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: Json = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

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
    top_k_index: Tensor  # [token, top_k] int64: router outputs
    top_k_weights: Tensor  # [token, top_k]

    def reaches(self, experts: Experts) -> Tensor:
        """The expert that each of the router's choices means: [token, top_k] int64.

        A token may reach one merged expert twice; its gate weights then add up. Raises InputError for pruned experts,
        among which the router would choose anew.
        """
        if experts.route is None:
            return self.top_k_index
        if bool((experts.route < 0).any()):
            raise InputError("pruned experts change what the router chooses; take figures of the experts before")
        return experts.route.to(self.top_k_index.device)[self.top_k_index]


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
        seen = self.tokens.clamp(min=1).double().to(self.inner_norm.device)
        activation = (self.inner_norm.double().square().sum(dim=1) / seen).sqrt()
        return {
            "tokens": counts,
            "activation": [float(f"{value:.5g}") for value in activation.tolist()],
            "total": self.total,
            "minimum": self.minimum,
            "starved": self.starved,
        }


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
    format: str | None = None
    """The format that pairs are to be merged for, where a plan says so."""
    costs: Tensor | None = field(default=None, compare=False)
    """[expert, expert]: what putting two together was predicted to cost, where the choice was made by that; for the
    report."""

    def all(self) -> list[list[int]]:
        """Every group, those of one expert among them, by its lowest expert; the first named of each comes first."""
        return sorted([*self.members, *([expert] for expert in self.alone)], key=min)

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
class Paired(Artifact):
    """A layer's merged pairs, for a codec to pack: as a recipe (PairMerge), or done (MergedPairs)."""

    def to(self, device: torch.device) -> Self:  # noqa: ARG002  (a recipe's experts lie where they were read)
        """The same with its merged tensors on a device, where there are any."""
        return self


@dataclass(frozen=True)
class PairMerge(Paired):
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
class Baseline(Artifact):
    """Texts, and how well the uncompressed model predicts each of them."""

    losses: dict[str, float]
    """Mean negative log-likelihood, nats per token, by text name."""
    texts: dict[str, Tensor]  # name -> [sample, length] int32
    bytes: dict[str, int]
    samples: dict[str, list[float]] = field(default_factory=dict)
    """The same of each sample by itself, for intervals; every sample of a text has as many tokens."""

    def bits_per_byte(self, name: str, loss: float) -> float | None:
        """A loss in nats per token as bits per UTF-8 byte of that text; None where its bytes are not known."""
        samples, length = self.texts[name].shape
        return loss * samples * (length - 1) / math.log(2) / self.bytes[name] if self.bytes[name] else None

    def facts(self) -> dict[str, Json]:
        digests = {name: digest(tokens) for name, tokens in self.texts.items()}
        return {"losses": self.losses, "bytes": self.bytes, "digests": digests}


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


def digest(tokens: Tensor) -> str:
    """What tells one tokenised text from another: of its shape and its tokens."""
    shape, values = list(tokens.shape), tokens.to("cpu", torch.int32).contiguous()
    return hashlib.sha256(str(shape).encode() + values.numpy().tobytes()).hexdigest()[:16]


def as_index(values: list[int]) -> Tensor:
    """A list of expert numbers as an index tensor."""
    return torch.tensor(values, dtype=torch.int64)
