"""Merged experts whose matrices lie in the files as compressed-tensors quantises them; dense once they are loaded.

config.json has room for one method, and a route is ours: so the library's own entry stands inside ours, and its tensors
are read by transformers' own operations for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moefold_kernels.errors import FormatError

MATRICES = "matrices"
"""The key of our entry that holds the library's."""

Json = Any


def check_matrices(where: str, entry: Json) -> None:
    """Raise FormatError unless it is an entry of compressed-tensors, or None."""
    if entry is not None and (not isinstance(entry, Mapping) or entry.get("quant_method") != "compressed-tensors"):
        raise FormatError(f"{where} is no quantization_config of compressed-tensors; leave it out, or save again")


def tripwire(prefix: str, matrix: str) -> str:
    """A zero-element tensor without which a stock transformers would pass over packed integers, and not raise."""
    return f"{prefix}.0.{matrix}.weight"


class MatrixReader:
    """What transformers does for the library's checkpoints, of which only the reading of matrices is taken."""

    def __init__(self, entry: Mapping[str, Json]) -> None:
        """Raises FormatError where the library is not installed."""
        from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
        from transformers.utils.import_utils import is_compressed_tensors_available
        from transformers.utils.quantization_config import CompressedTensorsConfig

        if not is_compressed_tensors_available():
            raise FormatError("these experts are quantised; pip install 'compressed-tensors>=0.15'")
        make: Any = CompressedTensorsHfQuantizer
        self._stock = make(CompressedTensorsConfig(**entry))
        self._stock.validate_environment()

    def conversions(self, stock: list[Any], model: Any) -> list[Any]:
        """The model's own conversions, dequantising first; transformers 5.17 takes no model (None)."""
        found: list[Any] = self._stock.update_weight_conversions(stock, *([] if model is None else [model]))
        return found
