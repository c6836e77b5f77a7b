"""What the device can reach, measured in the same run as the layers: reading memory, and bf16 products."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moefold_kernels.bench.timing import rounds

ROUNDS = 10
REST = 1.0
"""Seconds in which a GPU does nothing afterwards. The product draws all the power it may (700 W of an H200), and the
clock is held down (1080 to 1900 MHz of 1980) for 0.1 to 0.5 s: Qwen3's token took 20 to 25 us then instead of 19.2.
"""


@dataclass(frozen=True)
class Ceilings:
    """Bytes read per second, and bf16 floating-point operations per second."""

    read_bandwidth: float
    matmul_rate: float
    amax_bandwidth: float
    """By torch's `amax` alone, for those who measure reading with what torch has; no floor of ours is of it."""

    def floor(self, read: float, flops: float) -> float:
        """Seconds below which no kernel can come that reads so many bytes and does so many operations."""
        return max(read / self.read_bandwidth, flops / self.matmul_rate)

    def bound(self, read: float, flops: float) -> str:
        """Which of the two it is."""
        return "memory" if read / self.read_bandwidth >= flops / self.matmul_rate else "arithmetic"


def measure(device: torch.device) -> Ceilings:
    """The best of several ways to read random data far larger than any cache, and a large product of random data.

    Then a GPU rests, so that what is timed next has its full clock.
    """
    large = device.type == "cuda"
    source = torch.randint(-(2**31), 2**31 - 1, (1 << (30 if large else 24),), dtype=torch.int32, device=device)
    size = 8192 if large else 512
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = [_seconds(device, read, source) for read in (_amax, *_readers(device))]
    product = _seconds(device, lambda x: x @ b, a)
    if large:
        time.sleep(REST)
    read = source.numel() * source.element_size()
    return Ceilings(read / min(seconds), 2 * size**3 / product, read / seconds[0])


def _amax(source: Tensor) -> Tensor:
    return source.view(torch.float32).amax()


def _readers(device: torch.device) -> list[Callable[[Tensor], Tensor]]:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return []
    from moefold_kernels.bench.reading import readers

    return list(readers(torch.cuda.get_device_properties(device).multi_processor_count))


def _seconds(device: torch.device, call: Callable[[Tensor], Tensor], source: Tensor) -> float:
    once = rounds(device, call, [source])
    return statistics.median(once() for _ in range(ROUNDS))
