"""The command `moefold new plugin`: a distribution that works, to be changed into one's own."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from moefold.errors import InputError
from moefold.hooks import Registry

app = typer.Typer(no_args_is_help=True, help="Write something to start from.")

TEMPLATES = Path(__file__).parent / "templates"
PREFIX = "moefold-"
TAKEN = ("moefold_kernels", "moefold_plugins")


@app.callback()
def _main() -> None:
    """So that `plugin` is a command of its own, and not the only thing that `new` does."""


@app.command(epilog="Example: `moefold new plugin nearest`, then `cd moefold-nearest` and `pip install -e '.[test]'`")
def plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case words with hyphens, such as my-pairs.")],
    to: Annotated[Path, typer.Option(help="The directory in which to write moefold-NAME.")] = Path(),
) -> None:
    """Write a plugin: a stage, a codec, their tests, a pipeline; it installs and its tests pass as it is."""
    from moefold.cli import errors, out

    with errors():
        folder = write_plugin(name, to)
        out.print(f"wrote {folder}; next:", highlight=False, markup=False, soft_wrap=True)
        for line in (f"cd {folder}", "pip install -e '.[test]'", "pytest", "moefold run pipeline.yaml"):
            out.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def write_plugin(name: str, into: Path) -> Path:
    """Write the distribution moefold-NAME into a directory, and return its own; InputError where something is there."""
    words = _words(name)
    folder = into / words["distribution"]
    if folder.exists():
        raise InputError(f"{folder} exists; move it away, or choose another name or another --to")
    source = TEMPLATES / "plugin"
    try:
        for template in sorted(source.rglob("*.txt")):
            place = template.relative_to(source).with_suffix("")
            target = folder / str(place).replace("module", words["module"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(Template(template.read_text(encoding="utf-8")).substitute(words), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; name another place with --to") from error
    return folder


def _words(name: str) -> dict[str, str]:
    """What stands for the placeholders; raises InputError for a name that cannot be a plugin's."""
    from moefold import __version__

    short = name.removeprefix(PREFIX)
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short):
        raise InputError(f"{name!r} is no plugin's name; write lower-case words with hyphens between, such as my-pairs")
    key = short.replace("-", "_")
    if keyword.iskeyword(key) or f"moefold_{key}" in (*TAKEN, *sys.stdlib_module_names):
        raise InputError(f"{name!r} is taken by Python or moefold itself; choose another name")
    registry = Registry.installed()
    for kind, known, made in (("stage", registry.stages, f"pair.{key}"), ("codec", registry.codecs, key)):
        if made in known:
            raise InputError(f"there is a {kind} {made} already (from {known.source(made)}); choose another name")
    codec = "".join(word.capitalize() for word in short.split("-"))
    return {
        "name": key,
        "key": key,
        "codec": codec
        if codec not in ("Codec", "Coded", "Json", "MergedPair", "FormatError", "Tensor")
        else f"{codec}s",
        "distribution": f"{PREFIX}{short}",
        "module": f"moefold_{key}",
        "version": __version__,
    }
