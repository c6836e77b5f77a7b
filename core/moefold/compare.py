"""The command `moefold compare`: finished runs in one table, or in several where the terminal is narrow."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from moefold.arguments import AsJson
from moefold.errors import InputError
from moefold.report import size

if TYPE_CHECKING:
    from moefold.comparison import Comparison, Cost, Row

EPILOG = """
    Examples:

        moefold compare out/puzzlemoe out/mergemoe out/reap

        moefold compare out/* --csv methods.csv --html methods.html
    """


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories that moefold saved, or report.json files.")
    ],
    to: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the rows as CSV as well.")] = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with pictures as well.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods at equal bytes: loss, perplexity, expert bytes, seconds, peak memory."""
    from moefold import comparison
    from moefold.cli import err, errors, out

    with errors():
        found = comparison.compare(runs)
        if to:
            _write_csv(found, to)
        if page:
            from moefold import compared_page, html

            html.write(page, compared_page.page(found, runs).render())
        for line in found.warnings:
            err.print(f"[yellow]warning[/]: {escape(line)}", highlight=False, soft_wrap=True)
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2))
        else:
            show(found, out)


_NESTED = ("experts", "losses", "own", "calibration")
Cell = Callable[["Row"], str]
Column = tuple[str, Cell]


def show(found: Comparison, console: Console) -> None:
    """Print the comparison in as few tables as the console's width allows, each with the names of the runs."""
    texts = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in found.texts.items())
    console.print(
        f"{found.model}: rows of equal expert bytes (within 1 %) stand together, the least loss first; loss in nats "
        f"per token on {texts}; seconds and peak memory (host + device) whenever they were spent, also on what is "
        "stored now",
        highlight=False,
        markup=False,
    )
    columns: list[Column] = []
    for part in _parts(found):
        if columns and _width(found, [*columns, *part], console) > console.width:
            console.print(_table(found, columns), "")
            columns = []
        columns += part
    console.print(_table(found, columns))


def _parts(found: Comparison) -> Iterator[list[Column]]:
    """Columns that stay together."""
    yield [
        ("experts", lambda row: row.per_layer),
        ("expert\nbytes", lambda row: size(row.expert_bytes)),
        ("ratio", lambda row: f"{row.ratio:.3f}x"),
        ("bits/\nweight", lambda row: f"{row.bits_per_weight:.2f}"),
    ]
    for text in found.texts:
        yield _of_text(text)
    yield [
        ("own\nseconds", lambda row: f"{row.own.seconds:.1f}" if row.own else "-"),
        ("own\npeak", lambda row: _peak(row.own)),
        ("calibr.\nseconds", lambda row: f"{row.calibration.seconds:.1f}" if row.calibration else "-"),
        ("calibr.\npeak", lambda row: _peak(row.calibration)),
    ]
    yield [("method", lambda row: ("random baseline: " if row.random else "") + row.method)]


def _of_text(text: str) -> list[Column]:
    def increase(row: Row) -> str:
        value = row.losses[text].increase
        return "-" if value is None else f"{value:+.4f}"

    return [
        (f"{text}\nloss".replace(" ", "\n"), lambda row: f"{row.losses[text].loss:.4f}"),
        ("increase", increase),
        ("per-\nplexity", lambda row: f"{row.losses[text].perplexity:.3f}"),
    ]


def _peak(cost: Cost | None) -> str:
    """Host memory, and the device's where there is one."""
    if cost is None or not cost.peak_bytes:
        return "-"
    return size(cost.peak_bytes) + (f" + {size(cost.peak_device_bytes)}" if cost.peak_device_bytes else "")


def _table(found: Comparison, columns: list[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("run", overflow="fold")
    for name, _ in columns:
        justify: JustifyMethod = "left" if name == "method" else "right"
        table.add_column(escape(name), justify=justify, overflow="fold", no_wrap=name != "method")
    group = 0
    for row in (found.uncompressed, *found.rows):
        if row.group != group:
            table.add_section()
            group = row.group
        name = f"{row.run} (random)" if row.random else row.run
        table.add_row(escape(name), *(escape(cell(row)) for _, cell in columns), style="dim" if row.random else "")
    return table


def _width(found: Comparison, columns: list[Column], console: Console) -> int:
    """What a table takes at least, if methods may be folded between words, and nothing else."""
    short = [(name, _longest_word if name == "method" else cell) for name, cell in columns]
    return console.measure(_table(found, short), options=console.options.update(width=10_000)).maximum


def _longest_word(row: Row) -> str:
    return max(row.method.split(), key=len, default="")


def _write_csv(found: Comparison, path: Path) -> None:
    """One line a run, the uncompressed model first; the columns of each text bear its name."""
    lines = []
    for row in (found.uncompressed, *found.rows):
        line = {name: value for name, value in vars(row).items() if name not in _NESTED}
        line |= dict(zip(("experts_before", "experts_after"), row.experts, strict=True))
        for text, loss in row.losses.items():
            line |= {f"{text}_{name}": value for name, value in vars(loss).items()}
        for part, cost in (("own", row.own), ("calibration", row.calibration)):
            line |= {f"{part}_{name}": value for name, value in vars(cost).items()} if cost else {}
        lines.append(line)
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[-1]))
            writer.writeheader()
            writer.writerows(lines)
    except OSError as error:
        raise InputError(f"--csv {path} cannot be written: {error.strerror}; name another file") from error
