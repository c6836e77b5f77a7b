"""The pipelines that ship with moefold, by name."""

from __future__ import annotations

from pathlib import Path

from moefold.errors import InputError, suggest


def folder() -> Path:
    """Where they are: in the installed package, or at the top of a source checkout."""
    installed = Path(__file__).parent / "pipelines"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "pipelines"


def names() -> dict[str, Path]:
    """Every shipped pipeline by its name."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def summary(path: Path) -> str:
    """What a pipeline says of itself: its first comment line."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def find(name: str) -> Path:
    """A pipeline by path, or by the name of a shipped one; raises InputError with the nearest name."""
    path = Path(name)
    if path.is_file():
        return path
    if name in names():
        return names()[name]
    if path.is_dir():
        raise InputError(f"{name} is a directory; name the YAML file in it")
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise InputError(f"no file {name}; shipped pipelines are named without a path: {', '.join(names())}")
    raise InputError(f"no pipeline {name}{suggest(name, names())}")
