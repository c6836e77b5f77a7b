"""The documentation site: it builds without a warning, its links lead somewhere, and it reaches no network."""

from __future__ import annotations

import importlib
import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

import moefold
import moefold_kernels
from moefold import describe, hooks, shipped, testing
from pages import DOCS, PAGES, ROOT, name


class Read(HTMLParser):
    """What a page points to, what can be pointed to in it, and what a browser fetches for it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.fetched: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("script", "link", "img", "source", "iframe") and given.get("rel") != "canonical":
            self.fetched += [given[key] for key in ("src", "href") if key in given]


def test_links_and_anchors_lead_somewhere(site: Path) -> None:
    pages = {path: Read(path) for path in site.rglob("*.html")}
    assert len(pages) >= 18
    for path, read in pages.items():
        if path.name == "404.html":  # its addresses are of a site's root
            continue
        for link in read.links:
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", target):
                assert target.startswith(("https://arxiv.org/", "mailto:")), f"{path}: {link}: an address nobody checks"
                continue
            found = (path.parent / target).resolve() if target else path
            assert found.exists(), f"{path}: {link}"
            if anchor and found in pages:
                assert anchor in pages[found].ids, f"{path}: {link}"


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        for address in Read(path).fetched:
            assert not re.match(r"(?:https?:)?//", address), f"{path}: {address}"
            assert path.name == "404.html" or (path.parent / unquote(address).partition("?")[0]).exists(), address
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_the_stages_page_has_every_stage_and_option(site: Path) -> None:
    text = (site / "stages.html").read_text(encoding="utf-8")
    for row in describe.everything()["Stages"]:
        if row["source"] != "moefold" or row["name"] == "model":
            continue
        assert row["name"] in text
        options = re.findall(r"^  (\w+) \(", describe.one(row["name"]).partition("options:")[2], flags=re.MULTILINE)
        _, _, section = text.partition(f">{row['name']}<a class")
        assert all(f"<code>{option}</code>" in section.partition("<h3")[0] for option in options), row["name"]


def test_every_shipped_pipeline_is_in_the_table() -> None:
    table = (DOCS / "pipelines.md").read_text(encoding="utf-8").partition("## The pipelines that ship")[2]
    missing = [one for one in shipped.names() if f"`{one}`" not in table.partition("## ")[0]]
    assert not missing, f"add a row to docs/pipelines.md that says when to use {', '.join(missing)}"


@pytest.mark.parametrize(("page", "module"), [("moefold", moefold), ("testing", testing), ("kernels", moefold_kernels)])
def test_the_reference_has_every_public_name(page: str, module: ModuleType, site: Path) -> None:
    ids = Read(site / "reference" / f"{page}.html").ids
    public = [one for one in module.__all__ if not one.startswith("__")]
    path = {"stage": "moefold.stage.stage"}  # the module of this name has the page's entry otherwise
    assert not [one for one in public if path.get(one, f"{module.__name__}.{one}") not in ids]
    if page == "moefold":
        assert {f"moefold.hooks.{one}" for one in vars(hooks) if one.startswith("moefold_")} <= ids
    listed = re.findall(r"^::: (\S+)$", (DOCS / "reference" / f"{page}.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(listed) == len(set(listed))


def test_pictures_and_tables_of_formats_are_drawn_from_the_code() -> None:
    spec = importlib.util.spec_from_file_location("draw_formats", DOCS / "draw_formats.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    assert draw.page() == draw.PAGE.read_text(encoding="utf-8"), "run `python docs/draw_formats.py`"
    for file, drawn in draw.pictures().items():
        assert (DOCS / "images" / file).read_text(encoding="utf-8") == drawn, "run `python docs/draw_formats.py`"
    labels = [bit.label for bit in draw.plane("pair6", "low")[:4]]
    assert labels == ["l0", "l1", "l0", "l1"]


def test_no_address_of_a_repository_is_made_up() -> None:
    for page in [*PAGES, ROOT / "mkdocs.yml"]:
        found = re.findall(r"https?://(?!arxiv\.org/)[^\s)>\"']+", page.read_text(encoding="utf-8"))
        assert not found, f"{name(page)}: {found}"
