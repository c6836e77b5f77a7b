"""The Python standard library as text: split into three parts by the sha256 of a module's dotted name.

The name decides, never the content, so a module that the model has not seen stays unseen in every Python version.
`calibrate` and `evaluate` hold about a tenth of the eligible modules each. Not eligible, and counted as `train`:

- tests (`test`, `tests`, `idle_test`): many installs leave them out, and much of them is data;
- `tkinter`, `turtle`, `turtledemo`, `idlelib`, `lib2to3`, `distutils`, `ensurepip`, `venv`: packaged apart on some
  systems, or gone from newer versions;
- generated text: `encodings.*` (character maps), `_sysconfigdata*`, `html.entities`, `stringprep`, `keyword`, `token`;
- jokes and stubs: `this`, `antigravity`, `__hello__`, `__phello__`.

site-packages is no part of the library and is left out. `pydoc_data.topics`, English prose about Python, is in no part:
`prose` returns it as text from outside the model's domain.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Part = Literal["train", "calibrate", "evaluate"]

TESTS = {"test", "tests", "idle_test"}
NOT_HELD_OUT = {
    *("tkinter", "turtle", "turtledemo", "idlelib", "lib2to3", "distutils", "ensurepip", "venv"),
    *("encodings", "stringprep", "keyword", "token", "this", "antigravity", "__hello__", "__phello__"),
}
NOT_TEXT = "pydoc_data"


def part_of(module: str) -> Part:
    """Say which part a module belongs to, by its dotted name alone."""
    names = module.split(".")
    if names[0] == NOT_TEXT:
        raise ValueError(f"{module} is in no part: its text is what stdlib.prose() returns")
    if not TESTS.isdisjoint(names) or names[0] in NOT_HELD_OUT or module == "html.entities":
        return "train"
    if names[0].startswith("_sysconfigdata"):
        return "train"
    bucket = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % 10
    return "calibrate" if bucket == 0 else "evaluate" if bucket == 1 else "train"


def modules(part: Part, folder: Path | None = None) -> list[tuple[str, str]]:
    """Return (dotted name, source) of a part's modules, sorted by name, skipping what is empty or not UTF-8.

    `folder` is a standard library's folder; the running Python's if not given.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    paths = {name: path for name, path in _files(root) if name.split(".")[0] != NOT_TEXT and part_of(name) == part}
    if not paths:
        raise FileNotFoundError(
            f"{root} holds no Python source of the part {part!r}: is the library zipped or stripped?"
        )
    texts = ((name, _read(paths[name])) for name in sorted(paths))
    return [(name, text) for name, text in texts if text.strip()]


def prose() -> list[tuple[str, str]]:
    """Return (topic, text) of the language reference that `help()` shows: English, in no part."""
    from pydoc_data.topics import topics

    return sorted(topics.items())


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, path) of every module that could be imported from a library's folder."""
    for place, folders, files in os.walk(root):
        # Not an identifier: site-packages, lib-dynload, config-3.11-…, which hold no library module.
        folders[:] = [name for name in folders if name.isidentifier() and name != "__pycache__"]
        folder = Path(place)
        package = folder.relative_to(root).parts
        for file in files:
            stem, _, extension = file.partition(".")
            if extension == "py" and stem.isidentifier():
                yield ".".join(package if stem == "__init__" and package else (*package, stem)), folder / file


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
