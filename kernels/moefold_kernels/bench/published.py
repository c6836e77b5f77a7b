"""Times that others reached, measured elsewhere than in our runs: shown beside ours, never compared by a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """One figure: microseconds for the whole layer, and how many distinct experts its tokens were routed to."""

    microseconds: float
    experts_hit: int


SOURCE = (
    "vLLM 0.26.0's Triton kernel (fused_moe) with its own tuned configurations for the H200, bf16, whole layer with "
    "routing work; one NVIDIA H200, torch 2.11.0, triton 3.6.0, CUDA-graph replays on random data, in a call of its own"
)

DEVICE = "NVIDIA H200"

VLLM: Mapping[str, Mapping[int, Published]] = {
    "mixtral-8x7b": {
        1: Published(191, 2),
        2: Published(283, 3),
        4: Published(349, 4),
        8: Published(646, 8),
        16: Published(661, 8),
        32: Published(680, 8),
        64: Published(673, 8),
        128: Published(677, 8),
        256: Published(750, 8),
        512: Published(969, 8),
        1024: Published(1674, 8),
        4096: Published(5435, 8),
    },
    "qwen3-30b-a3b": {
        1: Published(40, 8),
        2: Published(56, 15),
        4: Published(88, 29),
        8: Published(146, 55),
        16: Published(216, 85),
        32: Published(258, 105),
        64: Published(312, 127),
        128: Published(308, 128),
        256: Published(337, 128),
        512: Published(338, 128),
        1024: Published(400, 128),
        4096: Published(807, 128),
    },
}
"""Shape, then tokens."""
