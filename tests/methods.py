"""Every method on the shipped model, at equal bytes and from one calibration: the tables of docs/methods.md.

`python tests/methods.py DIR` runs shipped pipelines over one store and prints the comparison as Markdown;
`python tests/methods.py DIR --curve` compares merges fitted on 4 to 256 calibration samples; `--model` takes another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from moefold import shipped
from moefold.comparison import Row, compare
from moefold.session import Session

TEXTS = """
  - {id: unseen, uses: text.stdlib, with: {part: evaluate, samples: 32, length: 512}}
  - {id: prose, uses: text.prose, with: {samples: 32, length: 512}}
  - {uses: evaluate.baseline, needs: {texts: [unseen, prose]}}
  - {uses: evaluate.perplexity}
"""
QUANTIZED = (
    "model: demo\nstages:\n  - {uses: quantize, with: {scheme: SCHEME}}\n  - {uses: save, with: {to: out}}" + TEXTS
)
RANDOM = """\
model: demo
stages:
  - {uses: group.random}
  - {uses: average}
  - {uses: save, with: {to: out}}
""" + TEXTS.lstrip("\n")
PRUNED = """\
model: demo
stages:
  - {id: calibration, uses: text.stdlib, with: {part: calibrate, samples: 128, length: 512}}
  - {uses: forward, needs: {text: calibration}}
  - {uses: observe}
  - {uses: prune.by_use}
  - {uses: save, with: {to: out}}
""" + TEXTS.lstrip("\n")


def through(pipeline: str) -> str:
    """A shipped pipeline in which every layer is calibrated through the merged layers before it."""
    text = shipped.find(pipeline).read_text()
    return text.replace("needs: {text: calibration}", "needs: {text: calibration, experts: mergemoe}")


def variants(remain: float) -> dict[str, tuple[str, ...]]:
    """Name -> pipeline (a shipped one's name, or YAML) and what is set in it, for a share of experts that remains."""
    group, prune = f"group.by_use.fraction={remain}", f"fraction={remain}"
    return {
        "random groups, averaged": (RANDOM, f"group.random.fraction={remain}"),
        "average of alike experts": ("average", group),
        "M-SMoE": ("msmoe", group),
        "HC-SMoE": ("hcsmoe", f"group.hierarchical.fraction={remain}"),
        "MergeMoE as published": ("mergemoe-published", group),
        "MergeMoE routed, published groups": (
            "mergemoe-published", group, "mergemoe.target=routed", "mergemoe.ridge=auto", "mergemoe.anchor=average",
        ),
        "MergeMoE routed (pipeline mergemoe)": ("mergemoe", group),
        "– calibrated through merged layers": (through("mergemoe"), group),
        "random experts dropped": (PRUNED.replace("prune.by_use", "prune.random"), f"prune.random.{prune}"),
        "pruned by use": (PRUNED, f"prune.by_use.{prune}"),
        "pruned by REAP": ("reap", f"prune.reap.{prune}"),
    }  # fmt: skip


def others() -> dict[str, tuple[str, ...]]:
    """What has a size of its own."""
    same = ("calibration.length=512", "unseen.length=512", "prose.length=512")
    return {
        "PuzzleMoE as published": ("puzzlemoe", *same),
        "fp8": (QUANTIZED.replace("SCHEME", "fp8"),),
        "int8": (QUANTIZED.replace("SCHEME", "int8"),),
        "int4, groups of 64": (QUANTIZED.replace("SCHEME", "int4, group: 64"),),
        "MergeMoE half, then PuzzleMoE pairs": ("mergemoe-puzzlemoe",),
        "MergeMoE half, then fp8": ("mergemoe-int4", "quantize.scheme=fp8", "quantize.group=null"),
        "MergeMoE half, then int4": ("mergemoe-int4",),
    }


class Table:
    """Runs over one store; every run leaves its report in the directory that it saves."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model, self.console = folder, model, Console(stderr=True, quiet=True)

    def run(self, name: str, pipeline: str, *settings: str) -> Path:
        """The saved directory."""
        out = self.folder / "out" / name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")
        file = self.folder / "pipeline.yaml"
        if "\n" in pipeline:
            file.write_text(pipeline)
        place = str(file) if "\n" in pipeline else str(shipped.find(pipeline))
        opened = Session.open(place, self.model, None, str(out), settings, self.folder / "store", "auto")
        keep = ["forward"] if "forward" in opened.plan.pipeline.steps else []
        opened.run("inline", 1, self.console, keep)
        return out

    def rows(self, chosen: dict[str, tuple[str, ...]]) -> dict[str, Row]:
        """Each run's row of the comparison, by its name."""
        places = {name: self.run(name, *variant) for name, variant in chosen.items()}
        return {name: compare([place]).rows[0] for name, place in places.items()}


def line(name: str, row: Row) -> str:
    losses = " | ".join(f"{loss.increase:+.4f}" for loss in row.losses.values())
    own = f"{row.own.seconds:.1f}" if row.own else "-"
    return f"| {name} | {row.per_layer} | {row.bits_per_weight:.2f} | {losses} | {own} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--curve", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    table = Table(args.folder, args.model)
    if args.curve:
        for samples in (4, 8, 16, 32, 64, 128, 256):
            cut = f"calibration.samples={samples}"
            for name, pipeline in (("published", "mergemoe-published"), ("routed", "mergemoe"), ("M-SMoE", "msmoe")):
                row = table.rows({f"{name} {samples}": (pipeline, cut)})[f"{name} {samples}"]
                print(line(f"{name}, {samples} samples", row), flush=True)
        return
    for heading, chosen in (("25 % fewer", variants(0.75)), ("half", variants(0.5)), ("other", others())):
        print(f"\n{heading}", flush=True)
        for name, variant in chosen.items():
            named = name if heading != "25 % fewer" else f"{name} 25"
            print(line(name, table.rows({named: variant})[named]), flush=True)


if __name__ == "__main__":
    main()
