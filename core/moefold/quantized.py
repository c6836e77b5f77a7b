"""Quantised weights in compressed-tensors' formats, and back: tensors in, tensors out, through that library.

The library is imported where it is used: it takes seconds, and most commands do without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefold.artifact import Json
from moefold.errors import CheckpointError, FormatError

METHOD = "compressed-tensors"
OURS = "moefold"
FORMATS = {"fp8": "float-quantized", "int8": "pack-quantized", "int4": "pack-quantized"}
"""The schemes, and the library's format in which each is stored."""
BITS = {"fp8": 8, "int8": 8, "int4": 4}
_GROUPS = (128, 64, 32, 16, 8)
_KNOWN = {
    "quant_method", "format", "quantization_status", "config_groups", "ignore", "global_compression_ratio", "version",
}  # fmt: skip
_READS = "moefold reads compressed-tensors' symmetric fp8 (a scale for each row), packed int8 and packed int4"


@dataclass(frozen=True)
class Scheme:
    """Symmetric round-to-nearest quantisation of a weight matrix, a scale for each group of a row's columns."""

    name: str
    """fp8 (e4m3), int8 or int4."""
    group: int | None = None
    """Columns that share a scale; None: the whole row."""

    @property
    def bits(self) -> int:
        """Of a weight, without its share of a scale."""
        return BITS[self.name]

    @property
    def title(self) -> str:
        """What people call it."""
        return self.name if self.group is None else f"{self.name} in groups of {self.group}"

    def to_config(self, experts: str = "experts") -> dict[str, Json]:
        """config.json's `quantization_config` for a model whose modules below `experts`, and no others, are so stored.

        Readers differ in what they call the other modules, and in whether they take patterns as targets; all skip what
        matches `ignore`. vLLM runs fp8 experts only with activations that it quantises per token as it goes;
        transformers and moefold leave activations alone.
        """
        activations = _arguments("fp8", "token") | {"dynamic": True} if self.name == "fp8" else None
        group = {
            "targets": ["Linear"],
            "weights": self.arguments(),
            "input_activations": activations,
            "output_activations": None,
            "format": FORMATS[self.name],
        }
        return {
            "quant_method": METHOD,
            "format": FORMATS[self.name],
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [rf"re:(?!.*\.{experts}(\.|$)).*"],
        }

    def arguments(self) -> dict[str, Json]:
        """What the library calls the arguments of weights."""
        return _arguments(self.name, "channel" if self.group is None else "group", self.group)

    def check(self, *columns: int) -> None:
        """Raise FormatError unless matrices of so many columns can be stored; it names a group that works."""
        word = 1 if self.name == "fp8" else 32 // BITS[self.name]
        wrong = [count for count in columns if count % word or count % (self.group or word)]
        if wrong:
            works = [f"group: {size}" for size in _GROUPS if not any(count % size for count in columns)]
            remedy = works[0] if works and self.name == "int4" else "scheme: fp8"
            raise FormatError(f"rows of {wrong[0]} weights do not divide into {self.title}; write {remedy}")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """A matrix `[rows, columns]` as the library stores it, by the ends of its tensors' names.

        Scales have the weight's dtype; what is divided by them is float32, so that nothing is rounded twice. Raises
        FormatError where rows cannot be divided so, or a weight is not finite.
        """
        self.check(weight.shape[1])
        exact = weight.float()
        low, high = exact.unflatten(1, (-1, self.group or weight.shape[1])).aminmax(dim=2)
        return self.stored(exact, self.scales(low, high, weight.dtype))

    def scales(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
        """What spans groups of these extremes, in a dtype; raises FormatError where one is not finite."""
        from compressed_tensors.quantization.utils import calculate_qparams

        scale = calculate_qparams(low, high, self._library().weights)[0].to(dtype)
        if not bool(scale.isfinite().all()):
            raise FormatError("weights that are not finite cannot be quantised; check the source checkpoint")
        return torch.where(scale == 0, torch.finfo(scale.dtype).tiny, scale)  # below what float16 holds

    def stored(self, exact: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """A matrix `[rows, columns]` float32 as `quantize` stores it, by given scales `[rows, groups]`."""
        stored = self._compressor().compress({"weight": exact, "weight_scale": scale.float()}, self._library())
        return {**stored, "weight_scale": scale}

    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The matrix that `quantize` stored, in the dtype of its scales."""
        dense: Tensor = self._compressor().decompress(dict(stored), self._library())["weight"]
        return dense

    @property
    def ends(self) -> tuple[str, ...]:
        """The ends of the names of a matrix's tensors: values, scales, and what else there is."""
        return ("weight", "weight_scale") if self.name == "fp8" else ("weight_packed", "weight_scale", "weight_shape")

    def _library(self) -> Any:
        from compressed_tensors.quantization import QuantizationScheme

        return QuantizationScheme.model_validate({"targets": [], "weights": self.arguments()})

    def _compressor(self) -> Any:
        from compressed_tensors.compressors import BaseCompressor

        return BaseCompressor.get_value_from_registry(FORMATS[self.name])


def read_config(config: Json) -> Scheme:
    """The scheme of a `quantization_config` of compressed-tensors; raises CheckpointError for one not read here."""
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        raise CheckpointError(f"quantization_config: {config!r:.60} is not of compressed-tensors; {_READS}")
    if more := [key for key in sorted(set(config) - _KNOWN) if config[key]]:
        raise CheckpointError(f"quantization_config.{more[0]} is not known; {_READS}")
    groups = config.get("config_groups")
    if config.get("quantization_status") != "compressed" or not isinstance(groups, dict) or len(groups) != 1:
        raise CheckpointError(f"quantization_config has not one config group of status compressed; {_READS}")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    size = weights.get("group_size") if isinstance(weights, dict) else None
    for name, form in FORMATS.items():
        scheme = Scheme(name, size if isinstance(size, int) and size > 0 else None)
        if _same(scheme, weights) and (group.get("format") or config.get("format")) == form:
            return scheme
    raise CheckpointError(f"quantization_config.config_groups: weights {weights}; {_READS}")


def find_scheme(config: Mapping[str, Json]) -> Scheme | None:
    """How config.json says that matrices are quantised; None: they are not, or moefold packed them.

    Merged experts may be quantised, too: the library's entry then stands inside moefold's.

    Raises CheckpointError for what moefold does not read.
    """
    text = config.get("text_config")
    own, nested = config.get("quantization_config"), text.get("quantization_config") if isinstance(text, dict) else None
    method = own.get("quant_method", "an unnamed method") if isinstance(own, dict) else own
    if isinstance(own, dict) and method == METHOD and nested is None:
        return read_config(own)
    if isinstance(own, dict) and method == OURS and nested is None:
        return None if own.get("matrices") is None else read_config(own["matrices"])
    if nested is not None or method is not None:
        raise CheckpointError(
            f"already quantised by {method or nested}; give the unquantised checkpoint that it was made from "
            "(quantised ones are read only as moefold itself writes them)"
        )
    return None


def _arguments(name: str, strategy: str, group: int | None = None) -> dict[str, Json]:
    kind = "float" if name == "fp8" else "int"
    sizes = {"num_bits": BITS[name], "type": kind, "strategy": strategy, "group_size": group}
    return sizes | {"symmetric": True, "dynamic": False}


def _same(scheme: Scheme, weights: Json) -> bool:
    """Whether the library reads these arguments as it reads the scheme's own."""
    from compressed_tensors.quantization import QuantizationArgs

    if not isinstance(weights, dict) or (scheme.name == "fp8" and scheme.group is not None):
        return False
    try:
        given = QuantizationArgs.model_validate(weights)
    except ValueError:
        return False
    own = QuantizationArgs.model_validate(scheme.arguments())
    asked = ("num_bits", "type", "symmetric", "strategy", "dynamic")
    return all(getattr(given, name) == getattr(own, name) for name in asked)
