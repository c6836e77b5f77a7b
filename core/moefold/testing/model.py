"""Small random checkpoints to test on, made on the spot; nothing is downloaded."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from moefold import Checkpoint

BYTES = 256


def small_model(
    path: Path, *, experts: int = 4, top_k: int = 2, layers: int = 2, hidden: int = 64, inner: int = 32, seed: int = 0
) -> Checkpoint:
    """Write a Qwen3-MoE with random bf16 weights and a tokenizer of bytes (a few hundred KB) to `path`, and open it."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=BYTES + 3, hidden_size=hidden, intermediate_size=2 * inner, moe_intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=experts,
        num_experts_per_tok=top_k, norm_topk_prob=True, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=BYTES, eos_token_id=BYTES + 1, pad_token_id=BYTES + 2,
    )  # fmt: skip
    return random_checkpoint(config, path, seed)


def random_checkpoint(config: Any, path: Path, seed: int = 0) -> Checkpoint:
    """Write a model of any (small) transformers config with random bf16 weights, and a tokenizer of bytes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            spread = 1.0 if "embed" in name else 1.5 * tensor.shape[-1] ** -0.5
            tensor.copy_(_vector(name, noise) if tensor.dim() < 2 or "bias" in name else spread * noise)
    with redirect_stderr(StringIO()):  # a progress bar
        model.save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return Checkpoint.open(str(Path(path).absolute()))


def _vector(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Norms about 1; biases about 0."""
    return 0.1 * noise + (0.0 if "bias" in name or "sink" in name else 1.0)


def _tokenizer() -> Any:
    """Bytes 0..255 as tokens, then <bos>, <eos>, <pad>."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made: Any = Tokenizer(BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
