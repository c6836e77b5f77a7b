"""Choosing who does the work: a backend says whether it can, and why not; nobody falls back in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moefold_kernels import layout, layout_pairs, reference
from moefold_kernels.errors import BackendError
from moefold_kernels.reference import PackedExperts


@dataclass(frozen=True)
class Need:
    """What a backend is asked to work on; sizes are None where they are not known yet."""

    format: str
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    """Of tokens and activations."""
    hidden: int | None = None
    inner: int | None = None


class Backend(Protocol):
    """The operations on a packed layer; each does what the function of the same name in `reference` defines."""

    @property
    def name(self) -> str:
        """What `--backend` and the report call it."""
        ...

    def can(self, need: Need) -> tuple[bool, str]:
        """Whether it takes this, and why not (or a remark, such as that it is slow)."""
        ...

    def decode(self, words: Tensor, top: int, slot: int) -> Tensor:
        """One slot's bf16 values."""
        ...

    def experts(
        self,
        packed: PackedExperts,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        activate: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The routed experts' output, [token, hidden] float32."""
        ...


@dataclass(frozen=True)
class Reference:
    """Plain torch on any device: always able for the formats there are, and slow."""

    name: str = "reference"

    def can(self, need: Need) -> tuple[bool, str]:
        """Yes, for the formats there are, wherever tensors hold values."""
        formats = (layout.EXPONENT, *layout_pairs.MAGNITUDE_BITS)
        if need.format not in formats:
            return False, f"knows formats {', '.join(formats)}, not {need.format}"
        if need.device.type == "meta":
            return False, "meta tensors hold no values"
        return True, "plain torch: decodes every expert, slow"

    def decode(self, words: Tensor, top: int, slot: int) -> Tensor:
        """What one slot of words reads: bfloat16."""
        return reference.decode(words, top, slot)

    def experts(
        self,
        packed: PackedExperts,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        activate: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The layer's output, [token, hidden] float32, by its definition."""
        return reference.experts(packed, hidden, top_k_index, top_k_weights, activate)


@dataclass(frozen=True)
class Answer:
    """What one backend said."""

    backend: Backend
    able: bool
    reason: str


def ask(need: Need, backends: Iterable[Backend]) -> list[Answer]:
    """Every backend's answer, in the order given (best first)."""
    return [Answer(backend, *backend.can(need)) for backend in backends]


def choose(need: Need, backends: Sequence[Backend], name: str | None = None) -> Backend:
    """The first backend that can, or the one called `name`.

    Raises BackendError with every reason when none can, when `name` cannot, or when there is no such backend.
    """
    answers = ask(need, backends)
    if name is not None:
        answers = [answer for answer in answers if answer.backend.name == name]
        if not answers:
            known = ", ".join(backend.name for backend in backends) or "none"
            raise BackendError(f"there is no backend {name}; there are: {known}")
    for answer in answers:
        if answer.able:
            return answer.backend
    reasons = "".join(f"\n  {answer.backend.name}: {answer.reason}" for answer in answers) or " (no backend given)"
    raise BackendError(f"no backend can work on format {need.format} on {need.device} in {need.dtype}:{reasons}")


def builtin() -> list[Backend]:
    """The backends of this package, best first."""
    from moefold_kernels.triton.backend import Triton  # which knows this module

    return [Triton(), Reference()]
