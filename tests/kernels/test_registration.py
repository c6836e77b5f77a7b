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


@pytest.mark.parametrize(
    ("imports", "lacks"),
    [
        ("import moefold_kernels; sys.modules['moefold_kernels.finding'] = None", "moefold_kernels.finding"),
        (
            "from transformers.integrations import moe; import transformers.modeling_utils; "
            "del moe.ALL_EXPERTS_FUNCTIONS; import moefold_kernels",
            "ALL_EXPERTS_FUNCTIONS",
        ),
    ],
)
def test_a_transformers_that_does_not_fit_works_as_without_us(imports: str, lacks: str) -> None:
    """Something is missing, as in an older one: a server that takes the kernels alone must not fail to start."""
    code = (
        "import sys, warnings\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        f"    {imports}\n"
        "    import transformers.modeling_utils\n"
        "print(*(str(w.message) for w in said if 'packed checkpoints' in str(w.message)), sep='; ')"
    )
    said = python(code)
    assert said.startswith("packed checkpoints cannot be loaded by this transformers (")
    assert lacks in said
    assert said.endswith("it takes transformers 5.17 or later and safetensors")


def test_the_module_is_left_as_others_find_it() -> None:
    code = (
        "import sys, moefold_kernels\n"
        "import transformers.modeling_utils as awaited\n"
        "waiting = [f for f in sys.meta_path if type(f).__module__.startswith('moefold')]\n"
        "print(waiting, type(awaited.__loader__).__name__, type(awaited.__spec__.loader).__name__)"
    )
    assert python(code) == "[] SourceFileLoader SourceFileLoader"
