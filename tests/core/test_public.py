"""The public face, pinned; and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moefold
from moefold import hooks
from moefold.errors import PluginError
from moefold.hooks import Registry, hookimpl
from moefold.stage import Context, stage
from moefold_kernels import layout

ROOT = Path(__file__).parents[2]

PUBLIC = {
    "Activity", "Aligned", "Artifact", "Baseline", "Checkpoint", "Codec", "Coded", "CodedLayer", "Context", "DualMask",
    "ExpertNames", "Experts", "Groups", "Json", "Layer", "Layers", "LevelLoop", "LevelTable", "LeveledPair", "Levels",
    "MergedPair", "MergedPairs", "Metrics", "MoefoldError", "Packed", "PairMerge", "Paired", "Previous", "Provenance",
    "Pruning", "Quantized", "Reduced", "Replacement", "Routed", "Saved", "Scheme", "Similarity", "Stage",
    "StreamedModel", "Text", "Unpacked", "__version__", "hookimpl", "stage",
}  # fmt: skip


def test_public_names_are_pinned():
    assert set(moefold.__all__) == PUBLIC
    assert all(hasattr(moefold, name) for name in PUBLIC)


def test_a_context_is_a_device_and_a_generator_and_nothing_else_ever():
    assert list(Context.__dataclass_fields__) == ["device", "generator"]


def imported(path: Path) -> set[str]:
    """The full names of the modules that a file imports at any place."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: p.name)
def test_kernels_import_neither_core_nor_plugins(path):
    assert not [n for n in imported(path) if n.partition(".")[0] in ("moefold", "moefold_plugins")]


@pytest.mark.parametrize("path", files("core"), ids=lambda p: p.name)
def test_core_does_not_import_plugins(path):
    assert not [n for n in imported(path) if n.partition(".")[0] == "moefold_plugins"]


@pytest.mark.parametrize("path", files("plugins"), ids=lambda p: p.name)
def test_plugins_import_the_public_face(path):
    """`moefold`, its errors and artifacts; not the plan, the loop, the store."""
    allowed = {"moefold", "moefold.errors", "moefold.artifacts"}
    assert {n for n in imported(path) if n.partition(".")[0] == "moefold"} <= allowed


def test_kernels_need_torch_only():
    code = (
        "import sys\n"
        "for name in ('moefold', 'transformers', 'triton', 'pydantic', 'pluggy', 'safetensors', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        "import moefold_kernels, moefold_kernels.layout, moefold_kernels.reference, moefold_kernels.backend\n"
        "print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


def test_every_hook_is_documented_in_one_sentence():
    specs = {n: f for n, f in vars(hooks).items() if n.startswith("moefold_") and callable(f)}
    assert set(specs) == {"moefold_stages", "moefold_codecs", "moefold_backends", "moefold_models", "moefold_executor"}
    for function in specs.values():
        assert function.__doc__
        assert len(function.__doc__.splitlines()) == 1


def test_everything_installed_describes_itself():
    registry = Registry.installed()
    for name, one in registry.stages.items():
        assert one.summary.endswith((".", ")")), f"{name}: {one.summary!r}"
        for option, field in one.options.model_fields.items():
            assert field.description, f"{name}.{option} has no description"
    assert layout.EXPONENT in registry.codecs
    assert registry.stages.source("puzzlemoe") == "moefold"


class Plugin:
    """A plugin object, as a module would be."""

    def __init__(self, **hooks_):
        self.__dict__ |= hooks_


@stage("twice")
def twice() -> moefold.Groups:
    """A stage."""
    raise AssertionError


def test_a_name_given_twice_names_both_sides():
    one = Plugin(moefold_stages=hookimpl(lambda: [twice]))
    with pytest.raises(PluginError, match=r"two plugins give the stage twice: here and there"):
        Registry([("a", one, "here"), ("b", Plugin(moefold_stages=hookimpl(lambda: [twice])), "there")])


def test_a_misspelt_hook_is_an_error():
    with pytest.raises(PluginError, match=r"moefold_stage\b.*did you mean moefold_stages"):
        Registry([("a", Plugin(moefold_stage=hookimpl(lambda: [])), "here")])


def test_a_hook_without_its_marker_is_an_error():
    with pytest.raises(PluginError, match=r"moefold_stages has no @hookimpl"):
        Registry([("a", Plugin(moefold_stages=lambda: []), "here")])


def test_a_hook_that_returns_nothing_is_an_error():
    with pytest.raises(PluginError, match=r"must take nothing and return a list"):
        Registry([("a", Plugin(moefold_stages=hookimpl(lambda: None)), "here")])
