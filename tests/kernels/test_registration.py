"""One import is enough for stock transformers, before or after transformers itself; and it is not heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LOAD = """
import sys
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.experts).__name__)
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from packing import pack_checkpoint

    from models import tiny

    folder = tmp_path_factory.mktemp("packed")
    source = tiny("qwen3_moe", folder / "source", shard_size="1GB", num_hidden_layers=1)
    pack_checkpoint(source, folder / "packed", folder / "twin", alone=0)
    return folder / "packed"


@pytest.mark.parametrize(
    "imports",
    [
        "import moefold_kernels, transformers",
        "import transformers, moefold_kernels",
        "import transformers; transformers.AutoModelForCausalLM; import transformers.modeling_utils, moefold_kernels",
        "import moefold, transformers",
    ],
)
def test_one_import_is_enough(packed: Path, imports: str) -> None:
    assert python(imports + LOAD, str(packed)) == "PackedQwen3MoeExperts"


def test_transformers_is_not_imported_before_it_is_used() -> None:
    code = "import sys, moefold, moefold.cli; from moefold.hooks import Registry; Registry.installed()"
    assert python(f"{code}; print('transformers' in sys.modules)") == "False"


def test_the_module_is_left_as_others_find_it() -> None:
    code = (
        "import sys, moefold_kernels\n"
        "import transformers.modeling_utils as awaited\n"
        "waiting = [f for f in sys.meta_path if type(f).__module__.startswith('moefold')]\n"
        "print(waiting, type(awaited.__loader__).__name__, type(awaited.__spec__.loader).__name__)"
    )
    assert python(code) == "[] SourceFileLoader SourceFileLoader"
