"""What moefold finds through the entry point: this package's backends."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from moefold_kernels.backend import Backend, builtin

hookimpl = pluggy.HookimplMarker("moefold")


@hookimpl
def moefold_backends() -> Iterable[Backend]:
    """The kernels that come with moefold, best first."""
    return builtin()
