"""Wiring: which stage each input of a stage reads, by type where only one can, by name where several could."""

from __future__ import annotations

import graphlib
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from moefold.artifact import Json
from moefold.document import Document, Path
from moefold.errors import suggest
from moefold.hooks import Registry
from moefold.stage import Port, Stage


@dataclass
class Draft:
    """A step whose wiring is not known yet."""

    index: int
    id: str
    stage: Stage[Any, Any]
    options: BaseModel | None
    needs: dict[str, Json]
    wired: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return ("stages", self.index)


@dataclass
class Wiring:
    """Wires drafts in place, noting in the document what cannot be wired."""

    document: Document
    registry: Registry
    drafts: dict[str, Draft]
    unread: set[str]
    """Ids of stages that could not be read: not to be reported as missing once more."""
    lost: bool
    """Whether a stage could not be read, so that a missing provider may only be its consequence."""

    def wire(self) -> None:
        """Fill `wired` of every draft, and look for circles."""
        for draft in self.drafts.values():
            self._step(draft)
        self._unread()
        self._circles()

    def _step(self, draft: Draft) -> None:
        ports = draft.stage.ports
        for name in draft.needs:
            if name not in ports:
                hint = suggest(name, ports) if ports else "; it takes no input"
                self.document.problem((*draft.path, "needs", name), f"{draft.stage.name} has no input {name}{hint}")
        for port in ports.values():
            ids = self._named(draft, port) if port.name in draft.needs else self._found(draft, port)
            if ids:
                draft.wired[port.name] = ids

    def _named(self, draft: Draft, port: Port) -> tuple[str, ...]:
        path = (*draft.path, "needs", port.name)
        given = draft.needs[port.name]
        many = port.kind == "many"
        ids = given if isinstance(given, list) and many else [given]
        if isinstance(given, list) and not many:
            self.document.problem(path, f"{draft.stage.name} takes one {port.type.__name__} here; name one stage")
            return ()
        return tuple(str(identity) for identity in ids if self._fits(path, port, str(identity)))

    def _fits(self, path: Path, port: Port, identity: str) -> bool:
        provider = self.drafts.get(identity)
        if provider is None:
            if identity not in self.unread:
                self.document.problem(path, f"no stage has the id {identity}{suggest(identity, self.drafts)}")
        elif not issubclass(provider.stage.produces, port.type):
            makers = ", ".join(d.id for d in self._makers(port)) or "a stage that makes it (none is here)"
            made = provider.stage.produces.__name__
            self.document.problem(path, f"{identity} makes {made}, but {port.type.__name__} is needed; write {makers}")
        else:
            return True
        return False

    def _makers(self, port: Port) -> list[Draft]:
        return [d for d in self.drafts.values() if issubclass(d.stage.produces, port.type)]

    def _found(self, draft: Draft, port: Port) -> tuple[str, ...]:
        found = [d for d in self._makers(port) if d is not draft or port.kind == "previous"]
        exact = [d for d in found if d.stage.produces is port.type]  # kinds of it, such as merged experts, by name only
        makers = [d.id for d in exact or found]
        if len(makers) == 1:
            return (makers[0],)
        path = (*draft.path, "needs", port.name)
        kind = port.type.__name__
        if len(makers) > 1:
            offer = f"[{', '.join(makers)}]" if port.kind == "many" else makers[0]
            self.document.problem(
                path, f"{kind} is made by {' and '.join(makers)}; say which: needs: {{{port.name}: {offer}}}"
            )
        elif port.required and not self.lost:
            known = [s.name for s in self.registry.stages.values() if issubclass(s.produces, port.type)]
            known.sort(key=lambda name: not name.startswith(port.name.removesuffix("s")))  # pairs: pair.* first
            remedy = f"add one of {', '.join(known)}" if known else "no installed plugin makes it either"
            self.document.problem(path, f"{draft.id} needs {kind}, and no stage makes that; {remedy}")
        return ()

    def _unread(self) -> None:
        """Work that nobody reads and nobody keeps is a mistake in the wiring: merged experts packed by no one."""
        read = {identity for draft in self.drafts.values() for ids in draft.wired.values() for identity in ids}
        for draft in self.drafts.values():
            if draft.index < 0 or draft.id in read or draft.stage.keep == "always" or self.lost:
                continue
            made = draft.stage.produces
            readers = [
                f"{d.id}: needs: {{{port.name}: {draft.id}}}"
                for d in self.drafts.values()
                for port in d.stage.ports.values()
                if issubclass(made, port.type)
            ]
            remedy = f"write one of {'; '.join(readers)}" if readers else f"add a stage that reads {made.__name__}"
            self.document.problem(draft.path, f"nothing reads what {draft.id} makes, and it is not kept; {remedy}")

    def _circles(self) -> None:
        edges = {
            d.id: {i for port, ids in d.wired.items() if d.stage.ports[port].kind != "previous" for i in ids}
            for d in self.drafts.values()
        }
        try:
            graphlib.TopologicalSorter(edges).prepare()
        except graphlib.CycleError as error:
            circle = list(reversed(error.args[1]))
            draft = self.drafts[circle[0]]
            self.document.problem(
                (*draft.path, "needs"),
                f"the stages feed each other in a circle: {' -> '.join(circle)}; let one of them read another stage "
                "(only a stage that reads the layer before, such as forward, may close a circle)",
            )
