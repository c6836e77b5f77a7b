"""Seconds of one call: CUDA-graph replays between events on a GPU, the wall clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Input = TypeVar("Input")

WARM = 3
"""Calls before anything is captured or timed: kernels are compiled and chosen there."""

ROUND_SECONDS = 4e-3
"""A round lasts at least this long on a GPU, so that launching its first replay (about 10 us) is lost in it."""


class Rounds(Protocol):
    """Something that can be timed again and again; one call of it is one round over all inputs."""

    outputs: list[Tensor]
    """What the last round wrote, one per input; a captured graph writes to these very tensors."""

    def __call__(self) -> float:
        """Run one round; seconds per call of the function."""
        ...


class WallClock:
    """The function on each input in turn, between two readings of the host's clock."""

    def __init__(self, call: Callable[[Input], Tensor], inputs: Sequence[Input]) -> None:
        self._run: Callable[[], list[Tensor]] = lambda: [call(one) for one in inputs]
        self.outputs = self._run()

    def __call__(self) -> float:
        start = time.perf_counter()
        self.outputs = self._run()
        return (time.perf_counter() - start) / len(self.outputs)


class GraphReplays:
    """One CUDA graph that holds a call for each input, replayed; inputs differ, so weights do not come from L2."""

    def __init__(self, call: Callable[[Input], Tensor], inputs: Sequence[Input]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                for one in inputs:
                    call(one)
        torch.cuda.current_stream().wait_stream(stream)
        self._read = call, inputs  # weights and tokens: a graph knows where they lie, and keeps nothing alive
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.outputs = [call(one) for one in inputs]
        self._replays = 1
        self()
        self._replays = max(1, round(ROUND_SECONDS / (self() * len(self.outputs))))

    def __call__(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self._replays / len(self.outputs)


def rounds(device: torch.device, call: Callable[[Input], Tensor], inputs: Sequence[Input]) -> Rounds:
    """The way to time `call` on this device, warm."""
    return GraphReplays(call, inputs) if device.type == "cuda" else WallClock(call, inputs)
