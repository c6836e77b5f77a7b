"""The arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

PipelineName = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A YAML file, or the name of a shipped pipeline.")
]
Model = Annotated[str | None, typer.Option(help="Model in place of the pipeline's own: a directory or a hub id.")]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="GLOB", help="Files in place of the calibration text (repeatable)."),
]
To = Annotated[str | None, typer.Option(metavar="DIR", help="Where to save, in place of the pipeline's own.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STAGE.OPTION=VALUE", help="One option in place of the pipeline's own (repeatable)."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="STAGE", help="Store its results for other runs (repeatable): forward, for several methods."),
]
Work = Annotated[Path, typer.Option(metavar="DIR", help="Where results are kept, so that nothing is computed twice.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]
Strict = Annotated[bool, typer.Option(help="Tell checkpoints apart by their contents, not by size and date.")]
