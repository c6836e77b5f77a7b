"""Registers the formats with transformers when transformers is used, and not before.

`import moefold_kernels` must need torch only and be quick (transformers' modelling code alone takes seconds to import),
yet be all that a user writes before `AutoModelForCausalLM.from_pretrained`. So it leaves a finder that waits for
`transformers.modeling_utils`, which no model loads without, and registers as soon as that module is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.modeling_utils"


def arm() -> None:
    """Register now if transformers' modelling code is loaded, else as soon as it is."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    """Tell transformers of the formats; a transformers that lacks what that takes goes on without, and is told so."""
    try:
        importlib.import_module("moefold_kernels.transformers")
    except ImportError as error:
        warnings.warn(
            f"packed checkpoints cannot be loaded by this transformers ({error}): it takes transformers 5.17 or later "
            "and safetensors",
            stacklevel=2,
        )


class _Waiting(MetaPathFinder):
    """Finds the awaited module as others do, and has registration follow its execution."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)  # once: and the look-up below must not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Following(spec.loader)
        return spec


class _Following(Loader):
    """Loads as the loader it wraps does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # what inspect and pickle look at
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
