"""What there is: pipelines, stages, codecs, backends, models; and what one of them takes and gives."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic_core import PydanticUndefined

from moefold import shipped
from moefold.artifact import Json
from moefold.errors import InputError, suggest
from moefold.hooks import Registry
from moefold.stage import Stage


def everything() -> dict[str, list[dict[str, str]]]:
    """Name, summary and distribution of all that pipelines can use."""
    registry = Registry.installed()
    return {
        "Pipelines": [
            {"name": name, "summary": shipped.summary(path), "source": "moefold"}
            for name, path in shipped.names().items()
        ],
        "Stages": [
            {"name": name, "summary": stage.summary, "source": registry.stages.source(name)}
            for name, stage in registry.stages.items()
        ],
        "Codecs": [
            {"name": n, "summary": _first_line(c), "source": registry.codecs.source(n)}
            for n, c in registry.codecs.items()
        ],
        "Kernel backends": [
            {"name": b.name, "summary": _first_line(type(b)), "source": registry.backends.source(b.name)}
            for b in registry.ordered_backends()
        ],
        "Models": [
            {"name": n, "summary": "ships with its plugin", "source": registry.models.source(n)}
            for n in registry.models
        ],
    }


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]


def one(name: str) -> str:
    """A stage in words, or a shipped pipeline's text; raises InputError with the nearest name."""
    registry = Registry.installed()
    if name in registry.stages:
        return _stage(registry.stages[name], registry.stages.source(name))
    if name in shipped.names():
        return shipped.names()[name].read_text(encoding="utf-8")
    raise InputError(f"nothing is called {name}{suggest(name, [*registry.stages, *shipped.names()])}")


def _stage(stage: Stage[Any, Any], source: str) -> str:
    lines = [f"{stage.name} (from {source}, version {stage.version})", "", inspect.getdoc(stage.function) or "", ""]
    lines.append("needs:" if stage.ports else "needs nothing from other stages")
    for port in stage.ports.values():
        lines.append(f"  {port.name}: {port.type.__name__}{_how(port.kind)}")
    lines.append(f"makes: {stage.produces.__name__} (kept: {stage.keep})")
    fields = stage.options.model_fields
    lines.append("options:" if fields else "options: none")
    schema = stage.options.model_json_schema().get("properties", {})
    for name, field in fields.items():
        default = "required" if field.default is PydanticUndefined else f"default {field.default!r}"
        lines.append(f"  {name} ({_type(schema.get(name, {}))}, {default}): {field.description or ''}".rstrip(": "))
    return "\n".join(lines)


def _how(kind: str) -> str:
    return {
        "one": "",
        "optional": ", optional",
        "previous": " of the layer before",
        "layers": " of all layers",
        "optional layers": " of all layers, optional",
        "many": ", one or several",
    }[kind]


def _type(schema: dict[str, Json]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(s) for s in schema["anyOf"])
    if "enum" in schema:
        return "|".join(map(str, schema["enum"]))
    limits = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in limits.items() if key in schema]
    return " ".join([str(schema.get("type", "any")), ", ".join(bounds)]).strip()
