"""What methods lose on the shipped model with each of three calibrations: the table of docs/methods.md.

`python tests/three_calibrations.py run DIR` measures over one store and keeps figures in
docs/images/three-calibrations.json (what is there already is not run again); `python tests/three_calibrations.py print`
prints the table. A calibration is 128 x 512 tokens of every module, from places of its own (`calibration.seed`), and
random pairs are drawn with the same seed. `--samples 64` takes half the text, of the methods named with `--rows`, and
keeps figures in three-calibrations-64.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import quality
from test_compensated_quality import COMPENSATED, FEW_BITS, GPTQ, TEXTS, random

FIGURES = Path(__file__).parents[1] / "docs" / "images"
SAMPLES = 128
SEEDS = range(3)


class Row(NamedTuple):
    """A method, as quality.Bench runs it."""

    pipeline: str
    pair: str
    bits: float
    """Of an expert's weight, scales counted."""


def few(format: str) -> str:
    return FEW_BITS.replace("FORMAT", format).replace("pack.exponent", f"pack.{format}")


def merged(**options: str) -> str:
    """The compensated merge with options set."""
    told = ", ".join(f"{name}: {value}" for name, value in options.items())
    return COMPENSATED.replace("{uses: puzzlemoe.compensated}", f"{{uses: puzzlemoe.compensated, with: {{{told}}}}}")


VARIATIONS = {
    "down coded once (`together: false`)": {"together": "false"},
    "both experts' errors alike (`weigh: equal`)": {"weigh": "equal"},
    "`blend: 256`": {"blend": "256"},
    "`blend: 4096`": {"blend": "4096"},
    "neurons in their own order (`neurons: natural`)": {"neurons": "natural"},
    "without sweeps": {"sweeps": "0"},
}
"""Of busy with rare, option by option."""

ROWS = {
    "PuzzleMoE as published, random pairs": Row(quality.PIPELINE, "pair.random", 8),
    "GPTQ int3": Row(GPTQ.replace("BITS", "3"), "", 3.5),
    "GPTQ int2": Row(GPTQ.replace("BITS", "2"), "", 2.5),
    "compensated, busy with rare": Row(COMPENSATED, "pair.by_usage", 8),
    "compensated, least predicted error": Row(COMPENSATED, "pair.by_error", 8),
    "pair6, busy with rare": Row(few("pair6"), "pair.by_usage", 3.125),
    "pair6, least predicted error": Row(few("pair6"), "pair.by_error", 3.125),
    "pair4, busy with rare": Row(few("pair4"), "pair.by_usage", 2.125),
    "pair4, least predicted error": Row(few("pair4"), "pair.by_error", 2.125),
    "compensated, the published rule's random pairs": Row(COMPENSATED, "pair.random", 8),
    "GPTQ int4": Row(GPTQ.replace("BITS", "4"), "", 4.5),
    **{f"busy with rare, {name}": Row(merged(**options), "pair.by_usage", 8) for name, options in VARIATIONS.items()},
}


def file_of(samples: int) -> Path:
    return FIGURES / f"three-calibrations{f'-{samples}' * (samples != SAMPLES)}.json"


def run(folder: Path, samples: int, rows: Sequence[str]) -> None:
    """Measure what is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    bench, file = quality.Bench(folder), file_of(samples)
    found = json.loads(file.read_text()) if file.is_file() else {"increase": {}}
    for name, row in ((name, ROWS[name]) for name in rows):
        known = found["increase"].setdefault(name, {})
        for seed in SEEDS:
            if str(seed) in known:
                continue
            quality.PIPELINE = row.pipeline
            settings = random(seed) if row.pair == "pair.random" else (f"calibration.seed={seed}",)
            settings = *settings, f"calibration.samples={samples}"
            known[str(seed)] = {text: round(loss, 6) for text, loss in bench.increase(row.pair, *settings).items()}
            found["measured"] = datetime.date.today().isoformat()
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(name, seed, known[str(seed)], flush=True)


def table(samples: int) -> str:
    """Of each text the mean and, in brackets, each calibration's; and the share of the published rule's mean."""
    found = json.loads(file_of(samples).read_text())["increase"]
    lines = ["| | bits per weight | unseen modules | share | prose | share |", "|---|---|---|---|---|---|"]
    base = {text: mean(one[text] for one in found[next(iter(ROWS))].values()) for text in TEXTS}
    for name, row in ROWS.items():
        if len(found.get(name, {})) < len(SEEDS):
            continue
        cells = []
        for text in TEXTS:
            each = [found[name][str(seed)][text] for seed in SEEDS]
            told = " / ".join(f"{one:.4f}".replace("0.", ".", 1) for one in each)
            middle = f"{mean(each):+.4f}".replace("0.", ".", 1)
            cells += [f"{middle} ({told})", f"{mean(each) / base[text]:.2f}"]
        lines.append(f"| {name} | {row.bits:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "print"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    args = parser.parse_args()
    if args.what == "run":
        run(args.folder, args.samples, args.rows)
    else:
        print(table(args.samples))
