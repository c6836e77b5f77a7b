"""The command `moefold report`: the page of a finished run, built again from what it told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moefold.saved import Saved

EPILOG = """
    Examples:

        moefold report .moefold

        moefold report out/packed --to packed.html
    """


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A work directory, a directory that moefold saved, or a report.json.")
    ],
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the page.")] = None,
) -> None:
    """Write the page of a finished run: by default report.html beside its report.json."""
    from moefold import html, run_page, runs
    from moefold.cli import errors, out

    with errors():
        file, found = runs.read_report(run)
        target = to or _beside(file)
        html.write(target, run_page.page(found).render())
        out.print(f"written to {target}", highlight=False, markup=False, soft_wrap=True)


def _beside(file: Path) -> Path:
    """A saved checkpoint stays as it is: its page goes to where the command is given."""
    return Path(f"{file.absolute().parent.name}.html") if file.name == Saved.RECORD else file.with_suffix(".html")
