"""YAML with positions: plain values, and the line and column of every one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from moefold.artifact import Json
from moefold.errors import PipelineError, Problem

Path = tuple[str | int, ...]
"""Where a value stands in a document: keys and list indices from the root."""


def dotted(path: Path) -> str:
    """A path as people write it: `stages[1].with.top_k`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


@dataclass
class Document:
    """A YAML mapping as plain values, with positions, and the problems found so far."""

    source: str
    value: dict[str, Json]
    positions: dict[Path, tuple[int, int]] = field(default_factory=dict)
    origins: dict[Path, str] = field(default_factory=dict)
    """What set a value from outside the file, for problems to name: `--set puzzlemoe.threshold=2`."""
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str, source: str) -> Document:
        """Read with the safe loader only; raises PipelineError when it is not a YAML mapping."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            message = f"not YAML: {error.problem or error.context}; check the indentation and quotes of this line"
            raise PipelineError(source, [Problem(line, column, "", message)]) from error
        except (yaml.YAMLError, RecursionError) as error:
            raise PipelineError(source, [Problem(1, 1, "", f"not YAML: {error}")]) from error
        if not isinstance(node, yaml.MappingNode):
            message = "a pipeline is a mapping with the keys model and stages; start with `model: demo`"
            raise PipelineError(source, [Problem(1, 1, "", message)])
        document = cls(source, {})
        document._refuse_circles(node, ())
        document.value = document._plain(node, ())
        return document

    def _refuse_circles(self, node: yaml.Node, around: tuple[yaml.Node, ...]) -> None:
        """Raise PipelineError where an anchor stands for something that it is part of."""
        if any(node is one for one in around):
            message = "this anchor stands for something that it is a part of; write the value out"
            raise PipelineError(
                self.source, [Problem(node.start_mark.line + 1, node.start_mark.column + 1, "", message)]
            )
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        for child in children:
            for part in child if isinstance(child, tuple) else (child,):
                self._refuse_circles(part, (*around, node))

    def _plain(self, node: yaml.Node, path: Path) -> Any:
        self.positions[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(child, (*path, index)) for index, child in enumerate(node.value)]
        try:
            value = yaml.SafeLoader("").construct_object(node)
        except yaml.YAMLError as error:
            self.problem(path, f"cannot be read: {getattr(error, 'problem', error)}; write a plain value")
            return None
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            here = (*path, key)
            if key in values:
                self.positions[here] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
                self.problem(here, "this key stands twice; keep one of the two")
                continue
            values[key] = self._plain(value_node, here)
            self.positions[here] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        return values

    def problem(self, path: Path, message: str) -> None:
        """Note a problem at a path, or at the nearest thing around it that has a position."""
        near = path
        while near and near not in self.positions and near not in self.origins:
            near = near[:-1]
        if near in self.origins:
            self.problems.append(Problem(0, 0, f"{self.origins[near]}: {dotted(path)}", message))
        else:
            self.problems.append(Problem(*self.positions.get(near, (1, 1)), dotted(path), message))

    def set(self, path: Path, value: Json, origin: str) -> None:
        """Put a value from outside the file in place; `origin` is what a problem with it will name."""
        place: Any = self.value
        for part in path[:-1]:
            if isinstance(place, dict) and not isinstance(place.get(part), dict | list):
                place[part] = {}
            place = place[part]
        place[path[-1]] = value
        self.positions.pop(path, None)
        self.origins[path] = origin

    def raise_problems(self) -> None:
        """Raise what was noted, all at once."""
        if self.problems:
            raise PipelineError(self.source, self.problems)
