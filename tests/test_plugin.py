"""A third party's plugin: installed into a fresh environment, found by its entry point, used from YAML."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from environments import Environment
from models import tiny

HERE = Path(__file__).parent

PIPELINE = """\
model: {model}
stages:
  - {{id: calibration, uses: text.files, with: {{files: [text.txt], samples: 2, length: 32}}}}
  - {{uses: forward, needs: {{text: calibration}}}}
  - {{uses: observe, with: {{minimum: 1}}}}
  - {{uses: pair.neighbours, with: {{shift: 1}}}}
  - {{uses: puzzlemoe}}
  - {{uses: pack.exponent}}
  - {{uses: save, with: {{to: packed}}}}
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A fresh one with the plugin installed by pip."""
    folder = tmp_path_factory.mktemp("environment")
    made = Environment(folder / "environment")
    made.install(shutil.copytree(HERE / "example_plugin", folder / "plugin"))
    return made


@pytest.mark.slow
def test_stage_by_entry_point_used_from_yaml(environment: Environment, tmp_path: Path) -> None:
    tiny("qwen3_moe", tmp_path / "model")
    (tmp_path / "text.txt").write_text("What a plugin gives, a pipeline can use. " * 20)
    (tmp_path / "p.yaml").write_text(PIPELINE.format(model=tmp_path / "model"))
    report = json.loads(environment.run("moefold run p.yaml --json", tmp_path))
    layers = report["packed"]["pack.exponent"]
    assert {tuple(map(tuple, facts["pairs"])) for facts in layers.values()} == {((1, 2), (3, 4), (5, 6), (0, 7))}
    quantization = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "moefold"


def test_this_environment_does_not_have_it() -> None:
    """Or the test above would show nothing."""
    code = "from moefold.hooks import Registry; print('pair.neighbours' in Registry.installed().stages)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
