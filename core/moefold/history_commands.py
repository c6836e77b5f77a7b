"""The commands `moefold bench record`, `history` and `compare`: figures kept run by run, and compared."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from moefold.arguments import Device
from moefold.errors import InputError

if TYPE_CHECKING:
    from moefold.history import Record
    from moefold.history_change import Changes

HISTORY = ".jsonl"
"""How the name of a history ends."""

History = Annotated[Path, typer.Argument(metavar="HISTORY.jsonl", help="One line of JSON a run; in the repository.")]
Cases = Annotated[
    str, typer.Option(metavar="NAMES", help="Benchmarks of plugins to measure: 'quality.*', comma between; all.")
]


def add(app: typer.Typer) -> None:
    """Put the commands into `moefold bench`."""
    app.command(
        epilog="""
        Examples:

            moefold bench record history.jsonl

            moefold bench record history.jsonl kernels.json
        """
    )(record)
    app.command(
        epilog="""
        Examples:

            moefold bench compare history.jsonl

            moefold bench compare history.jsonl kernels.json

            moefold bench compare before.json after.json --margin 0.1
        """
    )(compare)
    app.command(epilog="Example: `moefold bench history history.jsonl --html history.html`")(history)


def record(
    to: History,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN...", help="pytest-benchmark's JSON, or what moefold run saved; else measure now."),
    ] = None,
    cases: Cases = "",
    device: Device = "auto",
    commit: Annotated[
        str | None, typer.Option(metavar="ID", help="What was measured, where runs do not say; now: HEAD.")
    ] = None,
) -> None:
    """Append what was measured to a history: runs that are given, or the benchmarks of installed plugins, now."""
    from moefold import history, history_reading
    from moefold.cli import errors, out

    with errors():
        if to.suffix != HISTORY:
            raise InputError(f"{to}: the name of a history ends in {HISTORY}")
        if to.exists():
            history.read(to)  # before minutes are spent
        if runs:
            made = history_reading.joined(history_reading.record(run, commit) for run in runs)
        else:
            made = [_measure(cases, device, commit or _head(to))]
        for one in made:
            history.append(to, one)
            out.print(
                f"{to}: {len(one.figures)} figures of {one.source}, {one.machine}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A history, or a run as JSON.")],
    after: Annotated[
        Path | None, typer.Argument(metavar="AFTER", help="A run; else the benchmarks of plugins, measured now.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(min=0, max=1, help="How much worse, as a part, in place of each figure's margin.")
    ] = None,
    cases: Cases = "",
    device: Device = "auto",
    allow_new: Annotated[
        bool, typer.Option(help="Warn, and do not fail, where the history has no run of this kind of machine.")
    ] = False,
) -> None:
    """Fail (exit code 1) if a figure became worse by more than its margin: against a history, or between two runs."""
    from moefold import benchmarks, history, history_change, history_reading
    from moefold.cli import err, errors
    from moefold_kernels.bench.comparison import MARGIN

    with errors():
        ours = before.suffix != HISTORY and history_reading.is_of_the_layer(before)
        if ours and after is not None and history_reading.is_of_the_layer(after):
            return benchmarks.compare_layers(before, after, MARGIN if margin is None else margin)
        past = history.read(before) if before.suffix == HISTORY else [history_reading.record(before)]
        now = history_reading.record(after) if after else _measure(cases, device, _head(before))
        if allow_new and now.machine not in history.machines(past):
            told = f"warning: {before} has no run on {now.machine}, so nothing was compared; record one"
            return err.print(told, highlight=False, markup=False, soft_wrap=True)
        found = history_change.against(past, now, margin)
        _show(found)
    return _judge(found)


def history(
    source: History,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures.")] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write tables into a page, between its two marker lines.")
    ] = None,
) -> None:
    """Show a history: each figure first, before and last; as a page with pictures, and as tables in a document."""
    from moefold import history, history_page
    from moefold.cli import errors, out
    from moefold.html import write

    with errors():
        records = history.read(source)
        for machine, own in history.machines(records).items():
            table = Table(*history_page.COLUMNS, title=escape(machine), title_justify="left")
            for row in history_page.rows(own):
                table.add_row(*map(escape, row))
            out.print(table)
        if html:
            write(html, history_page.page(records).render())
        if page:
            write(page, history_page.replaced(page, records, source))


def _measure(cases: str, device: str, commit: str | None) -> Record:
    import torch

    from moefold import measuring
    from moefold.cli import err
    from moefold.history import Record
    from moefold.hooks import Registry
    from moefold.session import choose_device
    from moefold_kernels.bench import record

    place = choose_device(device)
    ours = measuring.chosen(cases.replace(",", " ").split(), Registry.installed().benchmarks)
    figures = measuring.measured(ours, place, lambda name: err.print(f"measuring {name}", highlight=False))
    versions = record.machine(torch.device(place))["versions"]
    names = ", ".join(one.name for one in ours)
    return Record(datetime.now(UTC).date().isoformat(), commit, measuring.machine(place), versions, names, figures)


def _head(beside: Path) -> str | None:
    """The commit of the repository that the history lies in, with + where files differ from it; None outside git."""
    git = ["git", "-C", str(beside.absolute().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _show(found: Changes) -> None:
    from moefold.cli import out
    from moefold.history_change import number

    for remark in found.remarks:
        out.print(remark, highlight=False, markup=False, soft_wrap=True)
    table = Table(title="Figures against the history", title_justify="left")
    table.add_column("figure", overflow="fold")
    for name in ("before", "now", "worse by", "allowed"):
        table.add_column(name, justify="right", overflow="fold")
    for one in found.found:
        worse = number(max(0.0, one.after.worse_than(one.before.value)))
        cells = (number(one.before.value), number(one.after.value), worse, number(one.allowed))
        table.add_row(escape(one.name), *cells, style="red" if one.failed else "")
    out.print(table)
    for name in found.new:
        out.print(f"not in the history: {name}", highlight=False, markup=False, soft_wrap=True)
    out.print(
        f"{len(found.found)} figures compared, {len(found.failed)} worse by more than their margins, "
        f"{len(found.gone)} no longer measured, {len(found.new)} new",
        highlight=False,
    )


def _judge(found: Changes) -> None:
    from moefold.cli import err

    told: Sequence[str] = [f"error: {one.told()}" for one in found.failed]
    told = [*told, *(f"error: {name}: is in the history and was not measured now" for name in found.gone)]
    for line in told:
        err.print(line, highlight=False, markup=False, soft_wrap=True)
    if told:
        err.print("mend it, or record the new figures if they are meant", highlight=False)
        raise typer.Exit(1)
