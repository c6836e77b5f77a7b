"""What moefold asks this plugin for."""

from __future__ import annotations

from moefold import Codec, hookimpl
from moefold_kernels import Backend
from moefold_log8.backend import Log8Triton
from moefold_log8.codec import Log8


@hookimpl
def moefold_codecs() -> list[type[Codec]]:
    return [Log8]


@hookimpl
def moefold_backends() -> list[Backend]:
    return [Log8Triton()]
