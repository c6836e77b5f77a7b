"""Workers, their threads and what each runs; where there is no GPU, Triton's interpreter and the skip of GPU tests."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

WORKERS = int(os.environ.pop("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.pop("PYTEST_XDIST_WORKER", None)  # else a pytest that a test starts takes itself for a worker
if WORKERS > 1:  # before torch is imported, here and in what the tests start: workers that fight for cores take longer
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

import torch  # noqa: E402

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "core")]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for the whole process: read when triton is first imported


TOGETHER = ("*quality.py", "*/test_site*.py")
"""Files that share what is made once a session: `quality_bench`, `site`. One worker takes all of a kind."""


def scope(file: str) -> str:
    """What one worker takes: a file, so that fixtures of a module are made once, or files that belong together."""
    return next((kind for kind in TOGETHER if fnmatch(file, kind)), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """None where files of a folder are shared out, one a core; 0 (this process) for named files, times, and a GPU."""
    whole = any(Path(argument).is_dir() for argument in config.args)
    timed = any(config.getoption(f"benchmark_{how}", default=None) for how in ("only", "enable", "json"))
    return None if whole and not timed and not torch.cuda.is_available() else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling  # not needed by `pytest -o addopts=`, which runs in one process

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid.partition("::")[0])

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def quality_bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A quality.Bench: calibrations and losses that several files ask for are computed once."""
    from quality import Bench  # not before a test needs transformers

    return Bench(tmp_path_factory.mktemp("quality"))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by `mkdocs build`; a warning, such as a broken link or a page that nothing leads to, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    scopes = {item: scope(item.nodeid.partition("::")[0]) for item in items}
    slow = {scopes[item] for item in items if "slow" in item.keywords}
    # What takes long first, or one worker waits for another at the end.
    items.sort(key=lambda item: (scopes[item] not in TOGETHER, scopes[item] not in slow, scopes[item]))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
