"""Which tensors of a checkpoint's files fill which parameter of a model, and how they become it.

The names and operations are transformers' own (`conversion_mapping`, `core_model_loading`): importable, but not
promised. They were read at 5.17 and 5.23; only this file, skeleton.py and meta.py lean on such functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moefold.checkpoint import Checkpoint
from moefold.errors import CheckpointError

Device = str | torch.device
_PER_EXPERT = re.compile(r"(?P<prefix>.+)\.(?P<expert>\d+)\.(?P<matrix>.+)\.weight")


@dataclass
class Source:
    """The tensors that fill one parameter (and, where one tensor is split, those after it)."""

    name: str
    converter: WeightConverter | None
    keys: dict[str, list[str]] = field(default_factory=dict)
    """By the converter's pattern, in the order of its patterns; a plain one under its own name."""

    @property
    def all_keys(self) -> list[str]:
        """Every tensor, in the order in which it is read."""
        return [key for keys in self.keys.values() for key in keys]

    @property
    def stacks(self) -> bool:
        """Whether per-expert matrices are stacked and, gate before up, concatenated, and nothing else happens."""
        if self.converter is None or not all(_PER_EXPERT.fullmatch(key) for key in self.all_keys):
            return False
        stack, *join = self.converter.operations
        plain = isinstance(stack, MergeModulelist) and stack.dim == 0 and len(join) <= 1
        single = len(self.converter.target_patterns) == 1
        return plain and single and all(isinstance(op, Concatenate) and op.dim == 1 for op in join)


class Sources:
    """Every parameter and persistent buffer of a model that the checkpoint fills."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._checkpoint, self._model = checkpoint, model
        self._where = f"{checkpoint.path}: {type(model).__name__}"
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._known = self._mapped()

    def find(self, name: str) -> Source:
        """What fills a parameter: its own tensors, or those of one that it is tied to or split from.

        Raises CheckpointError when nothing does: stock transformers would go on with random values.
        """
        for candidate in (name, *self._partners(name)):
            if candidate in self._known:
                return self._known[candidate]
        raise CheckpointError(
            f"{self._where} needs {name}, which no tensor of the checkpoint fills; "
            "check that config.json belongs to these files, or download the checkpoint again"
        )

    def read(self, name: str, device: Device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """A parameter in the model's layout, and those that its tensors fill with it; `dtype` None: of the files."""
        source = self.find(name)
        with self._checkpoint.reading() as read:
            if source.stacks:
                return {name: self._stacked(source, read, device, dtype)}
            values = self._converted(name, source, lambda key: read(key).to(device=device, dtype=dtype))
        for target, tensor in values.items():
            if tensor.shape != self._shapes.get(target):
                raise CheckpointError(
                    f"{self._where}: {target} is {list(tensor.shape)} in the checkpoint and "
                    f"{list(self._shapes.get(target, ()))} by config.json; they do not belong together"
                )
        return values

    def _mapped(self) -> dict[str, Source]:
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, known = self._model.base_model_prefix, self._model.state_dict()
        sources: dict[str, Source] = {}
        for key in sorted(self._checkpoint.weight_map, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if name not in known:
                continue  # stock loading leaves such tensors too (multi-token prediction layers, old buffers)
            source = sources.setdefault(name, Source(name, by_pattern[pattern] if pattern else None))
            source.keys.setdefault(pattern or key, []).append(key)
        for source in sources.values():
            if source.converter is not None:
                source.keys = {p: source.keys[p] for p in source.converter.source_patterns if p in source.keys}
        return sources

    def _partners(self, name: str) -> list[str]:
        tied = self._model.all_tied_weights_keys
        partners = [other for pair in tied.items() if name in pair for other in pair]
        for first, source in self._known.items():
            if source.converter is not None and len(source.converter.target_patterns) > 1:
                head, *rest = source.converter.target_patterns
                partners += [first for other in rest if first.replace(head, other) == name]
        return partners

    def _converted(self, name: str, source: Source, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if source.converter is None:
            return {name: read(source.all_keys[0])}
        converter: Any = deepcopy(source.converter)
        for pattern, keys in source.keys.items():
            for key in keys:
                converter.add_tensor(source.name, key, pattern, lambda key=key: read(key))
        values = converter.convert(source.name, model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in values.items()}

    def _stacked(
        self, source: Source, read: Callable[[str], Tensor], device: Device, dtype: torch.dtype | None
    ) -> Tensor:
        """Per-expert tensors written straight into the fused one.

        transformers' own operations give the same values, but hold two more copies on the way, which a layer of 22 GB
        cannot afford.
        """
        stored = self._check_stack(source)
        out = torch.empty(self._shapes[source.name], dtype=dtype or stored, device=device)
        rows = 0
        for keys in source.keys.values():
            height = self._checkpoint.header(keys[0])[0][0]
            for expert, key in enumerate(keys):
                out[expert, rows : rows + height].copy_(read(key))
            rows += height
        return out

    def _check_stack(self, source: Source) -> torch.dtype:
        """That every expert is there once and in one shape; returns the dtype of the files."""
        count, rows, columns = self._shapes[source.name]
        dtype = self._checkpoint.header(source.all_keys[0])[1]
        for keys in source.keys.values():
            found = [split(key)[1] for key in keys]
            if found != list(range(count)):
                what = sorted(set(range(count)) ^ set(found)) or found
                raise CheckpointError(
                    f"{self._where}: {source.name} wants experts 0 to {count - 1}, and expert {what[0]} is missing or "
                    f"one too many beside {keys[0]}; check that config.json belongs to these files"
                )
            height = rows // len(source.keys)
            for key in keys:
                if self._checkpoint.header(key) != ([height, columns], dtype):
                    shape, other = self._checkpoint.header(key)
                    raise CheckpointError(
                        f"{self._where}: {key} is {shape} {other} where {[height, columns]} {dtype} is expected; "
                        "check that config.json belongs to these files"
                    )
        return dtype


def split(key: str) -> tuple[str, int, str]:
    """Prefix, expert and matrix of a per-expert tensor's name, one of a source that `stacks`."""
    match = _PER_EXPERT.fullmatch(key)
    if match is None:
        raise ValueError(f"{key} is no per-expert tensor")
    return match["prefix"], int(match["expert"]), match["matrix"]
