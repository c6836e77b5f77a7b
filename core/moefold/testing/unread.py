"""Options that are accepted and never looked at: they would promise something and do nothing."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable
from typing import Any

from moefold.codec import Codec
from moefold.testing.failures import require


def watched(codec: Codec) -> tuple[Codec, set[str]]:
    """The same codec, and the names of the options that were read from it so far."""
    kind, seen = type(codec), set[str]()

    def look(self: Codec, name: str) -> Any:
        if name in kind.model_fields:
            seen.add(name)
        return object.__getattribute__(self, name)

    body = {"__getattribute__": look, "__doc__": kind.__doc__, "__module__": kind.__module__}
    made = codec.model_copy()
    object.__setattr__(made, "__class__", types.new_class(kind.__name__, (kind,), exec_body=lambda at: at.update(body)))
    return made, seen


def named_in(function: Callable[..., Any]) -> set[str] | None:
    """The names that a function's body reads; None where its source is not to be had, or it reads all of them."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return None if found & {"locals", "vars"} else found


def require_read(what: str, options: Iterable[str], read: set[str] | None) -> None:
    """Raise CheckError for the first option that is not read."""
    for name in options:
        said = f"option {name} is accepted and never read, so it changes nothing; use it, or take it away"
        require(read is None or name in read, what, said)
