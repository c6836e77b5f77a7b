"""The kernel as a backend: whether it can, and why not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefold_kernels import Need, PackedExperts
from moefold_log8.codec import Log8


@dataclass(frozen=True)
class Log8Triton:
    """Decodes log8 in Triton, one matrix of one expert at a time, and leaves the products to torch."""

    name: str = "log8-triton"

    def can(self, need: Need) -> tuple[bool, str]:
        if need.format != Log8.name:
            return False, f"knows format {Log8.name} only, not {need.format}"
        if importlib.util.find_spec("triton") is None:
            return False, "triton is not installed"
        if need.device.type == "cuda":
            return True, "decodes in Triton, then one product per expert"
        if need.device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            return True, "Triton's interpreter, for tests"
        return False, f"compiles for CUDA devices, not for {need.device.type}"

    def decode(self, words: Tensor, top: Any, slot: int) -> Tensor:
        from moefold_log8.kernel import decode  # triton is imported when it is asked for

        return decode(words, top["largest"], top["columns"], slot).bfloat16()

    def experts(
        self,
        packed: PackedExperts,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        activate: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Expert by expert: no more than three decoded matrices at a time."""
        places = {expert: (pair, slot) for pair, both in enumerate(packed.pairs) for slot, expert in enumerate(both)}
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for expert in range(len(places) + len(packed.alone)):
            token, choice = torch.where(top_k_index == expert)
            if not len(token):
                continue

            def weight(name: str, expert: int = expert) -> Tensor:
                if expert not in places:
                    return packed.dense[name][list(packed.alone).index(expert)].float()
                pair, slot = places[expert]
                return self.decode(packed.words[name][pair], packed.window[name], slot).float()

            x = hidden[token].float()
            inner = activate(x @ weight("gate_proj").T, x @ weight("up_proj").T).to(hidden.dtype).float()
            gates = top_k_weights[token, choice].float()[:, None]
            out.index_add_(0, token, inner @ weight("down_proj").T * gates)
        return out
