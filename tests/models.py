"""Small random checkpoints of five families, as the hub has them: sharded safetensors, bf16, a byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_COMMON: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    "tie_word_embeddings": False,
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 96, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 48, "sliding_window": None},
    "olmoe": {"num_experts": 8, "intermediate_size": 32},
    "deepseek_v3": {
        "n_routed_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 96, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    },
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 32, "sliding_window": 8, "num_hidden_layers": 4,
                "max_position_embeddings": 131072},
}  # fmt: skip


def tiny(architecture: str, path: Path, *, seed: int = 0, shard_size: str = "120KB", **overrides: Any) -> Path:
    """Save a small random model and return `path`; `overrides` are keys of its config.

    Weights are scaled so that every expert is used, layers change what passes through them, and the router is not
    decided by rounding.
    """
    top_k = {"num_experts_per_tok": 2} if architecture in ARCHITECTURES else {}
    settings = _COMMON | top_k | ARCHITECTURES.get(architecture, {}) | overrides
    config = AutoConfig.for_model(architecture, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    _widen(model)
    randomise(model, seed)
    model.save_pretrained(path, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(path)
    return path


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill parameters and persistent buffers from one generator."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(_values(name, tensor, generator))


def _widen(model: torch.nn.Module) -> None:
    """DeepSeek's correction biases are float32 on the hub."""
    for module in model.modules():
        if isinstance(getattr(module, "e_score_correction_bias", None), Tensor):
            module.e_score_correction_bias = module.e_score_correction_bias.float()


def _values(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if tensor.dim() < 2 or "bias" in name:  # biases, sinks, correction biases
        return 0.1 * noise
    fan_in = tensor.shape[-1]
    return noise * (1.0 if "embed" in name else 1.5 * fan_in**-0.5)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes 0..255 as tokens, then <bos>, <eos>, <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def samples(count: int, length: int, *, seed: int = 1, vocabulary: int = 256) -> Tensor:
    """Random token ids, `[count, length]` int64."""
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
