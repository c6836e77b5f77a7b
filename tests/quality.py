"""What compression costs the shipped model: variants of one pipeline over one store, and Wanda 2:4 beside them.

`python tests/quality.py` prints the table of docs/methods.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moefold import Activity, Checkpoint
from moefold.artifacts import Metrics
from moefold.executors import InlineExecutor
from moefold.hooks import Registry
from moefold.overrides import Overrides
from moefold.pipeline import load
from moefold.plan import Plan, plan
from moefold.run import Event, run
from moefold.store import Store
from moefold_plugins import demo
from moefold_plugins.evaluate import losses

PIPELINE = """
model: demo
stages:
  - {id: calibration, uses: text.stdlib, with: {part: calibrate, samples: 64, length: 512}}
  - {uses: forward, needs: {text: calibration}}
  - {uses: observe}
  - {id: pairs, uses: PAIR}
  - {uses: puzzlemoe}
  - {uses: pack.exponent}
  - {uses: save, with: {to: OUT}}
  - {id: unseen, uses: text.stdlib, with: {part: evaluate, samples: 64, length: 512}}
  - {id: prose, uses: text.prose, with: {samples: 32, length: 512}}
  - {uses: evaluate.baseline, needs: {texts: [unseen, prose]}}
  - {uses: evaluate.perplexity}
"""


class Bench:
    """Variants of the pipeline over one store: what does not depend on the change is computed once."""

    def __init__(self, folder: Path, model: Path = demo.PATH) -> None:
        self.folder = folder
        self.model = model
        self.store = Store(folder / "store")
        self.registry = Registry.installed()

    def plan(self, pair: str = "pair.random", *settings: str) -> Plan:
        text = PIPELINE
        if pair == "pair.similar":
            text = text.replace("stages:", "stages:\n  - {uses: similarity.weights}")
        if "through" in settings:
            settings, text = (), through_compressed(text)
        text = text.replace("PAIR", pair).replace("OUT", str(self.folder / "out"))
        pipeline = load(text, "quality", self.registry, Overrides(settings=settings))
        checkpoint = Checkpoint.open(str(self.model))
        return plan(pipeline, checkpoint, device="cpu")

    def increase(self, pair: str = "pair.random", *settings: str) -> dict[str, float]:
        """The loss increase, nats per token, on each text."""
        made = self.plan(pair, *settings)
        run(made, self.store, InlineExecutor(), _deaf, device="cpu", registry=self.registry)
        rows = self.store.get(self._key(made, "evaluate.perplexity"), Metrics).rows
        return {row["text"]: row["loss_increase"] for row in rows}

    def wanda(self) -> dict[str, float]:
        """The same for Wanda 2:4 (arXiv 2306.11695): of four inputs the two with the largest |weight| x norm stay."""
        made = self.plan()
        run(made, self.store, InlineExecutor(), _deaf, device="cpu", registry=self.registry)
        rows = {r["text"]: r for r in self.store.get(self._key(made, "evaluate.perplexity"), Metrics).rows}
        activities = {
            t.layer.number: self.store.get(t.key, Activity) for t in made.tasks.values() if t.step == "observe"
        }
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
        for number, activity in activities.items():
            experts = model.model.layers[number].mlp.experts
            inner = experts.down_proj.shape[2]
            for e in range(len(experts.down_proj)):
                for rows_, norm in (
                    (experts.gate_up_proj.data[e, :inner], activity.norm("gate_proj", e)),
                    (experts.gate_up_proj.data[e, inner:], activity.norm("up_proj", e)),
                    (experts.down_proj.data[e], activity.norm("down_proj", e)),
                ):
                    rows_.mul_(two_of_four(rows_.float().abs() * norm))
        model.save_pretrained(self.folder / "wanda")
        texts = {t.name: t.tokens for t in self._texts(made)}
        after = losses(Checkpoint.open(str(self.folder / "wanda")), texts, torch.device("cpu"), 8)
        return {name: after[name] - rows[name]["loss_before"] for name in after}

    def _texts(self, made: Plan):
        from moefold import Text

        return [self.store.get(self._key(made, step), Text) for step in ("unseen", "prose")]

    @staticmethod
    def _key(made: Plan, step: str) -> str:
        return next(task.key for task in made.tasks.values() if task.step == step)


def through_compressed(text: str) -> str:
    """The pipeline in which each layer is calibrated on what the packed layers before it give."""
    for old, new in (
        ("needs: {text: calibration}", "needs: {text: calibration, experts: unpack.exponent}"),
        ("{uses: observe}", "{uses: observe, needs: {experts: model}}"),
        ("{uses: puzzlemoe}", "{uses: puzzlemoe, needs: {experts: model}}"),
        ("- {uses: pack.exponent}", "- {uses: pack.exponent}\n  - {uses: unpack.exponent}"),
    ):
        text = text.replace(old, new)
    return text


def two_of_four(saliency: Tensor) -> Tensor:
    """1 where an entry is among the two largest of its four neighbours in a row, else 0."""
    groups = saliency.view(saliency.shape[0], -1, 4)
    best = groups.topk(2, dim=2).indices
    return torch.zeros_like(groups).scatter_(2, best, 1.0).view_as(saliency)


def _deaf(event: Event) -> None:
    pass


VARIANTS: dict[str, tuple[str, ...]] = {
    "published (random pairs, 0.4, seed 0)": ("pair.random",),
    "seed 1": ("pair.random", "pairs.seed=1"),
    "seed 2": ("pair.random", "pairs.seed=2"),
    "threshold 0": ("pair.random", "puzzlemoe.threshold=0.0"),
    "threshold 0.2": ("pair.random", "puzzlemoe.threshold=0.2"),
    "threshold 0.3": ("pair.random", "puzzlemoe.threshold=0.3"),
    "threshold 0.5": ("pair.random", "puzzlemoe.threshold=0.5"),
    "threshold 0.6": ("pair.random", "puzzlemoe.threshold=0.6"),
    "busy with rare": ("pair.by_usage",),
    "most alike (weights)": ("pair.similar",),
    "calibrated through packed layers": ("pair.random", "through"),
    "half of the experts": ("pair.random", "pairs.fraction=0.5"),
}


if __name__ == "__main__":
    bench = Bench(Path(sys.argv[1]), *map(Path, sys.argv[2:]))
    for name, variant in VARIANTS.items():
        found = bench.increase(*variant)
        print(f"| {name} | " + " | ".join(f"{v:+.4f}" for v in found.values()) + " |", flush=True)
    print("| Wanda 2:4 | " + " | ".join(f"{v:+.4f}" for v in bench.wanda().values()) + " |")
