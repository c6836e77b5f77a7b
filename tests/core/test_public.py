"""The public face, pinned; and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moefold
import moefold_kernels
from moefold import artifacts, errors, hooks, testing
from moefold.errors import PluginError
from moefold.hooks import Registry, hookimpl
from moefold.stage import Context, stage
from moefold.testing import plugin as fixtures
from moefold_kernels import layout

ROOT = Path(__file__).parents[2]

PUBLIC = {
    "Activity", "Aligned", "Artifact", "Baseline", "Benchmark",
    "Checkpoint", "Codec", "Coded", "CodedLayer", "Context", "DualMask",
    "ExpertNames", "Experts", "Figure",
    "Groups", "Json", "Layer", "Layers", "LevelLoop", "LevelTable", "LeveledPair", "Levels",
    "MergePlan", "MergedPair", "MergedPairs", "Metrics", "MoefoldError", "Packed", "PairDamage", "PairMerge",
    "Paired", "Previous", "Provenance",
    "Pruning", "Quantized", "Reduced", "Replacement", "Routed", "Saved", "Scheme", "Similarity", "Stage",
    "StreamedModel", "Text", "Unpacked", "Workbench", "__version__", "benchmark", "hookimpl", "stage",
}  # fmt: skip

TESTING = {
    "CheckError", "Shape", "Unchecked", "World", "check_backend", "check_codec", "check_family", "check_stage",
    "run_pipeline", "small_model",
}  # fmt: skip
FIXTURES = {"moefold_model", "moefold_run", "moefold_world"}

# What may grow, but not shrink: docs/plugins.md promises that.
ARTIFACTS = {
    "Activity", "Baseline", "DualMask", "Experts", "Groups", "MergedPair", "Metrics", "PairMerge", "Paired", "Routed",
    "Similarity", "Text", "as_index", "digest", "tensor_bytes",
}  # fmt: skip
ERRORS = {
    "CheckpointError", "FormatError", "InputError", "MoefoldError", "PipelineError", "PluginError", "StageError",
    "StoreError", "TextError",
}  # fmt: skip
KERNELS = {
    "Answer", "Backend", "BackendError", "FormatError", "KernelsError", "LayerEntry", "MergedLayer", "Need",
    "PackedExperts", "PackedLayer", "Reference", "ask", "builtin", "choose", "decode", "decode_pairs", "encode",
    "experts", "fuse", "read_config", "read_layer", "write_config",
}  # fmt: skip
STAGES = {
    "align": "method", "average": "", "damage.pairs": "sample blend",
    "dequantize": "", "evaluate.baseline": "batch", "evaluate.layers": "text samples",
    "evaluate.perplexity": "batch", "forward": "batch", "group.by_use": "experts fraction per_layer skip",
    "group.hierarchical": "experts fraction per_layer skip", "group.kmeans": "experts fraction per_layer skip seed",
    "group.random": "experts fraction per_layer skip seed", "levels": "layers",
    "mergemoe": "target tokens ridge anchor", "model": "", "msmoe": "",
    "observe": "minimum", "pack.exponent": "window", "pack.pair4": "levels",
    "pack.pair5": "levels", "pack.pair6": "levels", "pack.pair8": "levels", "pair.by_usage": "fraction skip",
    "pack.planned": "", "pair.planned": "", "plan.budget": "budget formats protect skip", "plan.read": "path",
    "unpack.planned": "",
    "pair.random": "seed fraction skip", "pair.similar": "fraction skip", "prune.by_use": "experts fraction",
    "prune.random": "experts fraction seed", "prune.reap": "experts fraction", "puzzlemoe": "threshold",
    "quantize": "scheme group", "save": "to shard_size export", "similarity.gated_outputs": "metric",
    "similarity.outputs": "tokens metric", "similarity.router": "", "similarity.weights": "matrices",
    "text.files": "files field samples length seed spread", "text.mix": "shares samples seed",
    "text.prose": "samples length seed spread", "text.stdlib": "part samples length seed spread", "unpack.exponent": "",
}  # fmt: skip


def test_public_names_are_pinned():
    assert set(moefold.__all__) == PUBLIC
    assert all(hasattr(moefold, name) for name in PUBLIC)
    assert set(testing.__all__) == TESTING
    assert {name for name in vars(fixtures) if name.startswith("moefold_")} == FIXTURES


def test_nothing_public_goes_away():
    assert set(moefold_kernels.__all__) >= KERNELS
    assert set(vars(artifacts)) >= ARTIFACTS
    assert set(vars(errors)) >= ERRORS
    stages = Registry.installed().stages
    for name, options in STAGES.items():
        assert set(stages[name].options.model_fields) >= set(options.split()), name


@pytest.mark.parametrize("folder", ["docs/examples", "core/moefold/templates"])
def test_what_plugins_are_shown_is_public(folder):
    """The examples, and what `moefold new plugin` writes."""
    allowed = {"moefold", "moefold.errors", "moefold.artifacts", "moefold.testing", "moefold_kernels"}
    found = [path for path in (ROOT / folder).rglob("*") if path.name.endswith((".py", ".py.txt"))]
    assert len(found) > 5
    for path in found:
        text = path.read_text().replace("$module", "module").replace("$key", "key").replace("$codec", "codec")
        names = {n for n in imported(path, text) if n.partition(".")[0] in ("moefold", "moefold_kernels")}
        assert names <= allowed, path


def test_a_context_is_a_device_and_a_generator_and_nothing_else_ever():
    assert list(Context.__dataclass_fields__) == ["device", "generator"]


def imported(path: Path, text: str | None = None) -> set[str]:
    """The full names of the modules that a file imports at any place."""
    tree = ast.parse(path.read_text() if text is None else text)
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
    assert set(specs) == {
        "moefold_stages", "moefold_codecs", "moefold_backends", "moefold_models", "moefold_executor",
        "moefold_benchmarks",
    }  # fmt: skip
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
