"""How a check says no, and how it says that it could not look."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from contextlib import contextmanager

from moefold.errors import InputError


class CheckError(AssertionError):
    """The message names what was checked and its defect."""


class Unchecked(unittest.SkipTest):
    """Nothing could be checked here (a GPU's backend where there is none): pytest shows the test as skipped."""


def require(holds: bool, what: str, defect: str) -> None:
    """Raise CheckError with `what: defect` unless it holds."""
    if not holds:
        raise CheckError(f"{what}: {defect}")


@contextmanager
def failing(what: str, doing: str) -> Iterator[None]:
    """Whatever is raised inside is a defect of `what`; the error it was stays its cause."""
    try:
        yield
    except (CheckError, Unchecked, InputError) as error:
        if isinstance(error, CheckError | Unchecked):
            raise
        raise CheckError(f"{what}: {doing}: {error}") from error
    except Exception as error:
        raise CheckError(f"{what}: {doing}: {type(error).__name__}: {error}") from error
