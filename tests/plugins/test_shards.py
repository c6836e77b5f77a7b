"""Large shards, written tensor by tensor: the files are safetensors like any."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import moefold_plugins.shards as shards_module
import moefold_plugins.stream as stream_module
from moefold_plugins.shards import Shards
from moefold_plugins.stream import Stream


def streamed(path: Path, tensors: dict[str, torch.Tensor], size: int = 2**40) -> Shards:
    path.mkdir()
    with Shards(path, size) as shards:
        for name, tensor in tensors.items():
            shards.add(name, tensor)
    return shards


def test_large_shards_are_written_as_tensors_come(tmp_path, monkeypatch):
    """Of every dtype and odd sizes; the files hold what safetensors' own writer would, and memory no more than HELD."""
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn, torch.int16, torch.uint8, torch.float64]
    tensors = {
        f"t.{i}": torch.randn(3 + i, 5, generator=generator).mul(40).abs().to(kinds[i % len(kinds)]) for i in range(60)
    } | {"empty": torch.empty(0, dtype=torch.bfloat16), "scalar": torch.tensor(3, dtype=torch.int32)}
    monkeypatch.setattr(shards_module, "HELD", 1000)
    held = []
    add = Stream.add
    monkeypatch.setattr(Stream, "add", lambda self, name, tensor: (held.append(name), add(self, name, tensor))[1])
    shards = streamed(tmp_path / "one", tensors)
    assert set(held) == set(tensors)
    found = load_file(tmp_path / "one" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (found[name], tensor)))
    assert shards.total == sum(t.numel() * t.element_size() for t in tensors.values())
    streamed(tmp_path / "two", tensors, 4000)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 3
    files = {n: t for f in (tmp_path / "two").glob("*.safetensors") for n, t in load_file(f).items()}
    assert files.keys() == tensors.keys()


def test_a_shard_of_many_small_tensors_is_closed_before_its_header_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "HELD", 8)
    for module in (shards_module, stream_module):
        monkeypatch.setattr(module, "ROOM", 4096)
    tensors = {f"layers.{i}.weight": torch.full((4,), float(i)) for i in range(100)}
    streamed(tmp_path / "one", tensors)
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    assert len(files) > 3
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
