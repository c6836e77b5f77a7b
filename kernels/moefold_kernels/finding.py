"""Where a checkpoint's entry belongs in a model, and whether the checkpoint's files hold what the entry says."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from moefold_kernels.checkpoint import LayerEntry, PackedLayer
from moefold_kernels.errors import FormatError
from moefold_kernels.module import is_experts, stock_sizes

Shapes = Mapping[str, tuple[int, ...]]


class Found(NamedTuple):
    """An experts module of a model."""

    module: str
    """Its name in the model."""
    converted: str
    """The prefix of its tensors' names once transformers' renamings are done (Mixtral: mlp, not block_sparse_moe)."""


def find(model: PreTrainedModel, prefix: str) -> Found:
    """The experts module that the checkpoint's files call `prefix`; raises FormatError when there is none."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    names = model.state_dict()
    for stock in ("gate_up_proj", "up_proj"):
        converted, _ = rename_source_key(f"{prefix}.{stock}", renamings, [])
        name, _ = rename_source_key(f"{prefix}.{stock}", renamings, [], model.base_model_prefix, names)
        module = name.removesuffix(f".{stock}")
        if name in names and is_experts(model.get_submodule(module)):
            return Found(module, converted.removesuffix(f".{stock}"))
    raise FormatError(
        f"quantization_config: {prefix} is no experts module of {type(model).__name__} that transformers' "
        "experts interface runs; was config.json edited, or is this another architecture?"
    )


def headers(files: Sequence[str] | None) -> dict[str, tuple[int, ...]] | None:
    """The shape of every tensor in safetensors files; None where transformers gives other files, or none."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def renamed(model: PreTrainedModel, found: Shapes, entries: Collection[LayerEntry]) -> dict[str, tuple[int, ...]]:
    """The shapes with those of fused tensors under the model's own names, too (Granite: input_linear for gate_up_proj).

    Numbered experts, which are most names of a checkpoint, are passed over: entries name them as the files do.
    """
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    known = re.compile("|".join(rf"{re.escape(entry.prefix)}\.\d" for entry in entries) or r"(?!)")
    others = {rename_source_key(name, renamings, [])[0]: found[name] for name in found if not known.match(name)}
    return {**others, **found}


def check_tensors(entry: LayerEntry, module: nn.Module, found: Shapes) -> None:
    """Raise FormatError unless the files hold the layer's tensors, in the shapes that the model needs."""
    if not isinstance(entry, PackedLayer):
        entry.check_files(found)  # shapes are transformers' to compare
        return
    stock: Any = module
    inner, hidden = stock_sizes(stock.is_transposed, stock.down_proj)
    for name, shape in entry.shapes(inner, hidden):
        if name not in found:
            raise FormatError(f"{name} is not in the checkpoint's files; save or download it again")
        if found[name] != shape:
            raise FormatError(f"{name} is {list(found[name])} in the checkpoint's files, not {list(shape)}")


def wanted_dtypes(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The dtype in which transformers would keep each parameter (some stay in float32)."""
    floats = {name: value.dtype for name, value in model.named_parameters() if value.is_floating_point()}
    special = model._get_dtype_plan(dtype) if dtype is not None else {}
    for pattern, other in special.items():
        expression = re.compile(pattern.replace("*", ".*"))
        floats.update({name: other for name in floats if expression.search(name)})
    return floats
