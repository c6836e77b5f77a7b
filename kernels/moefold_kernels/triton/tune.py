"""Measures plans on the device at hand; what serves never does, it looks up what this has written.

For each number of tokens every candidate of either projection is compiled ahead, then timed alone, and the best few of
each together as a whole layer: what one leaves in L2 the other may use. The winner has to be right, and not slower
than the plan that the shape had, measured in turns with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from moefold_kernels import layout
from moefold_kernels.backend import Need
from moefold_kernels.bench import ceilings, record, timing
from moefold_kernels.bench.cases import Shape
from moefold_kernels.bench.weights import random_experts
from moefold_kernels.errors import BenchmarkError
from moefold_kernels.places import tables
from moefold_kernels.reference import PackedExperts
from moefold_kernels.reference_pairs import LeveledExperts
from moefold_kernels.triton import compilation, configs
from moefold_kernels.triton.backend import Triton, leveled
from moefold_kernels.triton.compilation import Compiler
from moefold_kernels.triton.plans import Plan
from moefold_kernels.triton.search import Found, Ground, Search, Timer
from moefold_kernels.triton.weights import Projections, Weights

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096)
"""What is tuned if nothing else is asked for: every regime of a common model."""


@dataclass
class Tuner:
    """Tunes one layer's shape on one device, packed or dense."""

    shape: Shape
    device: torch.device
    dense: bool = False
    format: str = layout.EXPONENT
    """Of pairs."""
    workers: int | None = None
    """Processes that compile; by default as many as cores and memory allow."""
    seconds: float = float("inf")
    """How long compiling and timing tiles may take; a number of tokens that it is too short for is left out."""
    progress: Callable[[str, int, int], None] = lambda *_: None
    """Told what is going on, how much of it is done, and of how much."""
    timer: Timer | None = None
    """By default CUDA-graph replays."""
    read_bandwidth: float = 0.0
    """Bytes per second, measured in the same run."""

    def run(self, tokens: Iterable[int]) -> Iterator[Found]:
        """The plans for these numbers of tokens, as they are found; those that time was too short for are missing.

        Raises BenchmarkError when the device cannot run the layer or hold it, and WrongResultError when no plan is
        right.
        """
        deadline = time.monotonic() + self.seconds
        able, why = Triton(interpret=True).can(Need(self.format, self.device))
        if not able:
            raise BenchmarkError(f"cannot tune on {self.device}: {why}")
        try:
            if self.seconds > 0:
                yield from self._all(list(dict.fromkeys(tokens)), deadline)
        except torch.OutOfMemoryError as error:
            raise BenchmarkError(
                f"{self.shape.name} and what is made around it do not fit the free memory of {self.device}; free some, "
                "or tune for fewer tokens, or for fewer experts: the nearest shape's plans are taken"
            ) from error

    def _all(self, counts: list[int], deadline: float) -> Iterator[Found]:
        self.progress("making weights, measuring bandwidth", 0, 1)
        self.read_bandwidth = ceilings.measure(self.device).read_bandwidth
        generator = torch.Generator(self.device).manual_seed(0)
        experts, weights = _layer(self.shape, self.dense, generator, self.format)
        number = self.workers
        if number is None:
            number = compilation.workers(self.shape, max(counts), self.device, self.format)
        timer: Timer = self.timer or (lambda _plan, _part, call, inputs: timing.rounds(self.device, call, inputs))
        with Compiler(number) as compiler:
            ground = Ground(
                self.shape, self.device, self.dense, experts, weights, compiler, timer, self.progress, deadline
            )
            for count in counts:
                found = Search(ground, count).run() if time.monotonic() < deadline else None
                if found:
                    yield found


def entry(found: Found) -> tuple[configs.Shape, Plan, dict[str, Any]]:
    """What `configs.write_table` takes."""
    return found.shape, found.plan, {"us": round(found.seconds * 1e6, 1)}


def about(device: torch.device) -> dict[str, Any]:
    """What a table says of itself."""
    machine = record.machine(device)
    versions = {name: machine["versions"][name] for name in ("torch", "triton")}
    method = {"us": "one layer, median of CUDA-graph replays, balanced random routing"}
    found: dict[str, Any] = {"device": machine["device"], "date": time.strftime("%Y-%m-%d")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"capability": [properties.major, properties.minor], "processors": properties.multi_processor_count}
    return found | versions | method


def table_name(device: torch.device) -> str:
    """The name of the file that holds a device's plans."""
    return configs.table_name(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


def _layer(
    shape: Shape, dense: bool, generator: torch.Generator, format: str = layout.EXPONENT
) -> tuple[PackedExperts, Weights]:
    """Random experts, and what the kernels take of them; gate and up lie in one tensor, as in a model."""
    made = random_experts(shape, generator, layout.EXPONENT if dense else format)
    if isinstance(made, LeveledExperts):
        places, placed = (one.to(generator.device) for one in tables(made.pairs, ()))
        return made, Weights(leveled(made), None, places, placed)
    words = dict(made.words)
    wide = torch.cat([words.pop("gate_proj"), words.pop("up_proj")], dim=1)
    gate, up = wide[:, : shape.inner], wide[:, shape.inner :]
    experts = replace(made, words=words | {"gate_proj": gate, "up_proj": up})
    if not dense:
        places, placed = (one.to(generator.device) for one in tables(made.pairs, ()))
        tops = made.window["gate_proj"], made.window["up_proj"], made.window["down_proj"]
        return experts, Weights(Projections(gate, up, words["down_proj"], tops), None, places, placed)
    places = torch.arange(shape.experts, dtype=torch.int32, device=generator.device)
    wide = torch.cat([experts.unpacked("gate_proj"), experts.unpacked("up_proj")], dim=1)
    matrices = Projections(wide[:, : shape.inner], wide[:, shape.inner :], experts.unpacked("down_proj"))
    return experts, Weights(None, matrices, places, places)
