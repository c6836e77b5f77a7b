"""What the site puts into its pages when it is built; mkdocs calls it (see `hooks` in mkdocs.yml).

- `<!-- file: PATH -->` stands for a file of the repository, such as CHANGELOG.md.
- `<!-- stages -->` stands for every installed stage with its inputs and options, as `moefold describe` tells them.
- `<!-- rest of MODULE -->` stands for the public names of a module that the page does not have yet.
- A link that leaves docs/ becomes the path that it names: the site carries no other files of the repository.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

from moefold import describe
from moefold.hooks import Registry

ROOT = Path(__file__).parents[1]
TITLES = {
    "Text": ("text.",),
    "Calibration": ("forward", "observe"),
    "Similarity, pairs and groups": ("similarity.", "pair.", "group.", "align"),
    "Pairs in shared words": ("puzzlemoe", "levels", "pack.", "unpack."),
    "Plans over all layers": ("damage.", "plan."),
    "Fewer experts": ("average", "msmoe", "mergemoe", "prune."),
    "Fewer bits": ("quantize", "quantize.gptq", "dequantize", "gptq"),
    "Saving and measuring": ("save", "evaluate."),
    "Others": ("",),
}
"""Heading -> how the names of its stages begin; a stage stands under the first that fits."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text as mkdocs is to render it."""
    folder = Path(page.file.src_uri).parent
    markdown = re.sub(r"<!-- file: (\S+) -->", lambda at: _file(at[1], folder), markdown)
    if "<!-- stages -->" in markdown:
        markdown = markdown.replace("<!-- stages -->", stages())
    markdown = re.sub(r"<!-- rest of (\S+) -->", lambda at: rest(at[1], markdown), markdown)
    return re.sub(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)\s]+)\)", lambda at: _inside(at, folder), markdown)


def rest(module: str, page: str) -> str:
    """Entries of the API reference for the names of `__all__` that the page leaves out."""
    names = [name for name in importlib.import_module(module).__all__ if not name.startswith("__")]
    return "\n".join(f"::: {module}.{name}" for name in names if not re.search(rf"^::: \S+\.{name}$", page, flags=re.M))


def _file(path: str, folder: Path) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/([^)]+)\)", lambda at: f"]({os.path.relpath(at[1], folder)})", text)


def _inside(link: re.Match[str], folder: Path) -> str:
    target = os.path.normpath(Path("docs") / folder / link[2])
    return link[0] if target.startswith("docs/") else f"`{target}`"


def stages() -> str:
    """Every installed stage, by what it is for."""
    left = [name for name in Registry.installed().stages if name != "model"]
    lines: list[str] = []
    for title, prefixes in TITLES.items():
        mine = [name for name in left if name.startswith(prefixes)]
        left = [name for name in left if name not in mine]
        lines += [f"## {title}", ""] if mine else []
        lines += [line for name in sorted(mine) for line in _stage(describe.one(name))]
    return "\n".join(lines)


def _stage(told: str) -> list[str]:
    """A stage as `moefold describe` prints it, in Markdown."""
    (head, *about), facts = told.partition("\nneeds")[0].splitlines(), told.partition("\nneeds")[2]
    reads, _, rest = facts.partition("\nmakes: ")
    makes, _, given = rest.partition("\n")
    inputs = re.findall(r"^  (\w+): (.+)$", reads, flags=re.MULTILINE)
    lines = [f"### {head.partition(' ')[0]}", *about]
    lines += ["", "- reads " + (", ".join(f"`{name}` ({kind})" for name, kind in inputs) or "no other stage")]
    lines += [f"- makes {makes}", ""]
    options = re.findall(r"^  (\w+) \((.+?)\)(?:: (.*))?$", given, flags=re.MULTILINE)
    if options:
        lines += ["| option | value | what |", "|---|---|---|"]
        lines += [f"| `{name}` | {_cell(value)} | {_cell(what)} |" for name, value, what in options]
    return [*lines, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
