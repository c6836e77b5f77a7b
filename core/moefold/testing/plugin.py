"""Fixtures for a plugin's tests: `pytest_plugins = ["moefold.testing.plugin"]` in its conftest.py.

Not an entry point of pytest: that would import torch in every test run of an environment that has moefold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moefold import Checkpoint
from moefold.artifact import Json
from moefold.testing.model import small_model
from moefold.testing.pipelines import run_pipeline
from moefold.testing.world import World


@pytest.fixture(scope="session")
def moefold_model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random Qwen3-MoE of two layers and four experts, with a tokenizer: `moefold_model.path` is its directory."""
    return small_model(tmp_path_factory.mktemp("moefold") / "model")


@pytest.fixture
def moefold_world(moefold_model: Checkpoint) -> World:
    """The first layer of that model: `world.layer`, `world.context()`, `world.make(Activity)`."""
    return World(moefold_model)


@pytest.fixture
def moefold_run(tmp_path: Path) -> Callable[..., dict[str, Json]]:
    """`run_pipeline` over a store of this test: `moefold_run(yaml_text, plugins=[module])`."""
    return lambda text, **more: run_pipeline(text, tmp_path, **more)
