"""The stage `save`: a directory like any on the hub, with packed experts, that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from moefold import (
    Activity,
    Checkpoint,
    Json,
    Layers,
    Packed,
    Provenance,
    Saved,
    Stage,
    __version__,
    hookimpl,
    stage,
)
from moefold.artifacts import tensor_bytes
from moefold.errors import FormatError, InputError
from moefold_kernels import PackedLayer, layout, read_config, write_config
from moefold_kernels.checkpoint import METHOD
from moefold_plugins.model_card import write_card
from moefold_plugins.shards import Shards, check_size, flush, parse_size, write_text

CARD = "README.md"
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "NOTICE*")
_REWRITTEN = ("config.json", "*.index.json", "*.safetensors", "adapter_*", CARD)


@stage("save")
def save(
    checkpoint: Checkpoint,
    packed: Layers[Packed],
    activity: Layers[Activity] | None,
    provenance: Provenance,
    *,
    to: Annotated[Path, Field(description="the directory to write; one that moefold wrote before is replaced")],
    shard_size: Annotated[
        int | str, AfterValidator(check_size), Field(description="largest shard: bytes, or like 4GB")
    ] = "4GB",
) -> Saved:
    """Write a checkpoint with the packed experts in place of the source's."""
    target = Path(to).expanduser()
    _refuse(target, checkpoint)
    with _replacing(target) as directory:
        with Shards(directory, parse_size(shard_size)) as shards:
            entries, totals = _write_tensors(checkpoint, packed, shards)
        figures = _figures(checkpoint, totals, shards.total, activity)
        write_text(directory / "config.json", _config(checkpoint, entries))
        _copy_others(checkpoint.path, directory)
        write_text(directory / CARD, write_card(target.name, provenance, figures, __version__))
        return Saved.of(directory, str(target), figures, leave_out=CARD)


class _Totals:
    """What is summed over layers while each is in memory."""

    def __init__(self) -> None:
        self.before = self.after = self.layers = self.packed = 0
        self.counts: dict[str, int] = {}
        self.formats: set[str] = set()

    def add(self, packed: Packed, before: int, after: int) -> None:
        self.before += before
        self.after += after
        self.layers += 1
        self.packed += bool(packed.pairs)
        for name, count in packed.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.formats |= {packed.format} if packed.pairs else set()


def _write_tensors(
    checkpoint: Checkpoint, packed: Layers[Packed], shards: Shards
) -> tuple[dict[int, PackedLayer], _Totals]:
    """Copy what is not replaced, then each layer's experts; one layer is in memory at a time."""
    entries, totals = dict(checkpoint.packed_layers), _Totals()
    names = {layer.number: layer.names() for layer in checkpoint.layers()}
    if unknown := sorted(set(packed) - set(names)):
        raise FormatError(f"{checkpoint.path}: decoder layer {unknown[0]} has no routed experts to replace")
    keys = {number: set(place.keys) for number, place in names.items()}
    sizes = {number: sum(_bytes(checkpoint, key) for key in own) for number, own in keys.items()}
    experts = set[str]().union(*keys.values())
    with checkpoint.reading() as read:
        for key in checkpoint.weight_map:
            if key not in experts:
                shards.add(key, read(key))
        for number, place in names.items():
            layer = packed.get(number)
            if layer is not None and layer.pairs:
                entries[number] = _entry(place.prefix, place.matrix, layer)
                _write_layer(entries[number], layer, shards)
                totals.add(layer, sizes[number], layer.bytes())
                continue
            for key in place.keys:
                shards.add(key, read(key))
            totals.add(layer or Packed("", [], [], {}, {}, {}, {}), sizes[number], sizes[number])
    return entries, totals


def _entry(prefix: str, matrix: dict[str, str], layer: Packed) -> PackedLayer:
    if layer.format != layout.EXPONENT:
        raise FormatError(f"format {layer.format} has no checkpoint layout; save knows {layout.EXPONENT}")
    pairs = tuple((first, second) for first, second in layer.pairs)
    return PackedLayer(prefix, layer.settings, pairs, tuple(layer.dense), {name: matrix[name] for name in layer.words})


def _write_layer(entry: PackedLayer, layer: Packed, shards: Shards) -> None:
    for matrix, words in layer.words.items():
        for pair in range(len(layer.pairs)):
            shards.add(entry.packed(pair, matrix), words[pair])
        for number in range(len(layer.dense)):
            shards.add(entry.alone(number, matrix), layer.experts[matrix][number])
    shards.add(entry.tripwire, torch.empty(0, dtype=torch.bfloat16))


def _bytes(checkpoint: Checkpoint, key: str) -> int:
    shape, dtype = checkpoint.header(key)
    return tensor_bytes(torch.empty(shape, dtype=dtype, device="meta"))


def _figures(checkpoint: Checkpoint, totals: _Totals, after: int, activity: Layers[Activity] | None) -> dict[str, Json]:
    weights = max(totals.counts.get("weights", 0), 1)
    starved = None
    if activity is not None:
        found = ((number, value.starved) for number, value in activity.items())
        starved = {str(number): list(who) for number, who in found if who}
    return {
        "format": ", ".join(sorted(totals.formats)) or "none",
        "expert_bytes": {"before": totals.before, "after": totals.after},
        "checkpoint_bytes": {"before": sum(_bytes(checkpoint, key) for key in checkpoint.weight_map), "after": after},
        "masks": {name: totals.counts.get(name, 0) / weights for name in ("shared", "own", "other", "zero")},
        "clipped": totals.counts.get("clipped", 0),
        "flushed": totals.counts.get("flushed", 0),
        "starved": starved,
        "layers": totals.layers,
        "packed_layers": totals.packed,
    }


def _config(checkpoint: Checkpoint, entries: dict[int, PackedLayer]) -> str:
    """The source's config.json, its text untouched, with our entry at its end: one line per layer."""
    entry = write_config(entries)
    read_config(json.loads(json.dumps(entry)))  # what is written must be what readers accept
    source = (checkpoint.path / "config.json").read_text(encoding="utf-8")
    if not entries:
        return source
    lines = ",\n".join(f"      {json.dumps(number)}: {json.dumps(layer)}" for number, layer in entry["layers"].items())
    head = json.dumps({name: value for name, value in entry.items() if name != "layers"})
    ours = f'"quantization_config": {{\n    {head[1:-1]},\n    "layers": {{\n{lines}\n    }}\n  }}'
    if "quantization_config" in checkpoint.config:
        config = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
        source = json.dumps(config, indent=2)
    text = source.rstrip().removesuffix("}").rstrip()
    comma = "" if text.endswith("{") else ","
    return f"{text}{comma}\n  {ours}\n}}\n"


def _copy_others(source: Path, directory: Path) -> None:
    """Tokenizer, generation config, chat templates and licences, byte for byte."""
    wanted = {path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}
    wanted |= set(source.glob("additional_chat_templates/*.jinja"))
    for path in sorted(wanted):
        if not any(path.match(pattern) for pattern in _REWRITTEN):
            copy = directory / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            flush(copy)


def _refuse(target: Path, checkpoint: Checkpoint) -> None:
    """Raise InputError unless `target` is free, or holds what moefold wrote and is not the source."""
    if not target.exists() and not target.is_symlink():
        return
    if target.exists() and target.resolve() == checkpoint.path.resolve():
        raise InputError(f"{target} is the source checkpoint itself; choose another directory (save: with: to:)")
    if not target.is_dir() or target.is_symlink():
        raise InputError(f"{target} exists and is no directory of its own; choose another path (save: with: to:)")
    if any(target.iterdir()) and not _ours(target):
        raise InputError(
            f"{target} exists and moefold did not write it; choose another directory (save: with: to:), or remove it"
        )


def _ours(target: Path) -> bool:
    try:
        entry = json.loads((target / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A directory to write to, which takes `target`'s place when the block ends well, and is removed otherwise."""
    fresh, old = (target.with_name(f".{target.name}.moefold-{kind}") for kind in ("partial", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in (fresh, old) if target.exists() else (fresh,):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    if old.exists():
        old.rename(target)  # killed between the two renames below
    fresh.mkdir()
    try:
        yield fresh
        flush(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [save]
