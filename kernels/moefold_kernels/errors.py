"""What the kernels package raises on purpose: a tree of its own, because it imports nothing of moefold."""

from __future__ import annotations


class KernelsError(Exception):
    """The root of this package's errors."""


class FormatError(KernelsError, ValueError):
    """Words, a window, or a checkpoint's description do not follow their format."""


class BackendError(KernelsError):
    """No backend, or not the one asked for, can do what is asked; the message has every reason."""


class BenchmarkError(KernelsError):
    """A benchmark cannot be run or read: an unknown case, a device that lacks something, a file of another kind."""


class WrongResultError(BenchmarkError):
    """What was to be timed does not compute the layer, so its time means nothing."""
