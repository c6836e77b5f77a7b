"""The hooks, all of them, and the registry of what plugins gave.

A plugin is an entry point in the group `moefold` that names a module; the module's `@hookimpl` functions return
things that carry their own names. The built-ins are registered the same way.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import pluggy

from moefold.codec import Codec, pack_stage, unpack_stage
from moefold.errors import InputError, PluginError, suggest
from moefold.stage import Stage

if TYPE_CHECKING:
    from moefold.measuring import Benchmark
    from moefold_kernels.backend import Backend

hookspec = pluggy.HookspecMarker("moefold")
hookimpl = pluggy.HookimplMarker("moefold")
"""Stands above each function of a plugin's module that moefold is to call; the functions are named like the hooks."""

GROUP = "moefold"
"""The entry point group in which a distribution names its plugin modules."""


@hookspec
def moefold_stages() -> Iterable[Stage[Any, Any]]:  # type: ignore[empty-body]
    """Stages that pipelines can use."""


@hookspec
def moefold_codecs() -> Iterable[type[Codec]]:  # type: ignore[empty-body]
    """Codecs; each also becomes the stages pack.<name> and unpack.<name>."""


@hookspec
def moefold_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Kernel backends, best first."""


@hookspec
def moefold_models() -> Mapping[str, Path]:  # type: ignore[empty-body]
    """Checkpoint directories that ship with a plugin, by the name that stands for them in `model:`."""


@hookspec
def moefold_benchmarks() -> Iterable[Benchmark]:  # type: ignore[empty-body]
    """What `moefold bench record` measures, and `moefold bench compare` holds against a history."""


@hookspec(firstresult=True)
def moefold_executor(name: str, workers: int) -> Executor | None:
    """What `--executor name` means; None when the name is not this plugin's (the first answer counts)."""


T = TypeVar("T")


@dataclass
class Named(Mapping[str, T], Generic[T]):
    """Things by name, each with the distribution that it came from."""

    what: str
    _items: dict[str, tuple[T, str]] = field(default_factory=dict)

    def add(self, name: str, item: T, source: str) -> None:
        """Raises PluginError, naming both sides, when the name is taken."""
        if name in self._items:
            raise PluginError(
                f"two plugins give the {self.what} {name}: {self._items[name][1]} and {source}; "
                "uninstall one of them or rename its " + self.what
            )
        self._items[name] = (item, source)

    def source(self, name: str) -> str:
        """The distribution that gave `name`."""
        return self._items[name][1]

    def __getitem__(self, name: str) -> T:
        return self._items[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)


class Registry:
    """What plugins gave, by name."""

    def __init__(self, plugins: Iterable[tuple[str, Any, str]]) -> None:
        """`plugins` are (entry point name, module or object, distribution)."""
        self.stages: Named[Stage[Any, Any]] = Named("stage")
        self.codecs: Named[type[Codec]] = Named("codec")
        self.backends: Named[Backend] = Named("backend")
        self.models: Named[Path] = Named("model")
        self.benchmarks: Named[Benchmark] = Named("benchmark")
        self._order: list[str] = []
        self._manager = pluggy.PluginManager("moefold")
        self._manager.add_hookspecs(_this_module())
        for name, plugin, source in plugins:
            self._register(name, plugin, source)
        self._check()

    @classmethod
    def installed(cls) -> Registry:
        """The registry of every installed distribution's plugins (read once a process)."""
        return _installed()

    @classmethod
    def installed_and(cls, plugins: Iterable[Any]) -> Registry:
        """What is installed and these modules or objects; one that is both counts once."""
        loaded = [_loaded(point) for point in _points()]
        known = {id(module) for _, module, _ in loaded}
        more = [(f"test {i}", plugin, "test") for i, plugin in enumerate(plugins) if id(plugin) not in known]
        return cls([*loaded, *more])

    def _register(self, name: str, plugin: Any, source: str) -> None:
        self._manager.register(plugin, name=f"{source}:{name}")
        for one in self._given(plugin, "moefold_stages", source):
            self.stages.add(one.name, one, source)
        for codec in self._given(plugin, "moefold_codecs", source):
            self.codecs.add(codec.name, codec, source)
            for made in (pack_stage(codec), unpack_stage(codec)):
                self.stages.add(made.name, made, source)
        for backend in self._given(plugin, "moefold_backends", source):
            self.backends.add(backend.name, backend, source)
            self._order.append(backend.name)
        for model, path in dict(self._given(plugin, "moefold_models", source, dict)).items():
            self.models.add(model, path, source)
        for benchmark in self._given(plugin, "moefold_benchmarks", source):
            self.benchmarks.add(benchmark.name, benchmark, source)

    def _given(self, plugin: Any, hook: str, source: str, collect: Callable[[Any], Any] = list) -> Any:
        implementation = getattr(plugin, hook, None)
        if implementation is None:
            return collect(())
        if not hasattr(implementation, "moefold_impl"):
            raise PluginError(f"{source}: {hook} has no @hookimpl; write `from moefold import hookimpl` above it")
        try:
            return collect(implementation())
        except TypeError as error:
            raise PluginError(
                f"{source}: {hook}() must take nothing and return a {collect.__name__}: {error}"
            ) from error

    def _check(self) -> None:
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            known = [name for name in vars(_this_module()) if name.startswith("moefold_")]
            word = str(error).split("'")[1] if "'" in str(error) else ""
            raise PluginError(f"{error}{suggest(word, known)}") from error

    def stage(self, name: str) -> Stage[Any, Any]:
        """The stage of this name; raises InputError with the nearest name."""
        if name not in self.stages:
            raise InputError(f"unknown stage {name}{suggest(name, self.stages)}")
        return self.stages[name]

    def ordered_backends(self) -> list[Backend]:
        """Kernel backends in the order in which they are asked."""
        return [self.backends[name] for name in self._order]

    def executor(self, name: str, workers: int) -> Executor:
        """The executor that a plugin gives for `--executor name`."""
        found = self._manager.hook.moefold_executor(name=name, workers=workers)
        if found is None:
            raise InputError(f"no plugin gives the executor {name}; built in are inline and process")
        return cast(Executor, found)


def _this_module() -> Any:
    import moefold.hooks

    return moefold.hooks


@cache
def _installed() -> Registry:
    return Registry(_loaded(point) for point in _points())


def _points() -> list[importlib.metadata.EntryPoint]:
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)


def _loaded(point: importlib.metadata.EntryPoint) -> tuple[str, Any, str]:
    source = point.dist.name if point.dist else point.value
    try:
        module: Callable[..., Any] | Any = point.load()
    except Exception as error:
        raise PluginError(
            f"plugin {point.name} of {source} cannot be imported ({point.value}): {type(error).__name__}: {error}; "
            f"mend it or `pip uninstall {source}`"
        ) from error
    return point.name, module, source
