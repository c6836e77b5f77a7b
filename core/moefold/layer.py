"""A decoder layer with routed experts, as stages are given it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moefold.artifacts import Experts
from moefold.checkpoint import Checkpoint


@dataclass(frozen=True)
class ExpertNames:
    """Where a layer's routed experts are on disk, in the names of the source files."""

    prefix: str
    matrix: dict[str, str]
    """`gate_proj`, `up_proj`, `down_proj` -> what the files call it per expert (Mixtral: w1, w3, w2)."""
    keys: tuple[str, ...]
    """The tensors that hold the expert weight matrices (not biases)."""
    fused: bool
    """One tensor for all experts on disk (gpt-oss), or one for each."""
    biases: tuple[str, ...] = ()
    """The tensors that hold the experts' biases."""


@dataclass(frozen=True)
class Layer:
    """A decoder layer with routed experts: a handle, nothing is read before it is asked for."""

    checkpoint: Checkpoint
    number: int
    """Of the decoder layer."""
    position: int
    """0, 1, ... among the layers with experts."""

    @property
    def expert_count(self) -> int:
        """How many routed experts it has; reads no weights."""
        return self.checkpoint.skeleton.expert_count(self.number)

    @property
    def router_outputs(self) -> int:
        """Among how many the router chooses: the experts, or more where some were merged."""
        entry = self.checkpoint.entries.get(self.number)
        return self.expert_count if entry is None or entry.route is None else len(entry.route)

    def experts(self, device: str | torch.device = "cpu") -> Experts:
        """The routed experts in canonical order and the dtype of the files; packed ones are decoded.

        Those of a layer saved with merged experts have a `route`.
        """
        return self.checkpoint.skeleton.read_experts(self.number, device)

    def names(self) -> ExpertNames:
        """Where the routed experts are on disk."""
        from moefold.expert_files import expert_names

        return expert_names(self.checkpoint.skeleton, self.number)

    def stored(self, experts: Experts, order: Sequence[int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Other experts, with biases, as the files hold the layer's own; `order[i]` is the one that gets number i."""
        from moefold.expert_files import stored

        return stored(self.checkpoint.skeleton, self.number, experts, order)

    def stored_biases(self, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Other experts' biases alone, as the files hold the layer's own."""
        from moefold.expert_files import stored_biases

        return stored_biases(self.checkpoint.skeleton, self.number, gate_up, down)

    def activate(self, experts: Experts, expert: int, tokens: Tensor) -> Tensor:
        """Hidden activations h_e(x), `[token, inner]`, of one of `experts`, with the family's own gate and biases."""
        return self.checkpoint.skeleton.activate(self.number, experts, expert, tokens)

    def slopes(self, experts: Experts, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """h_e(x) `[token, inner]`, and how it changes with each row of gate and up `[token, rows]`: both float32."""
        return self.checkpoint.skeleton.slopes(self.number, experts, expert, tokens)

    def output(self, experts: Experts, expert: int, tokens: Tensor) -> Tensor:
        """What one of `experts` gives before its gate weight, f_e(x): `[token, hidden]`."""
        bias = None if experts.down_bias is None else experts.down_bias[expert]
        return torch.nn.functional.linear(self.activate(experts, expert, tokens), experts.down[expert], bias)

    def tensor(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Any tensor of the checkpoint by its full name."""
        return self.checkpoint.tensor(name, device)
