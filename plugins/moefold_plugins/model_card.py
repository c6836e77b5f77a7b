"""The model card of a packed checkpoint: how it was made, what it holds, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from moefold import Json, Provenance

_CARD = """\
---
{front}library_name: transformers
tags:
- moefold
- mixture-of-experts
---
# {title}

Compressed by moefold {version}: experts of a layer share weights in pairs.

## Loading

```python
import moefold_kernels, transformers  # pip install moefold
model = transformers.AutoModelForCausalLM.from_pretrained("path/of/this/directory")
```

## What it holds

| | before | after | ratio |
|---|---|---|---|
{sizes}

{layers}

{masks}

{starved}

## How it was made

Source: `{model}`, fingerprint `{fingerprint}`.

| step | stage | version | options |
|---|---|---|---|
{steps}
"""


def write_card(title: str, provenance: Provenance, figures: Mapping[str, Json], version: str) -> str:
    """The card as Markdown with the hub's front matter."""
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", provenance.model) and not provenance.model.startswith(".")
    return _CARD.format(
        front=f"base_model: {provenance.model}\n" if hub_id else "",
        title=title,
        version=version,
        sizes="\n".join(
            _size(name, figures[key]) for name, key in (("experts", "expert_bytes"), ("checkpoint", "checkpoint_bytes"))
        ),
        layers=f"{figures['packed_layers']} of {figures['layers']} layers with experts are packed, format "
        f"`{figures['format']}`; the others are as in the source.",
        masks=_masks(figures),
        starved=_starved(figures["starved"]),
        model=provenance.model,
        fingerprint=provenance.fingerprint,
        steps="\n".join(_step(step) for step in provenance.steps),
    )


def _size(name: str, sizes: Mapping[str, int]) -> str:
    return f"| {name} | {sizes['before']:,} bytes | {sizes['after']:,} bytes | {sizes['after'] / sizes['before']:.3f} |"


def _masks(figures: Mapping[str, Json]) -> str:
    share = ", ".join(f"{name} {part:.1%}" for name, part in figures["masks"].items())
    return (
        f"Positions of merged matrices: {share} (own: only the first expert of the pair keeps it; other: only the "
        f"second). Clipped: {figures['clipped']:,}. Flushed to zero: {figures['flushed']:,}."
    )


def _starved(starved: Mapping[str, list[int]] | None) -> str:
    if starved is None:
        return "Merging used no calibration."
    if not starved:
        return "Every expert saw enough calibration tokens."
    lines = "\n".join(f"- layer {number}: experts {', '.join(map(str, who))}" for number, who in starved.items())
    return f"Experts that saw too few calibration tokens for figures of their own:\n\n{lines}"


def _step(step: Mapping[str, Json]) -> str:
    options = json.dumps(step.get("with", {}), sort_keys=True, default=str).replace("|", "\\|")
    return f"| {step.get('id')} | {step.get('uses')} | {step.get('version')} | `{options}` |"
