"""The command line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moefold import __version__, benchmarks, describe, doctor, new, reporting, shipped, terminal
from moefold import compare as comparing
from moefold import schema as schemas
from moefold import tune as tuning
from moefold.arguments import AsJson, Device, Keep, Model, PipelineName, Settings, Strict, Texts, To, Work
from moefold.artifact import finite
from moefold.errors import InputError, MoefoldError, PipelineError
from moefold.session import Session

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Compress Mixture-of-Experts language models: merge, pack, save, reload.

    **Start:** `moefold run quickstart` compresses the small model that ships with moefold and shows what was saved and
    lost. `moefold run puzzlemoe --model DIR_OR_HUB_ID --to out/packed` does the same to yours.
    """,
)

app.add_typer(benchmarks.app, name="bench")
app.add_typer(new.app, name="new")

out = Console()
err = Console(stderr=True)

WORK = Path(".moefold")


@contextmanager
def errors() -> Iterator[None]:
    """Errors of ours as one message and an exit code; the rest are bugs and keep their traceback."""
    try:
        yield
    except PipelineError as error:
        err.print(str(error), highlight=False, markup=False, soft_wrap=True)
        count = len(error.problems)
        err.print(f"{count} problem{'s' if count > 1 else ''}; nothing was run", highlight=False)
        raise typer.Exit(error.exit_code) from None
    except MoefoldError as error:
        err.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        err.print("interrupted; what is finished is kept, and the same command goes on from there")
        raise typer.Exit(130) from None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(finite(value), indent=2))


@app.command(
    epilog="""
    Examples:

        moefold run quickstart

        moefold run puzzlemoe --model Qwen/Qwen3-30B-A3B --to out/qwen3-packed

        moefold run my.yaml --text 'notes/**/*.txt' --set puzzlemoe.threshold=0.3
    """
)
def run(
    pipeline: PipelineName,
    model: Model = None,
    text: Texts = None,
    to: To = None,
    settings: Settings = None,
    work: Work = WORK,
    keep: Keep = None,
    executor: Annotated[str, typer.Option(metavar="NAME", help="inline, process, or what a plugin offers.")] = "inline",
    workers: Annotated[int, typer.Option(min=1, help="Tasks at a time (process: one GPU each).")] = 1,
    device: Device = "auto",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline: do what is not stored yet, then report what was saved and what was lost."""
    with errors():
        session = Session.open(pipeline, model, text, to, settings, work, device, strict)
        result = session.run(executor, workers, err, keep)
        if as_json:
            _print_json(result)
        else:
            terminal.show(result, out, session.store.root / "report.html")
        terminal.judge(result, err)


@app.command(epilog="Example: `moefold plan quickstart --set puzzlemoe.threshold=0.3` shows what that would recompute.")
def plan(
    pipeline: PipelineName,
    model: Model = None,
    text: Texts = None,
    to: To = None,
    settings: Settings = None,
    work: Work = WORK,
    device: Device = "auto",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: for each stage, what is stored and what is to run. Reads headers only."""
    with errors():
        session = Session.open(pipeline, model, text, to, settings, work, device, strict)
        rows = session.outlook()
        if as_json:
            return _print_json(rows)
        table = Table(title="Plan", title_justify="left")
        for column in ("stage", "reads", "tasks", "stored", "to run"):
            table.add_column(column, overflow="fold", no_wrap=column != "reads")
        for row in rows:
            name = row["step"] if row["step"] == row["uses"] else f"{row['step']} ({row['uses']})"
            cells = (name, *(row[key] for key in ("reads", "tasks", "stored", "to_run")))
            table.add_row(*(escape(str(cell)) for cell in cells))
        out.print(table)
        out.print(
            "never stored: computed where it is read; until read: stored until its last reader is", highlight=False
        )
        return None


@app.command(epilog="Example: `moefold validate my.yaml`")
def validate(
    pipeline: PipelineName, model: Model = None, text: Texts = None, to: To = None, settings: Settings = None
) -> None:
    """Check a pipeline: every problem with line, column and remedy; exit code 2 if there is one."""
    with errors():
        checked = Session.read(pipeline, model, text, to, settings)
        stages = len(checked.steps) - 1
        out.print(f"{checked.source}: {stages} stages, no problems", highlight=False, markup=False, soft_wrap=True)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List pipelines, stages, codecs, kernel backends and models, with the distribution each came from."""
    with errors():
        sections = describe.everything()
        if as_json:
            return _print_json(sections)
        for title, rows in sections.items():
            table = Table("name", "what it does", "from", title=title, title_justify="left", show_edge=False)
            for row in rows:
                table.add_row(*(escape(row[key]) for key in ("name", "summary", "source")))
            out.print(table, "")
        return None


@app.command("describe", epilog="Examples: `moefold describe puzzlemoe`, `moefold describe quickstart`")
def describe_(name: Annotated[str, typer.Argument(help="A stage, or a shipped pipeline.")]) -> None:
    """Describe a stage (inputs, options, defaults, sources) or print a shipped pipeline."""
    with errors():
        out.print(describe.one(name), highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: `moefold copy puzzlemoe my.yaml`, then edit my.yaml and `moefold run my.yaml`")
def copy(
    name: Annotated[str, typer.Argument(help="A shipped pipeline.")],
    dest: Annotated[Path, typer.Argument(help="A file or a directory.")] = Path(),
) -> None:
    """Copy a shipped pipeline, to be edited."""
    with errors():
        source = shipped.find(name)
        target = dest / source.name if dest.is_dir() else dest
        if target.exists():
            raise InputError(f"{target} exists; name another file")
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise InputError(f"{target} cannot be written: {error.strerror}; name another place") from error
        out.print(f"copied to {target}; run it with: moefold run {target}", highlight=False, markup=False)


@app.command("doctor")
def doctor_(as_json: AsJson = False) -> None:
    """Show versions, devices, plugins, and which kernel backend is chosen for each format, and why others refuse."""
    with errors():
        found = doctor.examine()
        if as_json:
            return _print_json(found)
        for title, rows in found.items():
            table = Table("", "", title=title, title_justify="left", show_header=False, show_edge=False)
            for key, value in rows.items():
                table.add_row(escape(key), escape(str(value)))
            out.print(table, "")
        return None


@app.command(epilog="Examples: `moefold evaluate out/packed`, `moefold evaluate out/packed --text 'book/*.txt' --json`")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A directory (packed or not) or a hub id.")],
    text: Texts = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each text.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a sample.")] = 512,
    work: Work = WORK,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Loss and perplexity of a checkpoint on text, one layer in memory at a time."""
    with errors():
        rows = Session.evaluate(checkpoint, text, samples, length, work, device, err)
        if as_json:
            return _print_json(rows)
        table = Table("text", "tokens", "loss (nats)", "perplexity", "bits per byte")
        for row in rows:
            table.add_row(
                escape(row["text"]),
                f"{row['tokens']:,}",
                f"{row['loss']:.4f}",
                f"{row['perplexity']:.3f}",
                f"{row['bits_per_byte']:.4f}" if row["bits_per_byte"] else "-",
            )
        out.print(table)
        return None


app.command(epilog=comparing.EPILOG)(comparing.compare)
app.command(epilog=reporting.EPILOG)(reporting.report)
app.command(epilog=tuning.EPILOG)(tuning.tune)
app.command(epilog=schemas.EPILOG)(schemas.schema)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"moefold {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(call: Callable[[], Any] = app) -> None:
    """The entry point of the command `moefold`."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a log file may not be UTF-8
    call()
