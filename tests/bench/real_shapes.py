"""A few layers of a real model's shapes with random weights: what each stage takes there, in time and memory.

`python tests/bench/real_shapes.py DIR --layers 4 --device cuda` writes the checkpoint shard by shard (a layer each),
runs a shipped pipeline on it (`--pipeline`, default puzzlemoe) and prints seconds and peaks per stage as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import byte_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "norm_topk_prob": True,
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe",
        "hidden_size": 2048, "moe_intermediate_size": 1408, "intermediate_size": 5632, "num_experts": 60,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_attention_heads": 16,
        "num_key_value_heads": 16, "norm_topk_prob": False,
    },
}  # fmt: skip
COMMON = {
    "vocab_size": 4096, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip


def write(folder: Path, shapes_of: str, layers: int, device: str) -> None:
    """Write config, tokenizer and one shard per layer; no more than a layer is in memory."""
    config = AutoConfig.for_model(num_hidden_layers=layers, dtype="bfloat16", **SHAPES[shapes_of], **COMMON)
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    weight_map: dict[str, str] = {}
    for shard in [*(f"model.layers.{n}." for n in range(layers)), ""]:
        chosen = [n for n in shapes if (n.startswith(shard) if shard else not n.startswith("model.layers."))]
        tensors = {k: t for name in chosen for k, t in _tensors(name, shapes[name], device).items()}
        file = f"model-{shard.strip('.') or 'rest'}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _tensors(name: str, shape: tuple[int, ...], device: str) -> dict[str, torch.Tensor]:
    """A parameter's random values, under the names of the hub: experts one by one."""
    if name.endswith("norm.weight"):
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    values = (torch.randn(shape, device=device) * shape[-1] ** -0.5).bfloat16().cpu()
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: values}
    prefix = name.rpartition(".")[0]
    parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
    return {
        f"{prefix}.{e}.{part}.weight": rows.contiguous()
        for e, expert in enumerate(values)
        for part, rows in zip(parts, expert.chunk(len(parts)), strict=True)
    }


def main() -> None:
    """Write, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--pipeline", default="puzzlemoe")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if not (args.folder / "model").exists():
        write(args.folder / "model", args.shapes, args.layers, args.device)
    cut = [
        "--set", f"calibration.samples={args.samples}", "--set", f"calibration.length={args.length}",
        "--set", "unseen.samples=4", "--set", "prose.samples=4",
    ]  # fmt: skip
    model = str(args.folder / "model")
    command = [sys.executable, "-m", "moefold", "run", args.pipeline, "--model", model, "--json"]
    place = ["--device", args.device, "--to", str(args.folder / "packed"), "--work", str(args.folder / "work")]
    done = subprocess.run([*command, *place, *cut], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    report = json.loads(done.stdout)
    saved = report["saved"]["save"]["all"]
    stages = {
        step: {k: round(v, 1) if k == "seconds" else v for k, v in took.items() if k in keys}
        for step, took in report["stages"].items()
        for keys in [("tasks", "seconds", "peak_bytes", "peak_device_bytes")]
    }
    print(
        json.dumps(
            {
                "shapes": args.shapes,
                "pipeline": args.pipeline,
                "layers": args.layers,
                "versions": report["versions"],
                **saved,
                "stages": stages,
            }
        )
    )


if __name__ == "__main__":
    main()
