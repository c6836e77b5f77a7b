"""What moefold asks this plugin for."""

from __future__ import annotations

from typing import Any

from moefold import Benchmark, Stage, hookimpl
from moefold_ream.benchmarks import quality_ream
from moefold_ream.stages import pair_ream, saliency_reap, similarity_ream


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [saliency_reap, similarity_ream, pair_ream]


@hookimpl
def moefold_benchmarks() -> list[Benchmark]:
    return [quality_ream]
