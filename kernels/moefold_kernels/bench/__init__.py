"""Benchmarks of the routed experts' layer: one registry of cases, one timing core, results to compare and to show.

Needs torch only; triton and transformers are imported by the contenders that use them, matplotlib by the plot.
"""

from moefold_kernels.bench.cases import CASES, SHAPES, TINY, TINY_TOKENS, TOKENS, Case, Shape, cases, find
from moefold_kernels.bench.contenders import CONTENDERS, Contender
from moefold_kernels.bench.measure import ROUNDS, Bench, Prepared

__all__ = [
    "CASES",
    "CONTENDERS",
    "ROUNDS",
    "SHAPES",
    "TINY",
    "TINY_TOKENS",
    "TOKENS",
    "Bench",
    "Case",
    "Contender",
    "Prepared",
    "Shape",
    "cases",
    "find",
]
