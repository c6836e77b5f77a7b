"""From the checkpoint's per-expert tensors to a packed module's fused parameters and back, in transformers' terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter

from moefold_kernels.checkpoint import PARTS, PackedLayer
from moefold_kernels.errors import FormatError
from moefold_kernels.module import gate_up_name, part_names


@dataclass(frozen=True)
class Place:
    """Where a packed layer sits in a model."""

    layer: PackedLayer
    module: str
    """The experts module's name in the model."""
    converted: str
    """The prefix of its tensors' names once transformers' renamings are done (Mixtral: mlp, not block_sparse_moe)."""

    def parameters(self) -> dict[str, tuple[tuple[str, ...], str]]:
        """The packed module's parameters: the matrices fused in each, and the part that it holds of them.

        Words come last: transformers 5.17 ends no pattern on a name's boundary, and the first that matches counts.
        """
        gate_up = tuple(name for name in self.layer.matrix if name != "down_proj")
        found: dict[str, tuple[tuple[str, ...], str]] = {}
        for part in (*reversed(self.layer.parts), *(["dense"] if self.layer.dense else [])):
            found |= zip(part_names(part), ((gate_up, part), (("down_proj",), part)), strict=True)
        return found

    def tripwires(self) -> set[str]:
        """The names under which transformers may meet the tripwire."""
        return {f"{prefix}.{gate_up_name(self.layer)}" for prefix in (self.module, self.converted, self.layer.prefix)}

    def check_loaded(self, model: Any) -> None:
        """Raise FormatError unless every packed parameter was read (transformers only warns of missing ones)."""
        if missing := sorted(set(self.parameters()) - model.get_submodule(self.module).arrived):
            raise FormatError(f"{self.module}.{missing[0]}: the tensors under {self.layer.prefix} did not come")


class FuseExperts(MergeModulelist):
    """One tensor per expert (or pair) and matrix -> one parameter, the rows of gate before the rows of up.

    A subclass of MergeModulelist because transformers 5.17 tells by it that tensors are counted per expert.
    """

    def __init__(self, layer: PackedLayer, matrices: tuple[str, ...], part: str) -> None:
        super().__init__(dim=0)
        self.layer, self.matrices, self.part = layer, matrices, part

    @property
    def count(self) -> int:
        return len(self.layer.dense) if self.part == "dense" else len(self.layer.pairs)

    @torch.no_grad()
    def convert(  # type: ignore[override]  # the base class promises lists, its own subclasses give tensors
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],  # noqa: ARG002  (the interface's)
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """The fused parameter, under its full name."""
        full_layer_name: str = kwargs["full_layer_name"]
        counts = {pattern: len(input_dict.get(pattern, ())) for pattern in source_patterns}
        if any(count != self.count for count in counts.values()):
            raise FormatError(f"{full_layer_name}: needs {self.count} tensors of each kind, the files have {counts}")
        shapes = [input_dict[pattern][0].shape for pattern in source_patterns]
        first, rows = input_dict[source_patterns[0]][0], sum(shape[0] for shape in shapes)
        out = first.new_empty(self.count, rows, first.shape[1])
        start = 0
        for pattern, shape in zip(source_patterns, shapes, strict=True):
            for index, tensor in enumerate(input_dict.pop(pattern)):
                out[index, start : start + shape[0]] = tensor
            start += shape[0]
        module, _, parameter = full_layer_name.rpartition(".")
        kwargs["model"].get_submodule(module).arrived.add(parameter)
        return {full_layer_name: out}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitExperts(self.layer, self.matrices, self.part)


class SplitExperts(ConversionOps):
    """The reverse, for save_pretrained: the names of the checkpoint's files, and the tripwire with the first words."""

    def __init__(self, layer: PackedLayer, matrices: tuple[str, ...], part: str) -> None:
        self.layer, self.matrices, self.part = layer, matrices, part

    @torch.no_grad()
    def convert(  # type: ignore[override]  # as above
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],  # noqa: ARG002  (the interface's, as the two that follow)
        target_patterns: list[str],  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """The tensors by their names in the files."""
        (value,) = input_dict.values()
        fused = value[0] if isinstance(value, list) else value
        out: dict[str, Tensor] = {}
        for matrix, rows in zip(self.matrices, fused.chunk(len(self.matrices), dim=1), strict=True):
            out |= {self._name(index, matrix): rows[index] for index in range(len(rows))}
        if self.part == "words" and "down_proj" not in self.matrices:
            # without experts left alone its dtype is the stock one's nearest kin; nothing reads it
            out[self.layer.tripwire] = torch.empty(0, dtype=torch.bfloat16)
        return out

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseExperts(self.layer, self.matrices, self.part)

    def _name(self, index: int, matrix: str) -> str:
        alone = self.part == "dense"
        return self.layer.alone(index, matrix) if alone else self.layer.packed(index, matrix, self.part)


def converters(place: Place) -> list[WeightConverter]:
    """One rule per packed parameter; per layer, because other layers may be stock."""
    rules = []
    for parameter, (matrices, part) in place.parameters().items():
        suffix = PARTS.get(part, "weight")
        sources = [f"{place.converted}.*.{place.layer.matrix[matrix]}.{suffix}" for matrix in matrices]
        operation = FuseExperts(place.layer, matrices, part)
        rules.append(WeightConverter(sources, f"{place.converted}.{parameter}", [operation]))
    return rules
