"""The model card of a compressed checkpoint: how it was made, what it holds, how to load it."""

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

Compressed by moefold {version}.

## Loading

```python
{imports}
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

_STOCK = "import transformers"


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
        imports="import moefold_kernels, transformers  # pip install moefold" if figures["needs_moefold"] else _STOCK,
        layers=_layers(figures),
        masks=_masks(figures),
        starved=_starved(figures["starved"]),
        model=provenance.model,
        fingerprint=provenance.fingerprint,
        steps="\n".join(_step(step) for step in provenance.steps),
    )


def _size(name: str, sizes: Mapping[str, int]) -> str:
    return f"| {name} | {sizes['before']:,} bytes | {sizes['after']:,} bytes | {sizes['after'] / sizes['before']:.3f} |"


def _layers(figures: Mapping[str, Json]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in figures["kinds"].items()) or "none changed"
    lines = [f"Of {figures['layers']} layers with experts: {kinds}; the others are as in the source."]
    if figures["quantized"]:
        lines.append(_quantized(figures))
    elif figures["format"] != "none":
        lines.append(f"Packed in the format `{figures['format']}`.")
    changed = {tuple(pair) for pair in figures["experts"].values() if pair[0] != pair[1]}
    if changed:
        lines.append("Experts per layer: " + ", ".join(f"{a} before, {b} after" for a, b in sorted(changed)) + ".")
    if "expanded" in figures["kinds"]:
        lines.append(
            "Expanded: each merged expert is repeated for every router output that leads to it, so that any reader "
            "takes the checkpoint for the source's architecture. That saves nothing, neither on disk nor in memory."
        )
    if figures["thin"]:
        listed = "\n".join(f"- layer {layer}: {', '.join(map(str, who))}" for layer, who in figures["thin"].items())
        lines.append(f"Merged experts that were fitted on few calibration tokens:\n\n{listed}")
    return "\n\n".join(lines)


def _quantized(figures: Mapping[str, Json]) -> str:
    readers = "transformers with moefold imported" if figures["needs_moefold"] else "transformers (and vLLM) by itself"
    text = (
        f"Experts are {figures['format']}, rounded to the nearest, as compressed-tensors stores them: loaded by "
        f"{readers}. transformers makes them dense as it loads, so that they are smaller on disk and not in memory."
    )
    if figures["format"] == "fp8" and not figures["needs_moefold"]:
        text += " vLLM also rounds what enters the experts to fp8; the figures here are of rounded weights alone."
    return text


def _masks(figures: Mapping[str, Json]) -> str:
    if "masks" not in figures:
        return ""
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
