"""The commands `moefold bench run` and `page`, and how two runs of the kernels are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from moefold import history_commands
from moefold.arguments import Device
from moefold.errors import InputError, MoefoldError

if TYPE_CHECKING:
    import torch

    from moefold_kernels.bench import Case, Contender
    from moefold_kernels.bench.comparison import Comparison

app = typer.Typer(
    no_args_is_help=True, help="Time the kernels, keep a history of figures, fail on a drop, write pages."
)


@contextmanager
def _errors() -> Iterator[None]:
    """The kernels' errors as ours, and ours as the command line shows them."""
    from moefold.cli import errors
    from moefold_kernels.errors import BenchmarkError

    with errors():
        try:
            yield
        except BenchmarkError as error:
            raise InputError(str(error)) from error


@app.command(
    epilog="""
    Examples:

        moefold bench run --shapes qwen3-30b-a3b --tokens 1,16,256 --json new.json

        moefold bench run --shapes tiny
    """
)
def run(
    shapes: Annotated[
        str, typer.Option(metavar="NAMES", help="Comma between them; all if left out (tiny where there is no GPU).")
    ] = "",
    tokens: Annotated[
        str, typer.Option(metavar="COUNTS", help="Comma between them; the shape's own if left out.")
    ] = "",
    contenders: Annotated[str, typer.Option(metavar="NAMES", help="All that can run here if left out.")] = "",
    routing: Annotated[str, typer.Option(metavar="balanced|skewed", help="How popular experts are.")] = "balanced",
    hit: Annotated[int | None, typer.Option(min=1, help="Route every batch to exactly so many experts.")] = None,
    free: Annotated[bool, typer.Option(help="Leave the number of experts hit to chance everywhere.")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of which the median counts.")] = 30,
    device: Device = "auto",
    to: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Keep the run here.")] = None,
) -> None:
    """Check and time the routed experts' layer: packed, its dense twin, the best stock implementation."""
    import torch

    from moefold.cli import err, out
    from moefold.session import choose_device
    from moefold_kernels.bench import Bench, record
    from moefold_kernels.errors import WrongResultError

    with _errors():
        place = torch.device(choose_device(device))
        chosen, rivals = _cases(shapes, tokens, routing, hit, free, place), _contenders(contenders, place)
        if to and not to.absolute().parent.is_dir():
            raise InputError(f"--json {to}: there is no such directory; name a file in one that exists")
        _compile(chosen, rivals, place)
        bench, entries, wrong = Bench(place), [], 0
        try:
            for case, contender in ((case, contender) for case in chosen for contender in rivals):
                try:
                    entries.append(record.measure(bench.prepare(case, contender), rounds))
                except WrongResultError as error:
                    wrong += 1
                    err.print(f"not timed: {error}", highlight=False, markup=False, soft_wrap=True)
                else:
                    out.print(_told(entries[-1]), highlight=False, markup=False, soft_wrap=True)
        finally:  # what was measured is kept, whatever ended the run
            if to and entries:
                record.write(to, place, entries)
        if wrong:
            raise MoefoldError(f"{wrong} of {wrong + len(entries)} gave wrong results and were not timed")


def compare_layers(before: Path, after: Path, margin: float) -> None:
    """Compare two runs of the layer by ratios that each measured within itself."""
    from moefold.cli import err, out
    from moefold_kernels.bench import comparison, results

    with _errors():
        found = comparison.compare(results.read(before), results.read(after))
        dropped = found.dropped(margin)
        for remark in found.remarks:
            out.print(remark, highlight=False, markup=False, soft_wrap=True)
        out.print(_table(found, margin, before, after))
        for path, missing in ((after, found.only_before), (before, found.only_after)):
            for name in missing:
                out.print(f"not in {path}: {name}", highlight=False, markup=False, soft_wrap=True)
        out.print(
            f"{len(found.changes)} ratios compared, {len(dropped)} fell by more than {margin:.0%}, "
            f"{len(found.only_before) + len(found.only_after)} in one run only",
            highlight=False,
        )
    if dropped:
        err.print("error: the kernels became slower against what was measured beside them", highlight=False)
        raise typer.Exit(1)


@app.command(epilog="Example: `moefold bench page docs/benchmarks.md tests/bench/results/*-layer-*.json`")
def page(
    document: Annotated[Path, typer.Argument(metavar="PAGE", help="A markdown file with the two marker lines.")],
    runs: Annotated[list[Path], typer.Argument(metavar="RUN.json...")],
) -> None:
    """Write stored runs into a page, between its markers, with a plot of each (`pip install 'moefold[bench]'`)."""
    from moefold.cli import out
    from moefold_kernels.bench import page as pages

    with _errors():
        pages.refresh(document, runs)
        out.print(f"{document}: {len(runs)} runs, plots in {document.parent / 'images'}", highlight=False)


def _cases(shapes: str, tokens: str, routing: str, hit: int | None, free: bool, device: torch.device) -> list[Case]:
    from moefold_kernels.bench import SHAPES, TINY, TINY_TOKENS, TOKENS, cases, find

    usual = [shape for shape in SHAPES.values() if (shape is TINY) == (device.type == "cpu")]
    chosen = [find("shape", name, SHAPES) for name in _listed(shapes)] or usual
    if device.type == "cpu" and (large := [shape.name for shape in chosen if shape is not TINY]):
        raise InputError(f"--shapes {large[0]} takes a GPU; on a CPU there is --shapes {TINY.name}")
    try:
        counts = [int(word) for word in _listed(tokens)]
    except ValueError:
        raise InputError(f"--tokens {tokens}: write whole numbers with commas between them, as in 1,16,256") from None
    found = []
    for shape in chosen:
        own = TINY_TOKENS if shape is TINY else TOKENS
        found += cases([shape], counts or own, routing, free, hit)
    return found


def _contenders(names: str, device: torch.device) -> list[Contender]:
    """Those named, which must be able to run here, or all that are; those left out are shown with the reason."""
    from moefold.cli import err
    from moefold_kernels.bench import CONTENDERS, find

    if names:
        chosen = [find("contender", name, CONTENDERS) for name in _listed(names)]
        for one in chosen:
            can, reason = one.can(device)
            if not can:
                raise InputError(f"{one.name} cannot run on {device}: {reason}")
        return chosen
    able = []
    for contender in CONTENDERS.values():
        can, reason = contender.can(device)
        if can:
            able.append(contender)
        else:
            err.print(f"left out: {contender.name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    return able


def _compile(chosen: list[Case], rivals: list[Contender], device: torch.device) -> None:
    """All kernels at once: one after another they would take most of the run."""
    from moefold.cli import err
    from moefold.progress import one_bar
    from moefold_kernels.bench import ahead
    from moefold_kernels.errors import BenchmarkError

    wanted = [(case.shape, case.tokens, rival) for case in chosen for rival in rivals]
    try:
        with one_bar(err) as show:
            ready = ahead.compile_chosen(wanted, device, lambda done, of: show("compiling kernels", done, of))
    except BenchmarkError:  # of the processes, as when memory runs out: nothing is lost but time
        err.print("a process that compiles kernels died; they are compiled where they are first run", highlight=False)
        return
    for job, why in ready.refused.items() if ready else ():
        told = f"cannot be compiled: {job.shape.name}, {job.tokens} tokens, {job.format}: {job.plan}: {why}"
        err.print(told, highlight=False, markup=False, soft_wrap=True)


def _listed(names: str) -> list[str]:
    return [name for name in names.replace(",", " ").split() if name]


def _told(entry: dict[str, Any]) -> str:
    info, seconds = entry["extra_info"], entry["stats"]["median"]
    return (
        f"{entry['param']}: {seconds * 1e6:.1f} us, {info['floor'] / seconds:.0%} of its floor ({info['bound']}), "
        f"experts hit {info['experts_hit']:.4g}, pairs hit {info['pairs_hit']:.4g}, error {info['error']:.1e}"
    )


def _table(found: Comparison, margin: float, before: Path, after: Path) -> Table:
    table = Table(title="Ratios within a run", title_justify="left")
    for name in ("case", "speed"):
        table.add_column(name, overflow="fold")  # what is cut off would be the number of tokens
    for name in (before.name, after.name, "change"):
        table.add_column(name, justify="right", overflow="fold")
    for one in found.changes:
        text = f"{one.relative:+.1%}"
        table.add_row(
            escape(one.case),
            escape(f"{one.contender} / {one.against}"),
            f"{one.before:.3f}",
            f"{one.after:.3f}",
            f"[red]{text}[/red]" if one.relative < -margin else text,
        )
    return table


history_commands.add(app)
