"""Checkpoints: safetensors files, read lazily.

A `Checkpoint` is its path; headers and the model's skeleton are read when first asked for and never pickled, so a
handle may travel to any worker that sees the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from moefold.artifact import Json
from moefold.errors import CheckpointError, InputError, suggest
from moefold.hub import download, looks_local
from moefold.quantized import OURS, Scheme, find_scheme
from moefold.shards import Entry, contents_digest, header_digest, read_entries, read_json, shards
from moefold.stored import StoredTensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moefold.layer import Layer
    from moefold.skeleton import Skeleton
    from moefold_kernels import LayerEntry, PackedLayer

_ADD_TOKENIZER = "put the model's tokenizer.json and tokenizer_config.json beside the weights"
_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
)
"""What decides which tokens a text becomes."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors files with a config.json."""

    path: Path

    @classmethod
    def open(cls, name: str, *, revision: str | None = None) -> Checkpoint:
        """A local directory, or a model of the hub by its id; everything that headers can tell is checked here.

        Raises CheckpointError when it is missing or incomplete, holds no safetensors, or is quantised already.
        """
        local = Path(name).expanduser().absolute()  # workers may run elsewhere
        if local.exists() or looks_local(name):
            if revision is not None:
                raise CheckpointError(f"{name} is a local directory; drop the revision {revision!r} or name a hub id")
            checkpoint = cls(local)
        else:
            checkpoint = cls(download(name, revision))
        _ = checkpoint.config, checkpoint._entries  # reads headers: truncated shards, an index that lies are found now
        return checkpoint

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # what else the instance holds is read again where it is needed

    @cached_property
    def config(self) -> dict[str, Json]:
        """config.json as it is."""
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such directory; give a checkpoint's directory or a hub id")
        file = self.path / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{self.path}: no config.json; give the directory that holds it beside the weights")
        config = read_json(file)
        if not isinstance(config, dict):
            raise CheckpointError(f"{file}: not a JSON object; copy the file from the model's source again")
        return config

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> shard file; a quantised matrix has the name that it has unquantised."""
        return {name: entry.shard for name, entry in self._entries.items()}

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model without weights, and which tensors fill which of its parameters."""
        from moefold.skeleton import Skeleton  # transformers is slow to import, and not every stage needs it

        return Skeleton(self)

    @cached_property
    def quantized(self) -> Scheme | None:
        """How compressed-tensors quantised it: what it did is undone as tensors are read; None: it did not.

        Raises CheckpointError for a quantisation that moefold cannot read.
        """
        if not (self.path / "config.json").is_file():
            return None  # shards are read back before there is one
        try:
            return find_scheme(self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    @property
    def packed_layers(self) -> dict[int, PackedLayer]:
        """The decoder layers that moefold has packed, with what reading them takes."""
        from moefold_kernels.checkpoint import PackedLayer

        return {number: entry for number, entry in self.entries.items() if isinstance(entry, PackedLayer)}

    @cached_property
    def entries(self) -> dict[int, LayerEntry]:
        """The decoder layers that moefold has packed, or merged experts of; none in a stock checkpoint."""
        from moefold_kernels.checkpoint import read_config
        from moefold_kernels.errors import FormatError

        try:
            entry = self.config.get("quantization_config")
            return read_config(entry) if isinstance(entry, dict) and entry.get("quant_method") == OURS else {}
        except FormatError as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {error}") from error

    def fingerprint(self, strict: bool = False) -> str:
        """A digest of config.json, the tokenizer, and every shard's header, size and modification time.

        `strict`: of the shards' contents in place of those.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted({file for pattern in _TOKENIZER for file in self.path.glob(pattern) if file.is_file()}):
            digest.update(json.dumps([file.name, contents_digest(file)]).encode())
        for shard in shards(self.path):
            file = self.path / shard
            stat = file.stat()
            facts = [contents_digest(file)] if strict else [stat.st_size, stat.st_mtime_ns, header_digest(file)]
            digest.update(json.dumps([shard, facts]).encode())
        return digest.hexdigest()

    def tensor(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """One tensor, read now."""
        with self.reading() as read:
            return read(name).to(device)

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], Tensor]]:
        """A function from names to tensors on the CPU; each shard is opened once while the context lasts."""
        with ExitStack() as stack:
            files: dict[str, Any] = {}

            def read(name: str) -> Tensor:
                shard = self._stored.files[name].shard
                if shard not in files:
                    files[shard] = stack.enter_context(safe_open(self.path / shard, framework="pt"))
                tensor: Tensor = files[shard].get_tensor(name)
                return tensor

            yield lambda name: self._stored.read(name, read) if self._entry(name) else read(name)

    def header(self, name: str) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of one tensor; reads no data."""
        entry = self._entry(name)
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{self.path / entry.shard}: {name} is {entry.dtype}, which moefold cannot read")
        return entry.shape, _DTYPES[entry.dtype]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own tokenizer; code from the checkpoint is never run."""
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # a damaged tokenizer.json makes it raise anything
            told = str(error) if isinstance(error, OSError | ValueError | ImportError) else repr(error)
            first = told.splitlines()[0] if told else type(error).__name__
            raise CheckpointError(f"{self.path}: no tokenizer that can be read ({first}); {_ADD_TOKENIZER}") from error
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes an empty one of no files at all
            raise CheckpointError(f"{self.path}: the tokenizer has no vocabulary; {_ADD_TOKENIZER}")
        return tokenizer

    def layers(self) -> list[Layer]:
        """The decoder layers that have routed experts, in order."""
        from moefold.layer import Layer  # which has a checkpoint

        return [Layer(self, number, position) for position, number in enumerate(self.skeleton.experts)]

    def layer(self, number: int) -> Layer:
        """A layer with experts, by the number of its decoder layer."""
        for layer in self.layers():
            if layer.number == number:
                return layer
        known = ", ".join(str(n) for n in self.skeleton.experts)
        raise CheckpointError(f"{self.path}: decoder layer {number} has no routed experts; those that do: {known}")

    def check_layers(self, named: Collection[int]) -> None:
        """Raise InputError where an option names a decoder layer that has no routed experts."""
        if wrong := [number for number in named if number not in self.skeleton.experts]:
            known = ", ".join(map(str, self.skeleton.experts))
            raise InputError(f"layer {wrong[0]} has no routed experts; those that have: {known}")

    @cached_property
    def _stored(self) -> StoredTensors:
        return StoredTensors(read_entries(self.path), self.quantized)

    @property
    def _entries(self) -> dict[str, Entry]:
        return self._stored.plain

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: no tensor {name}{suggest(name, self._near(name))}")
        return self._entries[name]

    def _near(self, name: str) -> list[str]:
        stem = name.rpartition(".")[0]
        return [known for known in self._entries if known.startswith(stem)][:50]
