"""Reports held to their schema more strictly than readers do: nothing may be in them that it does not name."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from moefold.artifact import finite
from moefold.report_schema import json_schema


def strictly(report: dict[str, Any]) -> list[str]:
    """What a report has that its schema does not allow, or does not name; as a program that reads the file sees it."""
    schema = json_schema()
    for name, part in [("Report", schema), *schema["$defs"].items()]:
        part["additionalProperties"] = name in FREE
    found = jsonschema.Draft202012Validator(schema).iter_errors(json.loads(json.dumps(finite(report))))
    return sorted(f"{'.'.join(map(str, one.absolute_path))}: {one.message}" for one in found)


FREE = ("Saved",)
"""What the stages that make them add figures to."""
