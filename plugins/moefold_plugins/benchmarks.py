"""What a few methods cost the shipped model: small samples, so that each takes seconds on two cores.

Texts are of whole documents (`spread: false`), as in histories since the first run.
"""

from __future__ import annotations

from moefold import Benchmark, Figure, Workbench, benchmark, hookimpl

_HEAD = """\
model: demo
stages:
  - {id: calibration, uses: text.stdlib, with: {part: calibrate, samples: 16, length: 512, spread: false}}
  - {uses: forward, needs: {text: calibration}}
  - {uses: observe}
"""
_END = """\
  - {uses: save, with: {to: saved}}
  - {id: unseen, uses: text.stdlib, with: {part: evaluate, samples: 8, length: 512, spread: false}}
  - {id: prose, uses: text.prose, with: {samples: 8, length: 512, spread: false}}
  - {uses: evaluate.baseline, needs: {texts: [unseen, prose]}}
  - {uses: evaluate.perplexity}
"""


def _calibrated(stages: str) -> str:
    return _HEAD + stages + _END


@benchmark("quality.int4")
def int4(workbench: Workbench) -> dict[str, Figure]:
    """Experts in four bits, in groups of 64."""
    return workbench.quality(f"model: demo\nstages:\n  - {{uses: quantize, with: {{scheme: int4, group: 64}}}}\n{_END}")


@benchmark("quality.puzzlemoe")
def puzzlemoe(workbench: Workbench) -> dict[str, Figure]:
    """Random pairs, merged and packed as published."""
    return workbench.quality(_calibrated("  - uses: pair.random\n  - uses: puzzlemoe\n  - uses: pack.exponent\n"))


@benchmark("quality.compensated")
def compensated(workbench: Workbench) -> dict[str, Figure]:
    """Pairs chosen by predicted error, whose errors are made up for column by column, packed."""
    stages = "  - uses: pair.by_error\n  - uses: puzzlemoe.compensated\n  - uses: pack.exponent\n"
    return workbench.quality(_calibrated(stages))


def _few_bits(format: str) -> str:
    return _calibrated(
        "  - uses: pair.by_usage\n  - uses: levels\n"
        f"  - {{uses: puzzlemoe.compensated, with: {{format: {format}}}}}\n  - uses: pack.{format}\n"
    )


@benchmark("quality.pair6")
def pair6(workbench: Workbench) -> dict[str, Figure]:
    """Busy experts with rare ones, errors made up for, three bits a weight."""
    return workbench.quality(_few_bits("pair6"))


@benchmark("quality.pair4")
def pair4(workbench: Workbench) -> dict[str, Figure]:
    """The same in two bits a weight."""
    return workbench.quality(_few_bits("pair4"))


@benchmark("quality.budget")
def budget(workbench: Workbench) -> dict[str, Figure]:
    """Three quarters of the bytes: the pairs whose merging is predicted to cost least, over all layers."""
    stages = """\
  - uses: levels
  - {uses: damage.pairs, needs: {text: calibration}}
  - {uses: plan.budget, with: {budget: 0.75}}
  - uses: pair.planned
  - uses: puzzlemoe.compensated
  - uses: pack.planned
"""
    return workbench.quality(_calibrated(stages))


@benchmark("quality.gptq")
def gptq(workbench: Workbench) -> dict[str, Figure]:
    """Experts in four bits, in groups of 64, by GPTQ."""
    return workbench.quality(_calibrated("  - {uses: quantize.gptq, with: {scheme: int4, group: 64}}\n"))


@benchmark("quality.mergemoe")
def mergemoe(workbench: Workbench) -> dict[str, Figure]:
    """Half of the experts, fitted to what each token's own experts gave."""
    stages = """\
  - uses: similarity.gated_outputs
  - uses: group.by_use
  - uses: align
  - {uses: mergemoe, needs: {experts: align}}
"""
    return workbench.quality(_calibrated(stages))


@benchmark("quality.msmoe")
def msmoe(workbench: Workbench) -> dict[str, Figure]:
    """Half of the experts, averaged by use."""
    stages = """\
  - uses: similarity.router
  - uses: group.by_use
  - uses: align
  - {uses: msmoe, needs: {experts: align}}
"""
    return workbench.quality(_calibrated(stages))


@benchmark("quality.reap")
def reap(workbench: Workbench) -> dict[str, Figure]:
    """Half of the experts, the others dropped by REAP's saliency."""
    return workbench.quality(_calibrated("  - uses: prune.reap\n"))


@hookimpl
def moefold_benchmarks() -> list[Benchmark]:
    return [int4, gptq, puzzlemoe, compensated, pair6, pair4, budget, mergemoe, msmoe, reap]
