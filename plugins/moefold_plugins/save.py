"""The stage `save`: a directory like any on the hub, with packed experts, that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from moefold import (
    Activity,
    Checkpoint,
    Json,
    Layer,
    Layers,
    MergePlan,
    Packed,
    Provenance,
    Quantized,
    Reduced,
    Replacement,
    Saved,
    Scheme,
    Stage,
    __version__,
    hookimpl,
    stage,
)
from moefold.artifacts import tensor_bytes
from moefold.errors import FormatError, InputError
from moefold_kernels import LayerEntry
from moefold_plugins.config_text import config_text
from moefold_plugins.directory import refuse, replacing
from moefold_plugins.files import layer_files
from moefold_plugins.layer_files import Export, LayerFiles
from moefold_plugins.model_card import write_card
from moefold_plugins.plan_files import NAME as PLAN
from moefold_plugins.plan_files import check_plan, plan_text
from moefold_plugins.shards import Shards, check_size, flush, parse_size, write_text

CARD = "README.md"
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "NOTICE*")
_REWRITTEN = ("config.json", "*.index.json", "*.safetensors", "adapter_*", CARD, PLAN, Saved.RECORD)


def _check_target(to: Path, **_: Any) -> None:
    """Refuse, when a run is planned, what it would come to refuse hours later; the key has nothing of it."""
    refuse(Path(to).expanduser())


@stage("save", version=3, reads=_check_target)  # few bits lie in bands, in layout_pairs.ORDER
def save(
    checkpoint: Checkpoint,
    experts: Layers[Replacement],
    activity: Layers[Activity] | None,
    provenance: Provenance,
    plan: MergePlan | None = None,
    *,
    to: Annotated[Path, Field(description="the directory to write; one that moefold wrote before is replaced")],
    shard_size: Annotated[
        int | str, AfterValidator(check_size), Field(description="largest shard: bytes, or like 4GB")
    ] = "4GB",
    export: Annotated[
        Export,
        Field(
            description="merged experts once, with a route (needs moefold), or repeated for any reader (saves nothing)"
        ),
    ] = "route",
) -> Saved:
    """Write a checkpoint with packed, merged or pruned experts in place of the source's."""
    target = Path(to).expanduser()
    refuse(target, checkpoint)
    if checkpoint.quantized is not None:
        raise InputError(
            f"{checkpoint.path} is quantised already ({checkpoint.quantized.title}); give the checkpoint that it was "
            "made of"
        )
    with replacing(target) as directory:
        with Shards(directory, parse_size(shard_size)) as shards:
            written = _write_tensors(checkpoint, experts, shards, export, plan)
        figures = _figures(checkpoint, written, shards.total, activity)
        other = next(iter(written.quantized.values()), None)  # all are the same
        text = config_text(checkpoint, written.config or {}, written.entries, other)
        write_text(directory / "config.json", text)
        _copy_others(checkpoint.path, directory)
        if plan is not None:
            write_text(directory / PLAN, plan_text(plan))
        write_text(directory / CARD, write_card(target.name, provenance, figures, __version__))
        write_text(directory / Saved.RECORD, json.dumps({"moefold": __version__, "saved": figures}, indent=2) + "\n")
        return Saved.of(directory, str(target), figures, leave_out=(CARD, PLAN, Saved.RECORD))


@dataclass
class _Written:
    """What is gathered over layers while each is in memory."""

    entries: dict[int, LayerEntry]
    config: dict[str, Json] | None = None
    """What changes in config.json, which has one number of experts for all layers; None before the first layer."""
    kinds: dict[int, str] = field(default_factory=dict)
    experts: dict[int, list[int]] = field(default_factory=dict)
    """Layer -> how many experts before and after."""
    before: int = 0
    after: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)
    schemes: set[str] = field(default_factory=set)
    quantized: dict[int, Mapping[str, Json]] = field(default_factory=dict)
    """Layer -> what compressed-tensors has in config.json."""
    thin: dict[int, list[int]] = field(default_factory=dict)

    def add(self, layer: Layer, value: Replacement | None, files: LayerFiles | None, before: int) -> None:
        self.before += before
        self.after += before if files is None else files.bytes
        self.experts[layer.number] = [layer.expert_count, layer.expert_count if files is None else files.experts]
        config = {} if files is None else dict(files.config)
        self.config = config if self.config is None else self.config
        if config != self.config:
            raise FormatError(
                f"layer {layer.number} wants {config or 'nothing changed'} in config.json and the layers before it "
                f"{self.config or 'nothing'}; such models have one number for all layers: prune all of them alike"
            )
        if files is None:
            return
        self.kinds[layer.number] = files.kind
        self.entries.pop(layer.number, None)  # the source's own, if it had one
        if files.entry is not None:
            self.entries[layer.number] = files.entry
        if files.quantization is not None:
            self.quantized[layer.number] = files.quantization
        if isinstance(value, Quantized):
            self.schemes.add(Scheme(value.scheme, value.group).title)
        if isinstance(value, Packed) and value.pairs:
            self.formats.add(value.format)
            for name, count in value.counts.items():
                self.counts[name] = self.counts.get(name, 0) + count
        if isinstance(value, Reduced) and value.figures.get("thin"):
            self.thin[layer.number] = value.figures["thin"]


def _write_tensors(
    checkpoint: Checkpoint, replaced: Layers[Replacement], shards: Shards, export: Export, plan: MergePlan | None
) -> _Written:
    """Each layer's experts, one layer in memory at a time, then what is copied as it is."""
    layers = {layer.number: layer for layer in checkpoint.layers()}
    if unknown := sorted(set(replaced) - set(layers)):
        raise FormatError(f"{checkpoint.path}: decoder layer {unknown[0]} has no routed experts to replace")
    written, dropped = _Written(dict(checkpoint.entries)), set[str]()
    for number, layer in layers.items():
        value = replaced.get(number)
        if plan is not None:
            check_plan(number, value, plan)
        files = None if value is None else layer_files(layer, value, export)
        for name, tensor in () if files is None else files.tensors:
            shards.add(name, tensor)
        dropped |= files.drops if files else set()
        written.add(layer, value, files, sum(_bytes(checkpoint, key) for key in layer.names().keys))
        if export == "expanded" and number in written.entries:
            raise FormatError(
                f"{checkpoint.path}: layer {number} is merged or packed there already, and nothing replaces it; to "
                "expand it, load the directory with transformers, call dequantize() and save_pretrained"
            )
    if written.quantized and (len(written.schemes) > 1 or len(written.quantized) < len(layers)):
        raise FormatError(
            f"{checkpoint.path}: some layers are {', '.join(sorted(written.schemes))} and others are not; transformers "
            "loads quantised experts only where every layer's are in one scheme: quantise all layers alike"
        )
    with checkpoint.reading() as read:
        for key in checkpoint.weight_map:
            if key not in dropped:
                shards.add(key, read(key))
    return written


def _bytes(checkpoint: Checkpoint, key: str) -> int:
    shape, dtype = checkpoint.header(key)
    return tensor_bytes(torch.empty(shape, dtype=dtype, device="meta"))


def _figures(
    checkpoint: Checkpoint, written: _Written, after: int, activity: Layers[Activity] | None
) -> dict[str, Json]:
    starved = None
    if activity is not None:
        found = ((number, value.starved) for number, value in activity.items())
        starved = {str(number): list(who) for number, who in found if who}
    figures: dict[str, Json] = {
        "format": ", ".join(sorted(written.formats | written.schemes)) or "none",
        "quantized": bool(written.schemes),
        "kinds": dict(Counter(written.kinds.values())),
        "experts": {str(number): counts for number, counts in written.experts.items()},
        "expert_bytes": {"before": written.before, "after": written.after},
        "checkpoint_bytes": {"before": sum(_bytes(checkpoint, key) for key in checkpoint.weight_map), "after": after},
        "starved": starved,
        "thin": {str(number): who for number, who in written.thin.items()},
        "layers": len(written.experts),
        "replaced_layers": len(written.kinds),
        "needs_moefold": bool(written.entries),
    }
    weights = written.counts.get("weights", 0)
    if weights:
        figures["masks"] = {name: written.counts[name] / weights for name in ("shared", "own", "other", "zero")}
        figures |= {name: written.counts.get(name, 0) for name in ("clipped", "flushed")}
    return figures


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


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [save]
