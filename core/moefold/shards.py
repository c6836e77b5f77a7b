"""A directory's safetensors files as their headers describe them; nothing is unpickled, and no data is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from moefold.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEADER_LIMIT = 100 * 2**20  # what safetensors itself allows


class Entry(NamedTuple):
    """One tensor as a shard's header describes it."""

    shard: str
    shape: list[int]
    dtype: str


def shards(path: Path) -> list[str]:
    """The names of a checkpoint's weight files."""
    if (path / INDEX).is_file():
        return sorted(set(read_index(path).values()))
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE in found:
        return [SINGLE]
    if len(found) > 1:
        raise CheckpointError(f"{path}: {len(found)} safetensors files, no {INDEX}; copy it from the model's source")
    if not found:
        raise CheckpointError(
            f"{path}: no safetensors files (others, such as .bin, may run code when read and are never read); "
            "convert with transformers, from_pretrained(...).save_pretrained(...), or choose a revision that has them"
        )
    return found


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard, as the index says."""
    index = read_json(path / INDEX)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path / INDEX}: no weight_map; copy the file from the model's source again")
    for shard in weights.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path / INDEX}: {shard!r} is not a file of this directory")
    return weights


def read_entries(path: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint by name.

    Raises CheckpointError when shards are missing or truncated, or do not hold what the index says.
    """
    names = shards(path)
    missing = [shard for shard in names if not (path / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} shards are missing, such as {missing[0]}; "
            "download the checkpoint again"
        )
    entries = {name: entry for shard in names for name, entry in read_header(path / shard).items()}
    if not (path / INDEX).is_file():
        return entries
    index = read_index(path)
    lost = [name for name, shard in index.items() if name not in entries or entries[name].shard != shard]
    if lost:
        raise CheckpointError(
            f"{path / INDEX} names {len(lost)} tensors that their shards do not hold, such as {lost[0]} in "
            f"{index[lost[0]]}; copy the checkpoint again"
        )
    return {name: entries[name] for name in index}


def read_json(file: Path) -> Any:
    """A JSON file's value."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); copy it from the model's source") from error


def _raw_header(file: Path) -> bytes:
    """A shard's header as bytes; raises CheckpointError when the file ends before it does."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length) if length <= _HEADER_LIMIT else b""
    except OSError as error:
        raise CheckpointError(f"{file}: not readable ({error.strerror}); download the checkpoint again") from error
    if not header or len(header) < length:
        raise CheckpointError(f"{file}: truncated, or no safetensors file; download it again")
    return header


def read_header(file: Path) -> dict[str, Entry]:
    """One shard's tensors by name; raises CheckpointError when the file is shorter or longer than its header says."""
    raw = _raw_header(file)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: Entry(file.name, item["shape"], item["dtype"]) for name, item in header.items()}
        end = max((item["data_offsets"][1] for item in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: its safetensors header is damaged ({error}); download it again") from error
    size, expected = file.stat().st_size, 8 + len(raw) + end
    if size != expected:
        raise CheckpointError(f"{file}: {size} bytes where its header promises {expected}; download it again")
    return entries


def header_digest(file: Path) -> str:
    """A digest of a shard's header: names, shapes, dtypes and places of its tensors."""
    return hashlib.sha256(_raw_header(file)).hexdigest()


def contents_digest(file: Path) -> str:
    """A digest of a file's contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
