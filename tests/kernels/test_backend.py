"""Choosing a backend, and what `import moefold_kernels` needs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import moefold_kernels
from moefold_kernels import BackendError, Need, Reference, ask, builtin, choose

PACKAGE = Path(moefold_kernels.__file__).parent
NEED = Need("exponent", torch.device("cpu"))


@dataclass(frozen=True)
class Picky(Reference):
    """Refuses everything."""

    name: str = "picky"

    def can(self, need):
        return False, f"wants hidden divisible by 64, not {need.hidden}"


def test_the_reference_is_always_able():
    for device in ("cpu", "cuda"):
        assert choose(replace(NEED, device=torch.device(device)), [Reference()]).name == "reference"


def test_the_first_that_can_is_chosen_and_the_reasons_are_kept():
    backends = [Picky(), Reference()]
    assert choose(NEED, backends).name == "reference"
    assert [(a.backend.name, a.able) for a in ask(NEED, backends)] == [("picky", False), ("reference", True)]


def test_a_named_backend_is_not_replaced_by_another():
    with pytest.raises(BackendError, match="picky: wants hidden divisible by 64, not 100"):
        choose(replace(NEED, hidden=100), [Picky(), Reference()], "picky")
    with pytest.raises(BackendError, match="there is no backend fast; there are: picky, reference"):
        choose(NEED, [Picky(), Reference()], "fast")


def test_every_reason_is_in_the_error():
    with pytest.raises(BackendError) as caught:
        choose(replace(NEED, format="4bit"), [Picky(), Reference()])
    assert "picky: wants hidden" in str(caught.value)
    assert "reference: knows formats exponent, pair4, pair5, pair6, pair8, not 4bit" in str(caught.value)
    with pytest.raises(BackendError, match="no backend given"):
        choose(NEED, [])


def test_the_plugin_offers_them():
    from moefold_kernels import plugin

    assert [backend.name for backend in plugin.moefold_backends()] == [backend.name for backend in builtin()]
    assert hasattr(plugin.moefold_backends, "moefold_impl")


def test_no_file_imports_moefold_or_its_plugins():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"moefold", "moefold_plugins"}, path


def test_importing_the_package_needs_torch_only():
    banned = ("transformers", "safetensors", "pluggy", "pydantic", "triton", "moefold", "accelerate")
    code = f"import sys; sys.modules.update(dict.fromkeys({banned!r})); import torch, moefold_kernels; print('ok')"
    path = [str(PACKAGE.parent)]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "ok", result.stderr


ALONE = """
import sys

class Refusing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in BANNED:
            raise ModuleNotFoundError(f"{name} is not there", name=name)

sys.meta_path.insert(0, Refusing())

import torch
from layers import assert_near, batch, operands, random_layer
from moefold_kernels import reference
from moefold_kernels.activation import silu
from moefold_kernels.triton import ops

layer, arguments = random_layer(5, 64, 32, 1), batch(4, 64, 2, 5)
found = torch.ops.moefold.experts(*arguments, *operands(layer), "silu", 0.0, 0.0, torch.float32)
assert_near(found, reference.experts(layer.packed, *arguments, silu))
print(*sorted(BANNED & {name.partition(".")[0] for name in sys.modules}), "ok")
"""


def test_a_layer_needs_torch_and_triton_only():
    pytest.importorskip("triton", reason="needs triton")
    banned = {"transformers", "safetensors", "pluggy", "pydantic", "accelerate", "typer", "rich"}
    banned |= {"moefold", "moefold_plugins"}
    result = subprocess.run(
        [sys.executable, "-c", f"BANNED = {banned!r}\n{ALONE}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert result.stdout.strip() == "ok", result.stderr
