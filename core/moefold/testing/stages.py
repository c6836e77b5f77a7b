"""`check_stage`: what every stage owes the runner."""

from __future__ import annotations

import inspect
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moefold import Checkpoint, Layer
from moefold.artifact import Artifact
from moefold.artifacts import Experts
from moefold.errors import InputError
from moefold.stage import Context, Layers, Port, Provenance, Stage
from moefold.testing import unread
from moefold.testing.comparing import difference, snapshot
from moefold.testing.failures import CheckError, failing, require
from moefold.testing.model import small_model
from moefold.testing.sound import sound
from moefold.testing.world import Watched, World

MODELS: tuple[dict[str, int], ...] = (
    {"experts": 2, "top_k": 1, "hidden": 16, "inner": 8},
    {"experts": 5, "top_k": 2, "hidden": 64, "inner": 32},
)
"""The smallest there can be, and one with an odd number of experts, one of which no calibration token reaches."""

Given = Mapping[str, Any] | Callable[[World], Mapping[str, Any]]
"""Values by name, or a function that makes them for a world."""

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def check_stage(
    stage: Stage[Any, Any],
    *,
    options: Given | None = None,
    inputs: Given | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Call a stage on small models and raise CheckError for what the runner, the store or the report would trip over.

    Checked: a docstring and described options, every one of which is read; it runs on a model of two experts, and on
    five of which one saw no token, on the first layer and on the last; inputs, options and torch's default dtype stay
    as they were; the same inputs give the same result, bit for bit, whatever the global random generators hold; the
    result is of the promised kind, holds no NaN, is a partition of the experts (Groups) or of every two of them
    (Similarity), and comes back from the store as it was; its facts are JSON; of the model's layers it reads only its
    own; with optional inputs and without.

    `options` are those that the stage needs, `inputs` artifacts by the name of the input, for kinds that World cannot
    make; each may be a function of the World. `checkpoint`: try it on this one instead of the small ones.
    """
    if not isinstance(stage, Stage):
        raise CheckError(f"{getattr(stage, '__name__', stage)}: this is no stage; write @stage(NAME) above it")
    what = f"stage {stage.name}"
    _declared(stage, what)
    if checkpoint is not None:
        return _on(stage, what, Watched(checkpoint.path), options, inputs)
    with tempfile.TemporaryDirectory() as folder:
        for sizes in MODELS:
            path = Path(folder) / f"{sizes['experts']}"
            small_model(path, **sizes)
            _on(stage, f"{what} (model of {sizes['experts']} experts)", Watched(path), options, inputs)
    return None


def _declared(stage: Stage[Any, Any], what: str) -> None:
    require(bool(re.fullmatch(r"[a-z][a-z0-9_.]*", stage.name)), what, "names are lower-case words, joined by . or _")
    require(bool(stage.summary), what, "it has no docstring; `moefold list` shows its first line")
    for name, field in stage.options.model_fields.items():
        require(name not in stage.ports, what, f"input {name} and option {name} have one name; rename one of them")
        how = f"option {name} has no description; write Annotated[TYPE, Field(description=...)]"
        require(bool(field.description), what, how)
    named = inspect.signature(stage.function).parameters
    options = [name for name in stage.options.model_fields if name in named]  # those of a codec come as **options
    unread.require_read(what, options, unread.named_in(stage.function))
    require(stage.version >= 1, what, f"version {stage.version}: count from 1")


def _on(stage: Stage[Any, Any], what: str, checkpoint: Watched, options: Given | None, inputs: Given | None) -> None:
    world = World(checkpoint)
    chosen = _options(stage, what, _given(options, world))
    given = _given(inputs, world)
    if unknown := sorted(set(given) - set(stage.ports)):
        raise InputError(f"{stage.name} has no input {unknown[0]}; it has: {', '.join(stage.ports) or 'none'}")
    for full in (True, False):
        values = _inputs(stage, world, given, full)
        if full or any(value is None for value in values.values()):
            _try(stage, what, world, values, chosen)
    _on_the_last_layer(stage, what, checkpoint, options, inputs)


def _on_the_last_layer(
    stage: Stage[Any, Any], what: str, checkpoint: Watched, options: Given | None, inputs: Given | None
) -> None:
    """Once more where nothing is first any more; inputs that are given as values belong to the first layer."""
    position = len(checkpoint.layers()) - 1
    if not position or Layer not in stage.injected.values() or (inputs is not None and not callable(inputs)):
        return
    world = World(checkpoint, position)
    values = _inputs(stage, world, _given(inputs, world), full=True)
    where = f"{what}, layer {world.layer.number}"
    value = _call(stage, where, world, values, _options(stage, what, _given(options, world)), seed=1)
    _kind(stage, where, value)
    sound(value, where, _counts(world, values))


def _counts(world: World, values: Mapping[str, Any]) -> set[int]:
    """How many experts the layer has, or what stands for them."""
    return {world.layer.expert_count} | {value.count for value in values.values() if isinstance(value, Experts)}


def _given(given: Given | None, world: World) -> Mapping[str, Any]:
    return given(world) if callable(given) else given or {}


def _options(stage: Stage[Any, Any], what: str, given: Mapping[str, Any]) -> dict[str, Any]:
    with failing(what, "its options cannot be read (give what it needs as options={...})"):
        read = stage.options.model_validate(dict(given))
    with failing(what, "its options are no JSON, and a key is made of them"):
        json.dumps(read.model_dump(mode="json"))
    return {name: getattr(read, name) for name in stage.options.model_fields}


def _inputs(stage: Stage[Any, Any], world: World, given: Mapping[str, Any], full: bool) -> dict[str, Any]:
    """A value for each port; without `full`, nothing for those that may stay open."""
    return {name: _input(port, world, given, full) for name, port in stage.ports.items()}


def _input(port: Port, world: World, given: Mapping[str, Any], full: bool) -> Any:
    open_ = port.kind in ("optional", "previous", "optional layers")
    if open_ and not (full and (port.name in given or world.can_make(port.type))):
        return None
    if port.name in given:
        return given[port.name]
    if "layers" in port.kind:
        return Layers({number: other.make(port.type) for number, other in world.every_layer().items()})
    made = world.make(port.type)
    return (made,) if port.kind == "many" else made


def _try(stage: Stage[Any, Any], what: str, world: World, values: dict[str, Any], options: dict[str, Any]) -> None:
    before, chosen, default = snapshot(values), snapshot(options), torch.get_default_dtype()
    if isinstance(world.checkpoint, Watched):
        world.checkpoint.read_names.clear()
    first = _call(stage, what, world, values, options, seed=1)
    if changed := difference(before, values):
        raise CheckError(
            f"{what}: it changes an input in place ({changed}); others read that value too: work on a copy"
        )
    if changed := difference(chosen, options):
        raise CheckError(f"{what}: it changes an option in place ({changed}), which the next call sees; work on a copy")
    after = torch.get_default_dtype()
    torch.set_default_dtype(default)
    require(after == default, what, f"it leaves torch's default dtype at {after}, which every other stage then has")
    _reads_its_own_layer(stage, what, world)
    _kind(stage, what, first)
    _facts(what, first)
    outside = type(first).intact is not Artifact.intact  # what it wrote carries a time
    if not outside and stage.repeatable:
        second = _call(stage, what, world, values, options, seed=2)
        if found := difference(first, second):
            raise CheckError(
                f"{what}: the same inputs gave two results ({found}); take chance from context.generator or a seed "
                "option, and nothing from the clock, the order of a set or global generators"
            )
    sound(first, what, _counts(world, values))
    if not stage.produces.transient:
        _stored(what, first)


def _call(
    stage: Stage[Any, Any], what: str, world: World, values: dict[str, Any], options: dict[str, Any], seed: int
) -> Any:
    injected = {name: _injected(kind, world) for name, kind in stage.injected.items()}
    with _global_chance(seed), torch.inference_mode(), failing(what, "it fails"):
        return stage(**values, **injected, **options)


def _injected(kind: type, world: World) -> Layer | Checkpoint | Context | Provenance:
    made: dict[type, Any] = {Layer: world.layer, Checkpoint: world.checkpoint, Provenance: world.provenance()}
    return made.get(kind) or world.context()


@contextmanager
def _global_chance(seed: int) -> Iterator[None]:
    """The global generators at some state, and as they were afterwards."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def _reads_its_own_layer(stage: Stage[Any, Any], what: str, world: World) -> None:
    """Only where the stage reads through its `Layer`, at the first layer, before which there is nothing to carry on."""
    takes = stage.injected.values()
    if Layer not in takes or Checkpoint in takes or not isinstance(world.checkpoint, Watched):
        return
    found = {int(match[1]) for name in world.checkpoint.read_names if (match := _LAYER.search(name))}
    others = sorted(found - {world.layer.number})
    which = f"it reads weights of layer {others[0]} while it works on layer {world.layer.number}" if others else ""
    require(not others, what, f"{which}; a stage of one layer takes other layers' values as Previous[T] or Layers[T]")


def _kind(stage: Stage[Any, Any], what: str, value: Any) -> None:
    promised = stage.produces.__name__
    require(isinstance(value, stage.produces), what, f"it returned {type(value).__name__} where {promised} is promised")


def _facts(what: str, value: Artifact) -> None:
    with failing(what, f"facts() of {type(value).__name__} are no JSON (they go into the report)"):
        facts = value.facts()
        require(isinstance(facts, dict), what, f"facts() gave {type(facts).__name__}; a report wants a dict")
        json.dumps(facts, allow_nan=False)


def _stored(what: str, value: Artifact) -> None:
    kind = type(value).__name__
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "value.safetensors"
        with failing(what, f"its {kind} cannot be stored and read again"):
            value.save(path)
            loaded = type(value).load(path)
    if found := difference(value, loaded):
        raise CheckError(
            f"{what}: its {kind} comes back from the store changed ({found}); fields are tensors, dicts of tensors, or "
            "JSON: lists, not tuples, and dicts with names for keys"
        )
