"""config.json of a saved checkpoint: the source's, edited and never made anew (transformers renames keys on saving)."""

from __future__ import annotations

import json
from collections.abc import Mapping

from moefold import Checkpoint, Json
from moefold_kernels import LayerEntry, read_config, write_config

KEY = "quantization_config"


def config_text(
    checkpoint: Checkpoint,
    changes: Mapping[str, Json],
    entries: Mapping[int, LayerEntry],
    other: Mapping[str, Json] | None,
) -> str:
    """The source's text, untouched where it can be, and at its end our entry, one line per layer, or another method's.

    `changes` are keys of its text part, for composite models. Given both, the other method's stands inside ours.
    """
    config = _changed(checkpoint.config, changes)
    if other is not None and not entries:
        return json.dumps(config | {KEY: other}, indent=2) + "\n"
    source = (checkpoint.path / "config.json").read_text(encoding="utf-8")
    if config != checkpoint.config:
        source = json.dumps(config, indent=2) + "\n"
    if not entries:
        return source
    entry = write_config(entries, other)
    read_config(json.loads(json.dumps(entry)))  # what is written must be what readers accept
    lines = ",\n".join(f"      {json.dumps(number)}: {json.dumps(layer)}" for number, layer in entry["layers"].items())
    head = json.dumps({name: value for name, value in entry.items() if name != "layers"})
    text = source.rstrip().removesuffix("}").rstrip()
    comma = "" if text.endswith("{") else ","
    return f'{text}{comma}\n  "{KEY}": {{\n    {head[1:-1]},\n    "layers": {{\n{lines}\n    }}\n  }}\n}}\n'


def _changed(config: Mapping[str, Json], changes: Mapping[str, Json]) -> dict[str, Json]:
    """The configuration without the source's own entry, whose layers are among ours, and with the changes."""
    rest = {name: value for name, value in config.items() if name != KEY}
    part = rest.get("text_config")
    return rest | {"text_config": part | dict(changes)} if isinstance(part, dict) and changes else rest | dict(changes)
