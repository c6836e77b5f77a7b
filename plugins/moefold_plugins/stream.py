"""A safetensors file that is written tensor by tensor: room for the header is left at its beginning, and filled last.

The library writes files whole, from memory. A header may end in spaces (safetensors' format), so that its length need
not be known when the first tensor comes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from moefold.errors import StageError

ROOM = 2**20
"""Bytes of a file before its first tensor: a length of 8 bytes, and the header, for some 7,000 tensors."""
ALIGNMENT = 8
"""Readers map tensors where they lie, so each has to begin at a multiple of its elements' size."""
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def said(name: str) -> int:
    """How many bytes of the header a tensor of this name takes, at most."""
    return len(name.encode()) + 192


class Stream:
    """Takes contiguous tensors: those of a multiple of ALIGNMENT bytes, then the others by falling element size."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._file.seek(ROOM)
        self._header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._end = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor behind the others."""
        start, self._end = self._end, self._end + tensor.numel() * tensor.element_size()
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, self._end]}
        self._header[name] = entry
        self._file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Write the header, and close the file."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        if len(header) > ROOM - 8:
            raise StageError(f"{self._file.name}: its header has no room; write a smaller shard_size")
        self._file.seek(0)
        self._file.write((ROOM - 8).to_bytes(8, "little") + header.ljust(ROOM - 8))
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()
