"""What lies in a checkpoint's files, and what an unquantised checkpoint would hold in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from moefold.errors import CheckpointError
from moefold.quantized import BITS, Scheme
from moefold.shards import Entry


class StoredTensors:
    """The tensors of a checkpoint's files, and the matrices that some of them stand for."""

    def __init__(self, files: dict[str, Entry], scheme: Scheme | None) -> None:
        """Raises CheckpointError when a part of a quantised matrix is missing."""
        self.files = files
        self._scheme = scheme
        self._parts = {} if scheme is None else dict(self._find(scheme))
        """Matrix -> end of a tensor's name -> the tensor."""
        self.plain = dict(self._plain()) if self._parts else files
        """What an unquantised checkpoint would hold, in the order of the files."""

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """One of `plain`; `read` reads one of `files`."""
        if self._scheme is None or name not in self._parts:
            return read(name)
        return self._scheme.dequantize({end: read(part) for end, part in self._parts[name].items()})

    def _find(self, scheme: Scheme) -> Iterator[tuple[str, dict[str, str]]]:
        for name in self.files:
            module, _, end = name.rpartition(".")
            if end == "weight_scale":
                parts = {end: f"{module}.{end}" for end in scheme.ends}
                if missing := [part for part in parts.values() if part not in self.files]:
                    raise CheckpointError(f"{name} has no {missing[0]} beside it; download the checkpoint again")
                yield f"{module}.weight", parts

    def _plain(self) -> Iterator[tuple[str, Entry]]:
        owner = {part: matrix for matrix, parts in self._parts.items() for part in parts.values()}
        for name, entry in self.files.items():
            if name not in owner and name not in self._parts:  # the latter: a tripwire of merged layers
                yield name, entry
            elif name.rpartition(".")[2] == "weight_scale":
                yield owner[name], self._entry(self._parts[owner[name]])

    def _entry(self, parts: Mapping[str, str]) -> Entry:
        """The header of a dequantised matrix; packed values have whole 32-bit words."""
        values, scale = (self.files[part] for part in list(parts.values())[:2])
        each = 32 // BITS[self._scheme.name] if self._scheme and values.dtype == "I32" else 1
        return Entry(values.shard, [*values.shape[:-1], values.shape[-1] * each], scale.dtype)
