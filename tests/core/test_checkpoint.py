"""Checkpoints: what is read, and that everything wrong with one is said clearly and early."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from models import ARCHITECTURES, tiny
from moefold.checkpoint import Checkpoint
from moefold.errors import CheckpointError

EXPERTS = "model.layers.2.mlp.experts"
PREFIXES = dict.fromkeys(ARCHITECTURES, EXPERTS) | {"mixtral": "model.layers.2.block_sparse_moe.experts"}
STANDARD = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
W123 = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny(name, root / name) for name in ARCHITECTURES}


@pytest.fixture
def qwen(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved["qwen3_moe"], tmp_path / "qwen"))


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(path: Path, name: str) -> None:
    """Take one tensor out of a checkpoint, index included."""
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = path / index["weight_map"].pop(name)
    save_file({key: value for key, value in load_file(shard).items() if key != name}, shard, {"format": "pt"})
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_are_those_with_experts(saved: dict[str, Path], name: str) -> None:
    layers = Checkpoint.open(str(saved[name])).layers()
    dense = 1 if name == "deepseek_v3" else 0
    count = ARCHITECTURES[name].get("num_hidden_layers", 3)
    assert [(layer.number, layer.position) for layer in layers] == [(n, n - dense) for n in range(dense, count)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_the_files(saved: dict[str, Path], name: str) -> None:
    checkpoint = Checkpoint.open(str(saved[name]))
    names = checkpoint.layer(2).names()
    assert names.prefix == PREFIXES[name]
    assert names.matrix == (W123 if name == "mixtral" else STANDARD)
    assert names.fused == (name == "gpt_oss")
    if names.fused:
        expected = {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    else:
        expected = {f"{names.prefix}.{e}.{m}.weight" for e in range(8) for m in names.matrix.values()}
    assert set(names.keys) == expected <= set(checkpoint.weight_map)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt_oss"])
def test_experts_are_the_files_matrices_bit_for_bit(saved: dict[str, Path], name: str) -> None:
    checkpoint = Checkpoint.open(str(saved[name]))
    names, experts = checkpoint.layer(2).names(), checkpoint.layer(2).experts()
    for matrix, weights in experts.matrices().items():
        for expert, weight in enumerate(weights):
            assert torch.equal(weight, checkpoint.tensor(f"{names.prefix}.{expert}.{names.matrix[matrix]}.weight"))
    assert experts.count == 8
    assert experts.route is None


def test_transposed_and_interleaved_experts_become_canonical(saved: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(str(saved["gpt_oss"]))
    experts = checkpoint.layer(2).experts()
    gate_up, bias = checkpoint.tensor(f"{EXPERTS}.gate_up_proj"), checkpoint.tensor(f"{EXPERTS}.gate_up_proj_bias")
    for expert in range(8):
        assert torch.equal(experts.matrices()["gate_proj"][expert], gate_up[expert, :, 0::2].T)
        assert torch.equal(experts.matrices()["up_proj"][expert], gate_up[expert, :, 1::2].T)
        assert torch.equal(experts.down[expert], checkpoint.tensor(f"{EXPERTS}.down_proj")[expert].T)
    assert experts.gate_up_bias is not None
    assert torch.equal(experts.gate_up_bias, torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1))
    assert experts.down_bias is not None
    assert torch.equal(experts.down_bias, checkpoint.tensor(f"{EXPERTS}.down_proj_bias"))


def test_experts_keep_the_dtype_of_the_files(qwen: Path) -> None:
    edit_config(qwen, dtype="float32")
    assert Checkpoint.open(str(qwen)).layer(0).experts().down.dtype == torch.bfloat16


def test_headers_tell_shape_and_dtype(saved: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(str(saved["deepseek_v3"]))
    for name in checkpoint.weight_map:
        tensor = checkpoint.tensor(name)
        assert checkpoint.header(name) == (list(tensor.shape), tensor.dtype)
    assert checkpoint.header("model.layers.1.mlp.gate.e_score_correction_bias")[1] == torch.float32


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny("qwen3_moe", tmp_path / "m", shard_size="1GB")))
    assert set(checkpoint.weight_map.values()) == {"model.safetensors"}
    assert len(checkpoint.layers()) == 3


def test_fingerprint_follows_config_headers_and_times(qwen: Path) -> None:
    first = Checkpoint.open(str(qwen)).fingerprint()
    assert Checkpoint.open(str(qwen)).fingerprint() == first
    shard = sorted(qwen.glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 1))
    touched = Checkpoint.open(str(qwen)).fingerprint()
    edit_config(qwen, note=1)
    edited = Checkpoint.open(str(qwen)).fingerprint()
    (qwen / "tokenizer.json").write_text((qwen / "tokenizer.json").read_text().replace("<bos>", "<end>"))
    assert len({first, touched, edited, Checkpoint.open(str(qwen)).fingerprint()}) == 4


def test_strict_fingerprint_follows_contents_only(qwen: Path) -> None:
    first = Checkpoint.open(str(qwen)).fingerprint(strict=True)
    shard = sorted(qwen.glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 1))
    assert Checkpoint.open(str(qwen)).fingerprint(strict=True) == first
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert Checkpoint.open(str(qwen)).fingerprint(strict=True) != first


def test_handles_are_small_to_pickle_even_after_use(saved: dict[str, Path]) -> None:
    layer = Checkpoint.open(str(saved["mixtral"])).layer(1)
    experts = layer.experts()
    data = pickle.dumps(layer)
    assert len(data) < 600
    again = pickle.loads(data)
    assert again == layer
    assert hash(again) == hash(layer)
    assert torch.equal(again.experts().down, experts.down)


def test_tokenizer(saved: dict[str, Path]) -> None:
    tokenizer = Checkpoint.open(str(saved["olmoe"])).tokenizer()
    assert tokenizer.decode(tokenizer("Grüße, world")["input_ids"], skip_special_tokens=True) == "Grüße, world"


def test_missing_tokenizer_says_what_to_add(qwen: Path) -> None:
    for file in qwen.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"the tokenizer has no vocabulary; put the model's tokenizer.json"):
        Checkpoint.open(str(qwen)).tokenizer()


def test_a_damaged_tokenizer(qwen: Path) -> None:
    (qwen / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no tokenizer that can be read \(.*\); put the model's tokenizer.json"):
        Checkpoint.open(str(qwen)).tokenizer()


def test_hub_ids_are_downloaded_without_code_and_pickles(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(qwen)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("owner/model", revision="v1").path == qwen
    assert (asked["name"], asked["revision"], asked["ignore_patterns"]) == ("owner/model", "v1", ["*/*"])
    patterns = asked["allow_patterns"]
    for name in ("model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "chat_template.jinja"):
        assert any(fnmatch(name, pattern) for pattern in patterns)
    for name in ("pytorch_model.bin", "modeling_x.py", "model.gguf", "training_args.pt"):
        assert not any(fnmatch(name, pattern) for pattern in patterns)


def test_unknown_hub_id_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError(f"{name} is not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"owner/model: neither a local directory nor .*check the spelling"):
        Checkpoint.open("owner/model")


def test_unknown_tensor_gets_a_suggestion(saved: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor model.norm.weights; did you mean model.norm.weight\?"):
        Checkpoint.open(str(saved["olmoe"])).tensor("model.norm.weights")


def test_dense_layers_are_no_layers(saved: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"decoder layer 0 has no routed experts; those that do: 1, 2"):
        Checkpoint.open(str(saved["deepseek_v3"])).layer(0)


class TestRefused:
    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"gone: no such directory; give"):
            Checkpoint.open(str(tmp_path / "gone"))

    def test_revision_of_a_directory(self, qwen: Path) -> None:
        with pytest.raises(CheckpointError, match=r"local directory; drop the revision 'main'"):
            Checkpoint.open(str(qwen), revision="main")

    def test_no_config(self, qwen: Path) -> None:
        (qwen / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no config.json; give the directory"):
            Checkpoint.open(str(qwen))

    def test_damaged_config(self, qwen: Path) -> None:
        (qwen / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"config.json: not readable as JSON"):
            Checkpoint.open(str(qwen))

    def test_only_pickles(self, qwen: Path) -> None:
        for file in qwen.glob("*.safetensors*"):
            file.unlink()
        (qwen / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(CheckpointError, match=r"no safetensors files \(others, such as .bin.*convert with"):
            Checkpoint.open(str(qwen))

    def test_missing_shard(self, qwen: Path) -> None:
        (qwen / "model-00002-of-00005.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"1 of 5 shards are missing, such as model-00002-of-00005"):
            Checkpoint.open(str(qwen))

    @pytest.mark.parametrize("left", [4, 200, -1])
    def test_truncated_shard(self, qwen: Path, left: int) -> None:
        shard = qwen / "model-00003-of-00005.safetensors"
        shard.write_bytes(shard.read_bytes()[:left])
        with pytest.raises(CheckpointError, match=r"model-00003-of-00005.safetensors: .*download it again"):
            Checkpoint.open(str(qwen))

    def test_index_that_lies(self, qwen: Path) -> None:
        file = qwen / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"]["model.ghost.weight"] = "model-00001-of-00005.safetensors"
        file.write_text(json.dumps(index))
        with pytest.raises(
            CheckpointError, match=r"names 1 tensors that their shards do not hold, such as model.ghost"
        ):
            Checkpoint.open(str(qwen))

    def test_index_that_leaves_the_directory(self, qwen: Path) -> None:
        (qwen / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
        with pytest.raises(CheckpointError, match=r"'../secret.safetensors' is not a file of this directory"):
            Checkpoint.open(str(qwen))

    def test_quantised_by_something_else(self, qwen: Path) -> None:
        edit_config(qwen, quantization_config={"quant_method": "gptq", "bits": 4})
        with pytest.raises(CheckpointError, match=r"already quantised by gptq; give the unquantised checkpoint"):
            Checkpoint.open(str(qwen))

    def test_packed_by_a_newer_version(self, qwen: Path) -> None:
        edit_config(qwen, quantization_config={"quant_method": "moefold", "version": 99, "layers": {}})
        with pytest.raises(CheckpointError, match=r"config.json: quantization_config.version is 99"):
            Checkpoint.open(str(qwen)).layer(0).experts()

    def test_an_expert_is_missing(self, qwen: Path) -> None:
        without(qwen, "model.layers.1.mlp.experts.3.up_proj.weight")
        with pytest.raises(
            CheckpointError, match=r"layers.1.mlp.experts.gate_up_proj wants experts 0 to 7, and expert 3"
        ):
            Checkpoint.open(str(qwen)).layer(1).experts()

    def test_config_of_another_model(self, qwen: Path) -> None:
        edit_config(qwen, moe_intermediate_size=48)
        with pytest.raises(CheckpointError, match=r"experts.0.gate_proj.weight is \[32, 64\] .* where \[48, 64\]"):
            Checkpoint.open(str(qwen)).layer(1).experts()

    def test_unknown_model_type(self, qwen: Path) -> None:
        edit_config(qwen, model_type="perceiver_of_experts", auto_map={"AutoConfig": "run_me.Config"})
        with pytest.raises(CheckpointError, match=r"perceiver_of_experts: no model can be made of it"):
            Checkpoint.open(str(qwen)).layers()

    def test_dense_model(self, tmp_path: Path) -> None:
        path = tiny("llama", tmp_path / "llama", intermediate_size=64)
        with pytest.raises(
            CheckpointError, match=r"LlamaForCausalLM has no routed experts; moefold reads the ForCausal"
        ):
            Checkpoint.open(str(path)).layers()

    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
            ("deepseek_v3", {"first_k_dense_replace": 3}),
            ("gemma4_text", {"enable_moe_block": False, "intermediate_size": 64, "num_kv_shared_layers": 0}),
            ("doge", {"is_moe": False, "intermediate_size": 64}),
        ],
    )
    def test_dense_model_of_a_family_that_may_have_experts(
        self, tmp_path: Path, kind: str, settings: dict[str, Any]
    ) -> None:
        path = tiny(kind, tmp_path / kind, **settings)
        with pytest.raises(CheckpointError, match=r"ForCausalLM has no routed experts: config.json makes each of its"):
            Checkpoint.open(str(path)).layers()

    def test_experts_in_a_form_of_their_own(self, tmp_path: Path) -> None:
        path = tiny(
            "llama4_text", tmp_path / "llama4", intermediate_size=32, intermediate_size_mlp=64, num_local_experts=4
        )
        with pytest.raises(CheckpointError, match=r"Llama4ForCausalLM keeps its routed experts in a form of its own"):
            Checkpoint.open(str(path)).layers()
