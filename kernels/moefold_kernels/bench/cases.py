"""The registry of cases: shapes of real layers, numbers of tokens, and how the tokens are routed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from moefold_kernels import layout, layout_pairs
from moefold_kernels.bench import published
from moefold_kernels.errors import BenchmarkError

T = TypeVar("T")

ROUTINGS = ("balanced", "skewed")
"""Every expert equally popular; or popularity falling as 1 / rank, with ranks drawn anew for each batch."""


@dataclass(frozen=True)
class Shape:
    """One layer's routed experts: how many, hidden and inner size, experts per token."""

    name: str
    experts: int
    hidden: int
    inner: int
    top_k: int

    def __post_init__(self) -> None:
        if self.experts % 2 or not 0 < self.top_k <= self.experts:
            raise BenchmarkError(f"shape {self.name}: write an even number of experts, and 1 <= top_k <= experts")

    @property
    def unit_bytes(self) -> int:
        """What one dense expert, or the words of one pair, take: three matrices of 16-bit values."""
        return 3 * self.hidden * self.inner * 2

    def pair_bytes(self, format: str) -> int:
        """What a pair takes in a format, scales included."""
        if format == layout.EXPONENT:
            return self.unit_bytes
        sizes = ((self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner))
        return sum(layout_pairs.size(format, rows, columns) for rows, columns in sizes)


@dataclass(frozen=True)
class Case:
    """What is to be computed: a layer, a number of tokens, and their routing.

    With `hit` every batch is routed to exactly that many distinct experts (balanced routing only).
    """

    shape: Shape
    tokens: int
    routing: str = "balanced"
    hit: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise BenchmarkError(f"{self.tokens} tokens: write at least 1")
        if self.routing not in ROUTINGS:
            raise unknown("routing", self.routing, ROUTINGS)
        if self.hit is None:
            return
        most = min(self.shape.experts, self.tokens * self.shape.top_k)
        if self.routing != "balanced" or not self.shape.top_k <= self.hit <= most:
            raise BenchmarkError(
                f"{self.shape.name}, {self.tokens} tokens, {self.routing}: {self.hit} experts hit are not possible; "
                f"write {self.shape.top_k} to {most}, and balanced routing"
            )

    @property
    def name(self) -> str:
        """What tables and JSON call it; unique."""
        return f"{self.shape.name}-{self.tokens}-{self.routing}" + (f"-{self.hit}hit" if self.hit else "")

    @property
    def flops(self) -> int:
        """Floating-point operations of the three products, a multiplication and an addition counted as two."""
        return 2 * self.tokens * self.shape.top_k * 3 * self.shape.hidden * self.shape.inner


TINY = Shape("tiny", experts=8, hidden=64, inner=96, top_k=2)
"""For tests on a CPU, and under Triton's interpreter."""

SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("mixtral-8x7b", experts=8, hidden=4096, inner=14336, top_k=2),
        Shape("qwen3-30b-a3b", experts=128, hidden=2048, inner=768, top_k=8),
        Shape("deepseek-moe-16b", experts=64, hidden=2048, inner=1408, top_k=6),
        TINY,
    )
}

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TINY_TOKENS = (1, 16)
SKEWED_TOKENS = (16, 256)


def cases(
    shapes: Iterable[Shape],
    tokens: Iterable[int],
    routing: str = "balanced",
    free: bool = False,
    hit: int | None = None,
) -> list[Case]:
    """Cases of these shapes and tokens: with `hit` experts hit, or else as many as where a published time exists.

    Few random tokens hit a number of experts that varies, and so does the time: a comparison with a published time
    would compare luck. `free` leaves the number to chance.
    """
    return [
        Case(shape, count, routing, hit or (None if free else _published_hit(shape.name, count, routing)))
        for shape in shapes
        for count in tokens
    ]


def _published_hit(shape: str, tokens: int, routing: str) -> int | None:
    found = published.VLLM.get(shape, {}).get(tokens)
    return found.experts_hit if found and routing == "balanced" else None


_LARGE = [shape for shape in SHAPES.values() if shape is not TINY]

CASES: tuple[Case, ...] = (
    *(case for shape in _LARGE for case in (*cases([shape], TOKENS), *cases([shape], SKEWED_TOKENS, routing="skewed"))),
    *cases([TINY], TINY_TOKENS),
    *cases([TINY], TINY_TOKENS[-1:], routing="skewed"),
)
"""What `pytest tests/bench --benchmark-only` and `moefold bench run` measure."""


def find(kind: str, name: str, known: Mapping[str, T]) -> T:
    """The thing of that name, or BenchmarkError with the nearest one."""
    if name not in known:
        raise unknown(kind, name, known)
    return known[name]


def unknown(kind: str, name: str, known: Iterable[str]) -> BenchmarkError:
    """The error for a name that does not exist."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
    return BenchmarkError(f"there is no {kind} {name}; {hint}")
