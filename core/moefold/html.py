"""One self-contained page: text and tables as HTML, figures as data that the plotly.js inside draws; no network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from moefold.artifact import Json, finite
from moefold.errors import InputError

ASSETS = Path(__file__).parent / "assets"

# The policy lets the page reach nothing outside it, whatever a library in it may want.
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<link rel="icon" href="data:,">
<script>
document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
</script>
<style>{css}</style>
</head>
<body>
<header><h1>{title}</h1><button id="theme" type="button" aria-label="switch between light and dark">◐</button></header>
{body}
<noscript><p class="badge warn">Figures and the table per expert need JavaScript; nothing is fetched.</p></noscript>
<script type="application/json" id="page-data">{data}</script>
<script>{plotly}</script>
<script>{js}</script>
</body>
</html>
"""


@dataclass
class Page:
    """What a page is made of: sections in reading order, and figures by the id of the element that shows each."""

    title: str
    sections: list[tuple[str, str, str]] = field(default_factory=list)
    """Id, heading, HTML."""
    figures: dict[str, Json] = field(default_factory=dict)
    experts: Json = None
    """What page.js needs for the part per expert."""
    head: str = ""

    def add(self, identity: str, heading: str, html: str) -> None:
        """One more section."""
        self.sections.append((identity, heading, html))

    def figure(self, identity: str, figure: Json, caption: str) -> str:
        """The place of a figure (HTML with plain text in `caption`)."""
        self.figures[identity] = figure
        return place(identity, caption, height=figure["layout"]["height"])

    def render(self) -> str:
        """The whole file."""
        from plotly.offline import get_plotlyjs  # 4.8 MB of text, and most commands do not need it

        links = "".join(f'<a href="#{i}">{escape(heading)}</a>' for i, heading, _ in self.sections)
        parts = [f'<section id="{i}"><h2>{escape(heading)}</h2>{html}</section>' for i, heading, html in self.sections]
        data = json.dumps(finite({"figures": self.figures, "experts": self.experts}), separators=(",", ":"))
        return _PAGE.format(
            title=escape(self.title),
            css=(ASSETS / "page.css").read_text(encoding="utf-8"),
            body="\n".join([self.head, f"<nav>{links}</nav>", *parts]),
            data=data.replace("<", "\\u003c"),  # no string in it can end the element
            plotly=get_plotlyjs(),
            js=(ASSETS / "page.js").read_text(encoding="utf-8"),
        )


def place(identity: str, caption: str, kind: str = "", height: int = 0) -> str:
    """Where a figure goes, as high as it will be, so that nothing moves when it is drawn."""
    shape, style = f"plot {kind}".strip(), f' style="min-height: {height}px"' if height else ""
    element = f'<div class="{shape}" id="{identity}"{style}></div>'
    return f"<figure>{element}<figcaption>{escape(caption)}</figcaption></figure>"


def table(columns: Sequence[str], rows: Iterable[Sequence[Json]], kinds: Mapping[int, str] | None = None) -> str:
    """A table that scrolls sideways on a narrow screen; cells are text, or HTML from `raw`; `kinds`: CSS by column."""
    kinds = kinds or {}
    head = "".join(f"<th{_kind(kinds, i)}>{escape(name)}</th>" for i, name in enumerate(columns))
    lines = [
        "<tr>" + "".join(f"<td{_kind(kinds, i)}>{html(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        if lines
        else ""
    )


def _kind(kinds: Mapping[int, str], column: int) -> str:
    return f' class="{kinds[column]}"' if column in kinds else ""


class raw(str):  # noqa: N801  (read as a verb: raw("<b>..."))
    """HTML that is put in as it is."""


def html(value: Json) -> str:
    """Anything as HTML text; None is a dash."""
    if isinstance(value, raw):
        return value
    return "–" if value is None else escape(str(value))


def badge(text: str, kind: str) -> raw:
    """A word in a colour that says how to take it: good, bad or warn."""
    return raw(f'<span class="badge {kind}">{escape(text)}</span>')


def card(name: str, value: str, more: str = "") -> str:
    """One figure, large; `more` is HTML below it."""
    return f'<div class="card"><div class="name">{escape(name)}</div><div class="value">{value}</div>{more}</div>'


def paragraph(text: str, kind: str = "soft") -> str:
    """Plain text."""
    return f'<p class="{kind}">{escape(text)}</p>'


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises InputError where it cannot be written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}; name another file") from error


def write_report(report: Mapping[str, Json], folder: Path) -> None:
    """Leave `report.json` and `report.html` in a work directory."""
    from moefold.run_page import page

    write(folder / "report.json", json.dumps(finite(report), indent=2))
    write(folder / "report.html", page(report).render())
