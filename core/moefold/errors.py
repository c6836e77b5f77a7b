"""Every error that moefold raises on purpose: one tree, so that a caller can catch a branch of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class MoefoldError(Exception):
    """The root: the command line prints these without a traceback and exits with `exit_code`."""

    exit_code = 1


class InputError(MoefoldError):
    """What the user gave cannot be used: a file, an option, a model."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint is missing, broken, or of a family that moefold cannot read."""


class TextError(InputError):
    """A text source is missing or too short."""


class PluginError(InputError):
    """A plugin is declared wrongly: a duplicate name, an unknown hook, a signature that cannot be read."""


class StageError(MoefoldError):
    """A stage failed while it ran."""


class StoreError(MoefoldError):
    """A stored result cannot be read or written."""


class FormatError(MoefoldError):
    """A packed tensor or its description does not follow its format."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a pipeline: where, what, and what to write instead.

    Line and column count from 1; both are 0 for a value from the command line, which `path` then names.
    """

    line: int
    column: int
    path: str
    message: str


class PipelineError(InputError):
    """All problems of one pipeline file, at once."""

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems = sorted(problems, key=lambda p: (p.line, p.column))
        super().__init__("\n".join(self._line(p) for p in self.problems))

    def _line(self, problem: Problem) -> str:
        where = [f"{self.source}:{problem.line}:{problem.column}"] if problem.line else []
        return ": ".join([*where, *([problem.path] if problem.path else []), problem.message])


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known name, or the list of known names when none is near."""
    names = sorted(set(known))
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(names)}" if names else ""
