"""The kernels' part of docs/benchmarks.md, made from stored runs between two marker comments."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from moefold_kernels.bench import plot, published
from moefold_kernels.bench.contenders import BASELINES
from moefold_kernels.bench.published import Published
from moefold_kernels.bench.results import Row, Run, read
from moefold_kernels.errors import BenchmarkError
from moefold_kernels.layout_pairs import MAGNITUDE_BITS

BEGIN = "<!-- kernels: made by `moefold bench page` from stored runs; edits are lost -->"
END = "<!-- end of kernels -->"

SUBJECT = "packed"
"""The contender that the page is about."""

NONE = "-"


def refresh(document: Path, files: Sequence[Path]) -> None:
    """Write the runs, newest first, into the document, and a plot of each into images/ beside it."""
    try:
        before = document.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"{document}: {error.strerror}; name a page that exists") from error
    after = replaced(before, document, files)
    for file in files:
        plot.draw(read(file), image(document, file))
    document.write_text(after, encoding="utf-8")


def replaced(text: str, document: Path, files: Sequence[Path]) -> str:
    """The document's text with its marked part made anew; BenchmarkError where the markers are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BenchmarkError(f"{document}: write these two lines where the tables belong, once: {BEGIN} and {END}")
    runs = sorted(((read(file), file) for file in files), key=lambda pair: (pair[0].date, pair[1].name), reverse=True)
    parts = [_section(run, file, document) for run, file in runs]
    return "\n\n".join([text.partition(BEGIN)[0] + BEGIN, *parts, END + text.partition(END)[2]])


def image(document: Path, file: Path) -> Path:
    """Where a run's plot is kept."""
    return document.parent / "images" / f"{file.stem}.svg"


def _section(run: Run, file: Path, document: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    first = run.rows[0]
    link, picture = _link(file, document), _link(image(document, file), document)
    parts = [
        f"### {run.device}, {run.date}",
        f"{versions}. Measured in the same run: reading {first.read_bandwidth / 1e12:.3g} TB/s, bf16 products "
        f"{first.matmul_rate / 1e12:.3g} TFLOP/s. From [{file.name}]({link}).",
        f"![Time of the layer and speed against its baselines, over tokens]({picture})",
        *_tables(run),
    ]
    if run.device == published.DEVICE:
        parts.append(f"vLLM: {published.SOURCE}. Not of this run, so read its ratio as a size.")
    return "\n\n".join(parts)


def _link(path: Path, document: Path) -> str:
    return Path(os.path.relpath(path, document.parent)).as_posix()


def _tables(run: Run) -> Iterable[str]:
    """One table for each shape, in the order of the run."""
    by_shape: dict[str, list[dict[str, Row]]] = {}
    for rows in run.times().values():
        by_shape.setdefault(next(iter(rows.values())).shape, []).append(rows)
    for shape, cases in by_shape.items():
        with_vllm = shape in published.VLLM and run.device == published.DEVICE
        formats = [name for name in MAGNITUDE_BITS if any(name in rows for rows in cases)]
        lines = [_few_bit(rows, formats, with_vllm) if formats else _line(rows, with_vllm) for rows in cases]
        head = list(lines[0])
        yield "\n".join(
            [f"**{shape}**\n", _cells(head), _cells(["---"] * len(head)), *(_cells(line.values()) for line in lines)]
        )


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _line(rows: dict[str, Row], with_vllm: bool) -> dict[str, str]:
    """A table's line: column -> cell."""
    some, subject = next(iter(rows.values())), rows.get(SUBJECT)
    cells = {
        "tokens": f"{some.tokens}" if some.routing == "balanced" else f"{some.tokens}, {some.routing}",
        "experts hit": f"{some.experts_hit:.4g}",
        "pairs hit": f"{some.pairs_hit:.4g}",
    }
    cells |= {f"{name}, µs": _microseconds(rows.get(name)) for name in (SUBJECT, *BASELINES)}
    found = _published(some) if with_vllm else None
    if with_vllm:
        cells["vLLM, µs"] = f"{found.microseconds:.0f}" if found else NONE
    cells |= {f"{name} / {SUBJECT}": _times(rows.get(name), subject) for name in BASELINES}
    if with_vllm:
        cells[f"vLLM / {SUBJECT}"] = f"{found.microseconds / subject.seconds / 1e6:.2f}×" if found and subject else NONE
    cells["read bandwidth"] = f"{subject.bandwidth_share:.0%}" if subject else NONE
    cells["floor reached, its bound"] = f"{subject.floor_share:.0%}, {subject.bound}" if subject else NONE
    cells["error"] = f"{subject.error:.1e}" if subject else NONE
    return cells


def _few_bit(rows: dict[str, Row], formats: Sequence[str], with_vllm: bool) -> dict[str, str]:
    """A line of a run of the few-bit formats: each beside the 16-bit one, and the published time."""
    some, subject = next(iter(rows.values())), rows.get(SUBJECT)
    cells = {
        "tokens": f"{some.tokens}" if some.routing == "balanced" else f"{some.tokens}, {some.routing}",
        "experts hit": f"{some.experts_hit:.4g}",
    }
    cells |= {f"{name}, µs": _microseconds(rows.get(name)) for name in (SUBJECT, *formats)}
    cells |= {f"{SUBJECT} / {name}": _times(subject, rows.get(name)) for name in formats}
    found = _published(some) if with_vllm else None
    for name in formats if with_vllm else ():
        row = rows.get(name)
        cells[f"vLLM / {name}"] = f"{found.microseconds / row.seconds / 1e6:.2f}×" if found and row else NONE
    cells |= {f"floor reached, {name}": f"{rows[name].floor_share:.0%}" if name in rows else NONE for name in formats}
    cells["largest error"] = f"{max(row.error for row in rows.values()):.1e}"
    return cells


def _published(row: Row) -> Published | None:
    """The published time of as many tokens, if it hit about as many experts."""
    found = published.VLLM[row.shape].get(row.tokens)
    return found if found and row.routing == "balanced" and abs(found.experts_hit - row.experts_hit) < 0.5 else None


def _microseconds(row: Row | None) -> str:
    return f"{row.seconds * 1e6:.4g}" if row else NONE


def _times(baseline: Row | None, subject: Row | None) -> str:
    return f"{baseline.seconds / subject.seconds:.2f}×" if baseline and subject else NONE
