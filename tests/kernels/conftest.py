"""Tiny tensors on one thread; kernels on a GPU, or interpreted."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from merged_checkpoints import KINDS, ROUTE, merge_checkpoint
from packing import pack_checkpoint

from models import tiny
from moefold_kernels import layout


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: compiled on a GPU, interpreted on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """More threads than one only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What is launched as on Hopper, which nothing runs: (name, module, grid, arguments, options) of each kernel."""
    pytest.importorskip("moefold_kernels.triton.e4m3", reason="needs a Triton that has Gluon")
    from moefold_kernels.triton import e4m3_launch, layer, leveled_launch, routing, streamed_launch

    seen: list[tuple] = []

    def launch(kernel, grid, *given, **options) -> None:
        seen.append((kernel.fn.__name__, kernel.fn.__module__, grid, given, options))

    for module in (layer, e4m3_launch, leveled_launch, routing, streamed_launch):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(streamed_launch, "processors", lambda device: 132)
    target = layer.Target(assembly=True, upcast=False, overlap=True, chain=True)
    monkeypatch.setattr(layer.Target, "of", lambda tensor: target)
    return seen


@pytest.fixture
def a_device_each() -> None:
    """For tests that start two processes: on CPUs, or with a GPU of its own for each."""
    if torch.cuda.device_count() == 1:
        pytest.skip("two processes need two GPUs, or none")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A function that makes (packed, twin) directories, once per arguments; the rest are keys of the model's config."""
    known: dict[object, tuple[Path, Path]] = {}

    def make(
        family: str, alone: int = 0, layers: tuple[int, ...] | None = None, format: str = layout.EXPONENT, **config
    ) -> tuple[Path, Path]:
        key = (family, alone, layers, format, *sorted(config.items()))
        if key not in known:
            root = tmp_path_factory.mktemp(family)
            source = tiny(family, root / "source", shard_size="1GB", **{"num_hidden_layers": 2} | config)
            pack_checkpoint(source, root / "packed", root / "twin", alone=alone, layers=layers, format=format)
            known[key] = root / "packed", root / "twin"
        return known[key]

    return make


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A function that makes (merged, twin) directories, once per family and kind (a key of KINDS)."""
    known: dict[object, tuple[Path, Path]] = {}

    def make(family: str, kind: str = "merged") -> tuple[Path, Path]:
        if (family, kind) not in known:
            root = tmp_path_factory.mktemp(family)
            source = tiny(family, root / "source", shard_size="1GB", num_hidden_layers=2)
            merge_checkpoint(source, root / "ours", root / "twin", ROUTE, KINDS[kind])
            known[family, kind] = root / "ours", root / "twin"
        return known[family, kind]

    return make
