"""A stage is a function: `@stage` reads its signature.

Parameters before `*` are inputs: ports (artifact types) and what the runner injects by type (`Layer`, `Checkpoint`,
`Context`, `Provenance`). Parameters after `*` are options and become a pydantic model that forbids unknown keys. The
return type is the output.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, PydanticUserError, create_model

from moefold.artifact import Artifact, Json
from moefold.checkpoint import Checkpoint
from moefold.errors import PluginError
from moefold.layer import Layer

P = ParamSpec("P")
R = TypeVar("R", bound=Artifact)
T = TypeVar("T", bound=Artifact)

Keep = Literal["always", "until read", "never"]
"""How long a result lives: in the store for good; until its readers have read it; nowhere (each reader computes it)."""

Kind = Literal["one", "optional", "previous", "layers", "optional layers", "many"]


class _PreviousMark:
    """Marks a port that reads the layer before."""


Previous = Annotated[T | None, _PreviousMark]
"""The value of the layer before (None at the first layer)."""


class Layers(Mapping[int, T]):
    """The values of all layers by decoder layer number, each loaded when it is asked for and not kept."""

    def __init__(self, values: Mapping[int, T | Callable[[], T]]) -> None:
        self._values = dict(values)

    def __getitem__(self, number: int) -> T:
        value = self._values[number]
        return value() if callable(value) else value

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class Context:
    """Where a task computes, and its random generator, seeded by the task's key; nothing else, ever."""

    device: torch.device
    generator: torch.Generator


@dataclass(frozen=True)
class Provenance:
    """How a task came to be: the model and every step upstream, with versions, options and keys."""

    model: str
    fingerprint: str
    steps: tuple[Mapping[str, Json], ...]


INJECTED: tuple[type, ...] = (Layer, Checkpoint, Context, Provenance)


@dataclass(frozen=True)
class Port:
    """One input of a stage: the artifact type it takes, and how."""

    name: str
    type: type[Artifact]
    kind: Kind

    @property
    def required(self) -> bool:
        """Whether a pipeline without a provider for it is wrong."""
        return self.kind not in ("optional", "optional layers")


@dataclass(frozen=True)
class Stage(Generic[P, R]):
    """A function with a name, read: what it takes, what it can be told, what it gives."""

    name: str
    function: Callable[P, R]
    ports: Mapping[str, Port]
    injected: Mapping[str, type]
    options: type[BaseModel]
    produces: type[R]
    keep: Keep = "always"
    version: int = 1
    reads: Callable[..., Json] | None = None
    """Called with the options when a run is planned: a digest of what the stage reads beside its inputs."""
    repeatable: bool = True
    """False for a stage that measures the machine, so that the same inputs may give another result."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]


def stage(
    name: str,
    *,
    keep: Keep = "always",
    version: int = 1,
    reads: Callable[..., Json] | None = None,
    repeatable: bool = True,
) -> Callable[[Callable[P, R]], Stage[P, R]]:
    """Make a function a stage; raise `version` when its results change; `repeatable=False` if it measures the machine.

    Raises PluginError when the signature cannot be read as ports, options and one artifact.
    """

    def read(function: Callable[P, R]) -> Stage[P, R]:
        hints = _hints(name, function)
        produces = _output(name, hints.pop("return", None), keep)
        ports: dict[str, Port] = {}
        injected: dict[str, type] = {}
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise PluginError(f"stage {name}: *{parameter.name} cannot be wired; name each input and option")
            if parameter.name not in hints:
                raise PluginError(f"stage {name}: parameter {parameter.name} has no annotation; write its type")
            hint = hints[parameter.name]
            if parameter.kind is parameter.KEYWORD_ONLY:
                fields[parameter.name] = (hint, ... if parameter.default is parameter.empty else parameter.default)
            elif hint in INJECTED:
                injected[parameter.name] = hint
            else:
                ports[parameter.name] = _port(name, parameter.name, hint)
        return Stage(
            name, function, ports, injected, _options(name, fields), produces, keep, version, reads, repeatable
        )

    return read


def _hints(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        raise PluginError(
            f"stage {name}: its annotations cannot be read: {error}; import the types it names at the top of the "
            "module (not under TYPE_CHECKING)"
        ) from error


def _output(name: str, hint: Any, keep: Keep) -> Any:
    if not (isinstance(hint, type) and issubclass(hint, Artifact)):
        raise PluginError(f"stage {name}: the return type is {hint}; annotate it with one Artifact class")
    if hint.transient and keep != "never":
        raise PluginError(f'stage {name}: {hint.__name__} lives in memory only; write @stage(..., keep="never")')
    return hint


def _options(name: str, fields: dict[str, Any]) -> type[BaseModel]:
    config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=False)
    try:
        return create_model(f"{name} options", __config__=config, **fields)
    except PydanticUserError as error:
        raise PluginError(f"stage {name}: an option has a type that pydantic cannot check: {error.message}") from error


def _port(stage_name: str, name: str, hint: Any) -> Port:
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    inner = get_args(hint)[0] if marks else hint
    options = [a for a in get_args(inner) if a is not types.NoneType] if _is_union(inner) else [inner]
    optional = _is_union(inner) and types.NoneType in get_args(inner)
    if len(options) == 1:
        kind, artifact = _shape(options[0])
        if isinstance(artifact, type) and issubclass(artifact, Artifact):
            if _PreviousMark in marks:
                return Port(name, artifact, "previous")
            if optional:
                return Port(name, artifact, "optional layers" if kind == "layers" else "optional")
            return Port(name, artifact, kind)
    raise PluginError(
        f"stage {stage_name}: input {name} is {hint}; an input is an Artifact class T, T | None, Previous[T], "
        f"Layers[T], tuple[T, ...], or one of {', '.join(t.__name__ for t in INJECTED)}; options stand after *"
    )


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _shape(hint: Any) -> tuple[Kind, Any]:
    arguments = get_args(hint)
    if get_origin(hint) is Layers:
        return "layers", arguments[0]
    if get_origin(hint) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return "many", arguments[0]
    return "one", hint
