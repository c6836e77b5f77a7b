"""The demo model: what its folder holds, what its split promises, and what it reaches on unseen text."""

import hashlib
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from moefold_plugins.demo import PATH, card, stdlib

SAMPLE = ("csv", "getopt", "linecache", "selectors", "tty", "random")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(PATH)


@pytest.fixture(scope="module")
def model() -> Any:
    # The plain loop over experts, in float32: the fastest way on a CPU.
    return AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32, experts_implementation="eager")


@pytest.fixture(scope="module")
def sample() -> list[tuple[str, str]]:
    """Return the first 4,000 characters of some modules from the part `evaluate`."""
    return [(name, text[:4_000]) for name, text in stdlib.modules("evaluate") if name in SAMPLE]


def test_the_folder_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in PATH.iterdir()}
    assert sum(files.values()) <= 12_000_000
    assert set(files) == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_the_configuration_is_a_qwen3_moe(model: Any) -> None:
    assert isinstance(model, Qwen3MoeForCausalLM)
    size = model.config
    assert (size.num_experts, size.num_experts_per_tok, size.norm_topk_prob) == (16, 4, True)
    assert size.num_hidden_layers >= 4
    assert size.max_position_embeddings >= 2048
    assert size.tie_word_embeddings
    assert all(width % 16 == 0 for width in (size.hidden_size, size.moe_intermediate_size, size.head_dim))


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("argparse", "train"),
        ("json.decoder", "train"),
        ("logging", "calibrate"),
        ("xml.etree.ElementTree", "calibrate"),
        ("unittest.mock", "evaluate"),
        ("random", "evaluate"),
        ("test.test_random", "train"),
        ("encodings.cp1252", "train"),
        ("idlelib.pyshell", "train"),
    ],
)
def test_the_split_is_by_name_and_stable(module: str, part: str) -> None:
    assert stdlib.part_of(module) == part


def test_each_held_out_part_is_about_a_tenth_of_all_names() -> None:
    parts = [stdlib.part_of(f"package.module_{i}") for i in range(5000)]
    assert 0.08 < parts.count("calibrate") / 5000 < 0.12
    assert 0.08 < parts.count("evaluate") / 5000 < 0.12


def test_modules_are_sorted_and_in_their_part() -> None:
    held = [name for part in ("calibrate", "evaluate") for name, text in stdlib.modules(part) if text]
    assert len(held) == len(set(held)) > 60
    names = [name for name, _ in stdlib.modules("evaluate")]
    assert names == sorted(names)
    assert {stdlib.part_of(name) for name in names} == {"evaluate"}


def test_the_prose_is_in_no_part() -> None:
    assert len(stdlib.prose()) > 50
    with pytest.raises(ValueError, match="in no part"):
        stdlib.part_of("pydoc_data.topics")
    assert not any(name.startswith("pydoc_data") for name, _ in stdlib.modules("train"))


@pytest.mark.parametrize(
    "text", ["", " x\t\n\r\n  ", "def f(x):\n    return x\n", "Größe 東京 🐍 \x00\u200b é", "  \n\n\t  a"]
)
def test_the_tokenizer_returns_any_text_unchanged(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_predicts_unseen_modules_better_than_xz(model: Any, tokenizer: Any, sample: list[tuple[str, str]]) -> None:
    bits, shares = card.measure(model, tokenizer, sample)
    assert bits <= 1.1, "the card says 0.80 on all of them, and 1.4 is what was asked for"
    assert bits < card.xz(sample)
    assert min(map(min, shares)) > 0, "an expert is not used on unseen text"


def test_no_expert_is_dead_or_a_copy(model: Any) -> None:
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            assert weight.norm(dim=-1).min() > 0.01
            digests = {hashlib.sha256(expert.detach().numpy().tobytes()).digest() for expert in weight}
            assert len(digests) == len(weight)


def test_it_writes_code(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer(
        "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.", return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "self.y = y" in tokenizer.decode(output[0])
