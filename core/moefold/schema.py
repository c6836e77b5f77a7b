"""The command `moefold schema`, and the JSON schema of a pipeline file: what editors complete, describe and check.

What the schema cannot say (wiring, layers, models) `moefold validate` does. It is made from what is installed, so that
stages of plugins are in it.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from moefold import report_schema
from moefold.artifact import Json
from moefold.hooks import Registry
from moefold.pipeline import MODEL
from moefold.stage import Stage

EPILOG = """
    Examples:

        moefold schema > pipeline.schema.json

        moefold schema report > report.schema.json

    In a pipeline's first line an editor reads `# yaml-language-server: $schema=pipeline.schema.json`.
"""
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Document(StrEnum):
    """What has a schema."""

    pipeline = "pipeline"
    report = "report"


def schema(
    document: Annotated[
        Document, typer.Argument(help="pipeline: of pipeline files, with what is installed; report: of report.json.")
    ] = Document.pipeline,
) -> None:
    """Print the JSON schema of pipeline files, for editors, or of report.json, for programs that read it."""
    made = report_schema.json_schema() if document is Document.report else pipeline_schema(Registry.installed())
    typer.echo(json.dumps(made, indent=2))


def pipeline_schema(registry: Registry) -> dict[str, Json]:
    """The schema of a pipeline file with the stages that are installed."""
    stages = [stage for name, stage in sorted(registry.stages.items()) if name != MODEL]
    return {
        "$schema": _DIALECT,
        "title": "moefold pipeline",
        "type": "object",
        "required": ["model", "stages"],
        "additionalProperties": False,
        "properties": {
            "model": _model(),
            "stages": {"type": "array", "minItems": 1, "items": _one_of(stages)},
        },
        "$defs": {stage.name: _stage(stage) for stage in stages},
    }


def _model() -> dict[str, Json]:
    named = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "revision": {"type": "string"}},
    }
    told = "demo (ships with moefold), a directory, or a hub id such as Qwen/Qwen3-30B-A3B"
    return {"description": told, "anyOf": [{"type": "string", "minLength": 1}, named]}


def _one_of(stages: list[Stage[Any, Any]]) -> dict[str, Json]:
    """By the name under `uses`: an editor then completes that stage's options alone."""
    chosen = [
        {"if": {"properties": {"uses": {"const": s.name}}}, "then": {"$ref": f"#/$defs/{s.name}"}} for s in stages
    ]
    return {
        "type": "object",
        "required": ["uses"],
        "properties": {
            "uses": {
                "description": "which stage",
                "enum": [stage.name for stage in stages],
                "markdownEnumDescriptions": [stage.summary for stage in stages],  # editors show them beside the names
            },
            "id": {"type": "string", "description": "what other stages call it (default: the stage's name)"},
        },
        "allOf": chosen,
    }


def _stage(stage: Stage[Any, Any]) -> dict[str, Json]:
    options = stage.options.model_json_schema()
    definitions = options.pop("$defs", None)  # references in it are to the root of the options' own schema
    if definitions:
        options = _inlined(options, definitions)
    ports = {
        name: {
            "description": f"id of a stage that makes {port.type.__name__}",
            "type": ["string", "array"] if port.kind == "many" else "string",
        }
        for name, port in stage.ports.items()
    }
    options.pop("title", None)
    return {
        "description": stage.summary,
        "additionalProperties": False,
        "required": ["uses", "with"] if options.get("required") else ["uses"],
        "properties": {
            "uses": {"const": stage.name, "description": stage.summary},
            "id": {"type": "string"},
            "with": options,
            "needs": {"type": "object", "additionalProperties": False, "properties": ports},
        },
    }


def _inlined(value: Json, definitions: dict[str, Json]) -> Json:
    """The same schema with every reference to the options' own definitions written out."""
    if isinstance(value, dict):
        reference = value.get("$ref", "")
        if isinstance(reference, str) and reference.startswith("#/$defs/"):
            return _inlined(definitions[reference.removeprefix("#/$defs/")], definitions)
        return {key: _inlined(inner, definitions) for key, inner in value.items()}
    return [_inlined(inner, definitions) for inner in value] if isinstance(value, list) else value
