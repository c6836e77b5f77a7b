"""plan.json: which experts merge, and how, as a file to look at, to change by hand, and to run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moefold import Json, MergePlan, Packed, Replacement
from moefold.errors import FormatError, InputError, suggest
from moefold_plugins.damage import FORMATS

NAME = "plan.json"
VERSION = 1
_KEYS = ("version", "model", "budget", "protected", "layers")
_LAYER = ("format", "pairs", "alone", "damage")


def plan_text(plan: MergePlan) -> str:
    """The file: a line for each layer."""
    head = {"version": VERSION, "model": plan.model, "budget": plan.budget, "protected": plan.protected}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    layers = ",\n".join(f"    {json.dumps(number)}: {json.dumps(layer)}" for number, layer in plan.layers.items())
    return "\n".join(["{", *lines, f'  "layers": {{\n{layers}\n  }}', "}", ""])


def check_plan(number: int, value: Replacement | None, plan: MergePlan) -> None:
    """Raises FormatError where a layer is not what the plan says, and would not have the bytes that it counts on."""
    wanted = plan.groups(number)
    pairs, name = (value.pairs, value.format) if isinstance(value, Packed) else ([], None)
    if pairs != wanted.members or (pairs and name != wanted.format):
        raise FormatError(
            f"layer {number}: the plan has {len(wanted.members)} pairs in {wanted.format or 'no format'}, and "
            f"{len(pairs)} in {name or 'no format'} came; write pair.planned for pairs and pack.planned for packing"
        )


def plan_digest(path: Path) -> Json:
    """What the file chooses, whatever else it says: a digest, or the reason why there is none."""
    try:
        read = load(path)
        chosen = [(n, one.get("format"), one.get("pairs")) for n, one in read["layers"].items()]
    except (InputError, AttributeError, KeyError, TypeError) as error:
        return f"unread: {error}"  # the stage says it, with what to write
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def load(path: Path) -> dict[str, Any]:
    """The file as JSON; raises InputError when it is none, or not one of a plan."""
    if path.is_dir():
        path = path / NAME
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}; mend this line") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; name a {NAME} that a run wrote, or its directory") from error
    if not isinstance(read, dict) or not isinstance(read.get("layers"), dict):
        raise InputError(f'{path} is no plan; it needs "layers": {{"0": {{"format": "exponent", "pairs": [[0, 1]]}}}}')
    if read.get("version", VERSION) != VERSION:
        raise InputError(f"{path} is a plan of version {read['version']}; this moefold reads version {VERSION}")
    return read


def read_plan(path: Path, model: Mapping[str, list[int]]) -> MergePlan:
    """A plan for the model whose layers have so many experts, of so many weights each.

    Raises InputError with all that is wrong with it.
    """
    read = load(path)
    problems = [f"unknown key {key}{suggest(key, _KEYS)}" for key in read if key not in _KEYS]
    problems += _other_model(read, model)
    layers = {}
    for number, (count, _) in model.items():
        if number in read["layers"]:
            layer = read["layers"][number]
            found = list(_problems(layer, count))
            problems += [f"layer {number}: {problem}" for problem in found]
            layers[number] = {} if found else _layer(layer, count)
        else:
            problems.append(f'layer {number} is missing; write "{number}": {{"pairs": []}} to leave it as it is')
    problems += [f"layer {n}: the model has no such layer with experts" for n in read["layers"] if n not in model]
    if problems:
        raise InputError(f"{path}: " + "\n".join(problems))
    return MergePlan(layers, dict(model))


def _other_model(read: Mapping[str, Any], model: Mapping[str, list[int]]) -> Iterator[str]:
    """What the plan says of the model that it was made for, where that is another."""
    told = read.get("model", {})
    for number in model if isinstance(told, dict) else ():
        if number in told and told[number] != model[number]:
            yield (
                f"the plan is for another model: its layer {number} has {_named(told[number])}, and this one's "
                f"{_named(model[number])}"
            )
            return


def _named(size: Any) -> str:
    known = isinstance(size, list) and len(size) == 2
    return f"{size[0]} experts of {size[1]} weights" if known else str(size)


def _problems(layer: Any, count: int) -> Iterator[str]:
    if not isinstance(layer, dict):
        yield 'write a mapping: {"format": "exponent", "pairs": [[0, 1]]}'
        return
    yield from (f"unknown key {key}{suggest(key, _LAYER)}" for key in layer if key not in _LAYER)
    pairs, alone, name = layer.get("pairs"), layer.get("alone"), layer.get("format")
    if not isinstance(pairs, list) or not all(_numbers(pair) and len(pair) == 2 for pair in pairs):
        yield '"pairs" is a list of pairs of experts: [[0, 1], [2, 3]]'
        return
    if alone is not None and not _numbers(alone):
        yield '"alone" is a list of experts; leave it out for all that are in no pair'
        return
    if pairs and name not in FORMATS:
        yield f"format {name}{suggest(str(name), FORMATS)}; known are {', '.join(FORMATS)}"
    named = [expert for pair in pairs for expert in pair] + (alone or [])
    for expert in dict.fromkeys(named):
        if not 0 <= expert < count:
            yield f"there is no expert {expert}; the layer has 0 to {count - 1}"
        elif named.count(expert) > 1:
            yield f"expert {expert} is there {named.count(expert)} times; keep it in one place"
    if alone is not None and (gone := sorted(set(range(count)) - set(named))):
        yield f"experts {gone} are nowhere; add them to a pair or to alone, or leave alone out"


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _layer(layer: Mapping[str, Any], count: int) -> dict[str, Json]:
    pairs = sorted(sorted(pair) for pair in layer["pairs"])
    paired = {expert for pair in pairs for expert in pair}
    return {
        "format": layer["format"] if pairs else None,
        "pairs": pairs,
        "alone": [expert for expert in range(count) if expert not in paired],
        "damage": [None] * len(pairs),
    }
