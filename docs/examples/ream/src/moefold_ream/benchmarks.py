"""What the pairs of this plugin cost the model that ships with moefold."""

from __future__ import annotations

from moefold import Figure, Workbench, benchmark

PIPELINE = """\
model: demo
stages:
  - {id: calibration, uses: text.stdlib, with: {part: calibrate, samples: 8, length: 256}}
  - {uses: forward, needs: {text: calibration}}
  - {uses: observe}
  - {uses: saliency.reap}
  - {uses: similarity.ream}
  - {uses: pair.ream}
  - {uses: puzzlemoe}
  - {uses: pack.exponent}
  - {uses: save, with: {to: saved}}
  - {id: unseen, uses: text.stdlib, with: {part: evaluate, samples: 4, length: 256}}
  - {uses: evaluate.baseline, needs: {texts: [unseen]}}
  - {uses: evaluate.perplexity}
"""


@benchmark("quality.ream")
def quality_ream(workbench: Workbench) -> dict[str, Figure]:
    """PuzzleMoE on pairs that REAM chooses."""
    return workbench.quality(PIPELINE)
