"""What the command line puts in place of a pipeline's own values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from moefold.artifact import Json
from moefold.artifacts import Text
from moefold.errors import InputError, suggest

if TYPE_CHECKING:
    from moefold.document import Document
    from moefold.hooks import Registry

TEXT_STAGE = "text.files"
"""The stage that `--text` puts in place of the pipeline's own calibration text."""


@dataclass(frozen=True)
class Overrides:
    """`--model`, `--text`, `--to` and `--set`, applied to a document before it is checked."""

    model: str | None = None
    text: tuple[str, ...] = ()
    to: str | None = None
    settings: tuple[str, ...] = ()

    def apply(self, document: Document, registry: Registry) -> None:
        """Change the document in place; raises InputError when there is nothing to replace."""
        if self.model is not None:
            document.set(("model",), self.model, f"--model {self.model}")
        if self.text:
            self._apply_text(document, registry)
        if self.to is not None:
            self._apply_to(document, registry, self.to)
        for setting in self.settings:
            _apply_setting(document, setting)

    def _apply_text(self, document: Document, registry: Registry) -> None:
        """The text that a stage reads through an input of exactly one Text is the calibration text."""
        entries = _entries(document)
        read = {name for _, entry in entries for name in _texts_read(entry, registry)}
        makers = [(i, e) for i, e in entries if _makes_text(e, registry)]
        named = [(i, e) for i, e in makers if _id(e) in read] or makers
        if len(named) != 1:
            ids = ", ".join(_id(e) for _, e in named) or "none"
            raise InputError(
                f"--text replaces the calibration text, but {document.source} has {len(named)} stages that it could "
                f"replace ({ids}); name one in `needs: {{text: ID}}` of the stage forward"
            )
        index, entry = named[0]
        origin = "--text " + " --text ".join(self.text)
        replaced = _only_read_by(index, entries)
        kept = {
            k: v for i, e in entries if i in replaced for k, v in _cut(e).items() if k in ("length", "spread")
        } | _cut(entry)
        for source in replaced:
            document.set(("stages", source), None, origin)
        document.set(("stages", index, "id"), _id(entry), origin)
        document.set(("stages", index, "uses"), TEXT_STAGE, origin)
        document.set(("stages", index, "needs"), {}, origin)
        document.set(("stages", index, "with"), kept | {"files": list(self.text)}, origin)

    def _apply_to(self, document: Document, registry: Registry, to: str) -> None:
        savers = [i for i, e in _entries(document) if "to" in _option_names(e, registry)]
        if len(savers) != 1:
            raise InputError(
                f"--to names where one stage saves, but {document.source} has {len(savers)} stages with an option to; "
                "use --set ID.to=DIR"
            )
        document.set(("stages", savers[0], "with", "to"), to, f"--to {to}")


def _apply_setting(document: Document, setting: str) -> None:
    target, equals, written = setting.partition("=")
    identity, _, option = target.rpartition(".")
    if not equals or not identity or not option:
        raise InputError(f"--set {setting}: write STAGE.OPTION=VALUE, for instance --set puzzlemoe.threshold=0.3")
    entries = {_id(entry): index for index, entry in _entries(document)}
    if identity not in entries:
        raise InputError(f"--set {setting}: {document.source} has no stage {identity}{suggest(identity, entries)}")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError as error:
        raise InputError(f"--set {setting}: the value is not YAML; quote it: --set '{target}=\"...\"'") from error
    document.set(("stages", entries[identity], "with", option), value, f"--set {setting}")


def _cut(entry: dict[str, Json]) -> dict[str, Json]:
    """The options of a text stage that say how much text to take, and how, not which."""
    options = entry.get("with")
    given = options if isinstance(options, dict) else {}
    return {name: given[name] for name in ("samples", "length", "seed", "spread") if name in given}


def _only_read_by(reader: int, entries: list[tuple[int, dict[str, Any]]]) -> list[int]:
    """The stages (by index) whose output only this one reads, as its `needs` says; those behind them too."""
    named = {index: set(_named(entry)) for index, entry in entries}
    others = set().union(*(ids for index, ids in named.items() if index != reader))
    alone = [i for i, e in entries if _id(e) in named[reader] and _id(e) not in others]
    return alone + [deeper for index in alone for deeper in _only_read_by(index, entries)]


def _named(entry: dict[str, Json]) -> list[str]:
    needs = entry.get("needs")
    values = needs.values() if isinstance(needs, dict) else ()
    return [str(i) for value in values for i in (value if isinstance(value, list) else [value])]


def _entries(document: Document) -> list[tuple[int, dict[str, Any]]]:
    stages = document.value.get("stages")
    return [(i, e) for i, e in enumerate(stages if isinstance(stages, list) else []) if isinstance(e, dict)]


def _id(entry: dict[str, Json]) -> str:
    return str(entry.get("id") or entry.get("uses"))


def _makes_text(entry: dict[str, Json], registry: Registry) -> bool:
    stage = registry.stages.get(str(entry.get("uses")))
    return stage is not None and issubclass(stage.produces, Text)


def _option_names(entry: dict[str, Json], registry: Registry) -> Iterable[str]:
    stage = registry.stages.get(str(entry.get("uses")))
    return stage.options.model_fields if stage else ()


def _texts_read(entry: dict[str, Json], registry: Registry) -> list[str]:
    stage = registry.stages.get(str(entry.get("uses")))
    needs = entry.get("needs")
    if stage is None or not isinstance(needs, dict):
        return []
    single = [p.name for p in stage.ports.values() if issubclass(p.type, Text) and p.kind == "one"]
    return [str(needs[name]) for name in single if name in needs]
