"""What the device can reach, measured in the same run as the layers: reading memory, and bf16 products."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moefold_kernels.bench.timing import rounds

ROUNDS = 10


@dataclass(frozen=True)
class Ceilings:
    """Bytes read per second, and bf16 floating-point operations per second."""

    read_bandwidth: float
    matmul_rate: float

    def floor(self, read: float, flops: float) -> float:
        """Seconds below which no kernel can come that reads so many bytes and does so many operations."""
        return max(read / self.read_bandwidth, flops / self.matmul_rate)

    def bound(self, read: float, flops: float) -> str:
        """Which of the two it is."""
        return "memory" if read / self.read_bandwidth >= flops / self.matmul_rate else "arithmetic"


def measure(device: torch.device) -> Ceilings:
    """The best of several ways to read random data far larger than any cache, and of a large product of random data."""
    large = device.type == "cuda"
    source = torch.randint(-(2**31), 2**31 - 1, (1 << (30 if large else 24),), dtype=torch.int32, device=device)
    size = 8192 if large else 512
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    fastest = min(_seconds(device, read, source) for read in _readers(device))
    product = _seconds(device, lambda x: x @ b, a)
    return Ceilings(source.numel() * source.element_size() / fastest, 2 * size**3 / product)


def _readers(device: torch.device) -> list[Callable[[Tensor], Tensor]]:
    found: list[Callable[[Tensor], Tensor]] = [lambda x: x.view(torch.float32).amax()]
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from moefold_kernels.bench.reading import readers

        found += readers(torch.cuda.get_device_properties(device).multi_processor_count)
    return found


def _seconds(device: torch.device, call: Callable[[Tensor], Tensor], source: Tensor) -> float:
    once = rounds(device, call, [source])
    return statistics.median(once() for _ in range(ROUNDS))
