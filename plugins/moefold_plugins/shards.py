"""Writing a checkpoint's tensors: shard by shard, and large shards as they come, so that memory holds little of one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors.torch import save_file
from torch import Tensor

from moefold import Checkpoint
from moefold.artifacts import tensor_bytes
from moefold.errors import StageError
from moefold_plugins.stream import ALIGNMENT, ROOM, Stream, said

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
HELD = 64 * 2**20
"""Bytes of a shard in memory before they are written: smaller shards are safetensors' own to write."""
_METADATA = {"format": "pt"}  # one key: files with two are written in random key order


def parse_size(size: int | str) -> int:
    """Bytes of `4000000`, `"500MB"` or `"4GiB"`; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]?I?B?)\s*", str(size).upper())
    if match is None or match[2] not in _UNITS or not int(match[1]):
        raise ValueError(f"{size!r} is no size; write bytes as a number, or like 4GB or 500MiB")
    return int(match[1]) * _UNITS[match[2]]


class Shards:
    """Takes tensors one by one and writes `model-00001-of-00003.safetensors`, ..., and their index.

    A shard takes tensors until the next would make it larger than `size`. Names are final only at `finish`, which
    also reads every header back and raises StageError if a tensor is not there as it was given.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory
        self.size = size
        self.promised: dict[str, tuple[list[int], object]] = {}
        self.total = 0
        self._written: list[list[str]] = []
        self._stream: Stream | None = None
        self._open: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._bytes = self._held = self._said = 0  # of the shard; of what of it is in memory; of its header, about

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        elif self._stream is not None:
            self._stream.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; raises StageError when the name was given before."""
        if name in self.promised:
            raise StageError(f"{self.directory}: two tensors are called {name}; this is a bug of the family's names")
        size = tensor_bytes(tensor)
        crowded = self._stream is not None and self._said + said(name) > ROOM
        if self._names and (self._bytes + size > self.size or crowded):
            self._write()
        self._open[name] = tensor.contiguous()
        self._names.append(name)
        self._bytes += size
        self._held += size
        self._said += said(name)
        self.total += size
        self.promised[name] = (list(tensor.shape), tensor.dtype)
        if self._held > HELD:
            self._spill()

    def finish(self) -> None:
        """Write the last shard, give the shards their names, write the index, read everything back."""
        self._write()
        count = len(self._written)
        final = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        names = final if count > 1 else ["model.safetensors"]
        for number, name in enumerate(names):
            self._part(number).rename(self.directory / name)
        if count > 1:
            weight_map = {tensor: names[number] for number, tensors in enumerate(self._written) for tensor in tensors}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(self.directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        self._read_back()

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number}.safetensors"

    def _spill(self) -> None:
        """Write what is held in memory, but for tensors after which the next would not be aligned."""
        if self._stream is None and self._said > ROOM:
            self._write()  # too many small ones for the header's room
            return
        if self._stream is None:
            self._stream = Stream(self._part(len(self._written)))
        for name in [name for name, tensor in self._open.items() if not tensor_bytes(tensor) % ALIGNMENT]:
            self._stream.add(name, self._open.pop(name))
        self._held = sum(map(tensor_bytes, self._open.values()))

    def _write(self) -> None:
        if not self._names:
            return
        path = self._part(len(self._written))
        if self._stream is None:
            save_file(self._open, path, metadata=_METADATA)
            path.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
        else:
            for name in sorted(self._open, key=lambda name: -self._open[name].element_size()):
                self._stream.add(name, self._open[name])
            self._stream.finish()
        flush(path)
        self._written.append(self._names)
        self._open, self._names, self._stream = {}, [], None
        self._bytes = self._held = self._said = 0

    def _read_back(self) -> None:
        written = Checkpoint(self.directory)
        if set(written.weight_map) != set(self.promised):
            lost = sorted(set(self.promised) ^ set(written.weight_map))
            raise StageError(f"{self.directory}: read back, {lost[0]} (of {len(lost)}) is not as it was written")
        for name, promise in self.promised.items():
            found = written.header(name)
            if (list(found[0]), found[1]) != promise:
                raise StageError(f"{self.directory}: {name} was written as {promise} and reads back as {found}")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(path: Path, text: str) -> None:
    """Write a file and have the disk take it."""
    path.write_text(text, encoding="utf-8")
    flush(path)


def flush(path: Path) -> None:
    """Have the disk take what was written to a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_size(size: int | str) -> int | str:
    """`size` if `parse_size` can read it (for options; pydantic shows the ValueError)."""
    parse_size(size)
    return size
