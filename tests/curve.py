"""Loss against bits on the shipped model: every pair format, budgets, quantisation and the published merge.

GPTQ with a zero beside each scale, and round to nearest in 3 and 2 bits, are references without a form on disk; `GPTQ,
as stored` is symmetric, in compressed-tensors' form.

`python tests/curve.py run DIR` runs them over one store and keeps figures in docs/images/loss-against-bits.json (what
is there already is not run again); `python tests/curve.py draw` prints the table of docs/methods.md and draws it.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from methods import QUANTIZED, TEXTS, Table
from moefold import shipped

IMAGES = Path(__file__).parents[1] / "docs" / "images"
FIGURES, PICTURE = IMAGES / "loss-against-bits.json", IMAGES / "loss-against-bits.svg"
GPTQ = """\
model: demo
stages:
  - {id: calibration, uses: text.stdlib, with: {part: calibrate, samples: 128, length: 512}}
  - {uses: forward, needs: {text: calibration}}
  - {uses: gptq}
  - {uses: save, needs: {experts: gptq}, with: {to: out}}
""" + TEXTS.lstrip("\n")
SHORT = ("calibration.length=512", "unseen.length=512", "prose.length=512")
EVERY = "budget.formats=[exponent, pair8, pair6, pair5, pair4]"
BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.35, 0.25, 0.15)

Point = dict[str, Any]


def points() -> dict[str, dict[str, tuple[str, ...]]]:
    """Series -> name -> pipeline (a shipped one's name, or YAML), and what is set in it."""
    few = shipped.find("pair4").read_text()
    return {
        "GPTQ": {f"int{bits}": (GPTQ, f"gptq.bits={bits}") for bits in (4, 3, 2)},
        "PuzzleMoE as published": {"random pairs": ("puzzlemoe", *SHORT)},
        "budget": {f"{share:g}": ("budget", f"budget.budget={share}") for share in BUDGETS},
        "compensated, one format": {"exponent": ("compensated",)}
        | {name: (few.replace("pair4", name),) for name in ("pair8", "pair6", "pair5", "pair4")},
        "round to nearest": {
            "fp8": (QUANTIZED.replace("SCHEME", "fp8"),),
            "int4": (QUANTIZED.replace("SCHEME", "int4, group: 64"),),
        }
        | {f"int{bits}": (GPTQ, f"gptq.bits={bits}", "gptq.compensate=false") for bits in (3, 2)},
        "GPTQ, as stored": {"int4": ("gptq-int4",)},
        "budget, any format": {f"{share:g}": ("budget", f"budget.budget={share}", EVERY) for share in BUDGETS},
    }


def run(folder: Path) -> None:
    """Measure what is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(folder, "demo")
    found = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {"points": []}
    done = {(point["series"], point["name"]) for point in found["points"]}
    for series, variants in points().items():
        for name, variant in variants.items():
            if (series, name) in done:
                continue
            row = table.rows({f"{series} {name}": variant})[f"{series} {name}"]
            dense = variant[0] == GPTQ  # on disk: a reference
            bits = int(name[3:]) + 32 / 64 if dense else row.bits_per_weight
            losses = {text: round(loss.increase, 6) for text, loss in row.losses.items()}
            found["points"].append({"series": series, "name": name, "bits": round(bits, 4), "increase": losses})
            found["measured"] = datetime.date.today().isoformat()
            FIGURES.write_text(json.dumps(found, indent=1) + "\n")
            print(found["points"][-1], flush=True)


def draw() -> None:
    """Print the table, and write the picture."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moefold"  # the same figures give the same file
    from matplotlib import pyplot

    found = json.loads(FIGURES.read_text())["points"]
    for point in sorted(found, key=lambda p: -p["bits"]):
        losses = " | ".join(f"{value:+.4f}" for value in point["increase"].values())
        print(f"| {point['series']}: {point['name']} | {point['bits']:.2f} | {losses} |")
    texts = list(found[0]["increase"])
    figure, axes = pyplot.subplots(1, len(texts), figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, text in zip(axes, texts, strict=True):
        for number, series in enumerate(dict.fromkeys(point["series"] for point in found)):
            _series(axis, [p for p in found if p["series"] == series], text, number, series)
        axis.set(xscale="log", yscale="log", xlabel="bits per expert weight, scales counted", title=text)
        axis.set_xticks([2, 3, 4, 6, 8, 12, 16], labels=["2", "3", "4", "6", "8", "12", "16"])
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("increase of the loss, nats per token")
    axes[0].legend(fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None})


def _series(axis: Any, found: list[Point], text: str, number: int, label: str) -> None:
    chosen = sorted((p["bits"], p["increase"][text]) for p in found if p["increase"][text] > 0)
    style = {"budget": "-", "budget, any format": "-"}.get(label, "--" if len(chosen) > 2 else "none")
    marks: dict[str, Any] = {"marker": "osD^vPX"[number], "markersize": 5, "linewidth": 1.2}
    axis.plot(*zip(*chosen, strict=True), linestyle=style, label=label, **marks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("folder", type=Path, nargs="?")
    args = parser.parse_args()
    if args.what == "run":
        run(args.folder)
    else:
        draw()
