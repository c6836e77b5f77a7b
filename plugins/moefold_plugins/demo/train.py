"""Train the demo model: `python -m moefold_plugins.demo.train --out DIR --extra site-packages/* --minutes 9`.

Three stages, all by default: `collect` writes tokens and tokenizer to the data folder, `fit` trains on a GPU (with
`--smoke` a toy on the CPU), `report` measures the model that stands in the output folder and writes its card.
"""

import argparse
import json
import math
import shutil
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moefold_plugins.demo import card, corpus, stdlib

VOCABULARY = 2048
REPEAT = 3  # The library itself, tests aside, is repeated in the stream: it is 4 % of the text and the model's domain.
SIZE = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}
SMOKE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
# Weight of the load-balancing loss, per layer. Large models use their experts unevenly, and pairing by usage lives on
# that: at 0.01 the busiest experts saw 2 to 5 times what the rarest saw; at this 3 to 100 times, and none is dead.
BALANCE = 0.0001
WEIGHT_DECAY = 0.1
WARM_UP = 0.02  # Share of the time.


def config(smoke: bool) -> Qwen3MoeConfig:
    """Return the configuration; the smoke size differs in width alone."""
    shape: dict[str, Any] = {**SIZE, **EXPERTS} | ({**SMOKE, "moe_intermediate_size": 16} if smoke else {})
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        intermediate_size=4 * shape["moe_intermediate_size"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        router_aux_loss_coef=BALANCE,
        eos_token_id=0,
        pad_token_id=0,
        **shape,
    )


def dense_experts(experts: Any, x: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Run every expert on every token and weigh by the routing: for tiny experts two wide products, no dispatch."""
    weights = x.new_zeros(len(x), experts.num_experts, dtype=scores.dtype).scatter(1, chosen, scores)
    both = F.linear(x, experts.gate_up_proj.flatten(0, 1))
    gate, up = both.view(len(x), experts.num_experts, 2, experts.intermediate_dim).unbind(2)
    hidden = (F.silu(gate) * up * weights[..., None]).flatten(1)  # [token, expert * inner]
    return F.linear(hidden, experts.down_proj.permute(1, 0, 2).flatten(1))


def balance(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return one layer's load-balancing loss (Switch Transformers, arXiv 2101.03961, equation 4): 1 when even."""
    share = torch.zeros_like(logits).scatter(1, chosen, 1.0).float().mean(0) / chosen.shape[1]
    return logits.shape[1] * (share * logits.float().softmax(-1).mean(0)).sum()


def losses(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean cross-entropy in nats and the mean balance loss of [sequence, position + 1] tokens."""
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    x = model.model.embed_tokens(ids)
    positions = model.model.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
    uneven = []
    for layer in model.model.layers:
        x = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=positions, attention_mask=None)[0]
        rows = layer.post_attention_layernorm(x).flatten(0, 1)
        logits, scores, chosen = layer.mlp.gate(rows)
        x = x + dense_experts(layer.mlp.experts, rows, scores, chosen).view_as(x)
        uneven.append(balance(logits, chosen))
    predicted = model.lm_head(model.model.norm(x)).flatten(0, 1)
    return F.cross_entropy(predicted.float(), targets.flatten()), torch.stack(uneven).mean()


def batches(stream: torch.Tensor, size: int, length: int) -> Iterator[torch.Tensor]:
    """Yield [size, length + 1] windows at random places of the token stream, without end."""
    offsets = torch.arange(length + 1, device=stream.device)
    while True:
        starts = torch.randint(len(stream) - length - 1, (size, 1), device=stream.device)
        yield stream[starts + offsets].long()


def optimizer(model: torch.nn.Module, rate: float) -> torch.optim.AdamW:
    """Return AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def schedule(done: float) -> float:
    """Return the factor on the learning rate when a share of the time is done: up, then down in a line to zero."""
    return max(min(done / WARM_UP, (1 - done) / (1 - WARM_UP)), 0.0)


def save(model: Any, folder: Path) -> None:
    """Write the model as bf16 safetensors with its configurations."""
    copy: Any = Qwen3MoeForCausalLM(model.config)
    copy.to(torch.bfloat16).load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.95, eos_token_id=0, pad_token_id=0
    )
    copy.save_pretrained(folder)


def fit(data: Path, out: Path, minutes: float, rate: float, smoke: bool) -> dict[str, Any]:
    """Train until the time is up, saving now and then, and return the facts for the card."""
    begin = time.monotonic()
    device, size, length = ("cpu", 2, 256) if smoke else ("cuda", 32, 2048)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model: Any = Qwen3MoeForCausalLM._from_config(config(smoke), attn_implementation="sdpa", dtype=torch.float32)
    model.to(device)
    stream, unseen = (load_file(data / f"{name}.safetensors")["tokens"].to(device) for name in ("train", "calibrate"))
    step_losses = losses if smoke else torch.compile(losses, fullgraph=True, dynamic=False)
    adam, feed, probe = optimizer(model, rate), batches(stream, size, length), next(batches(unseen, size, length))
    history: list[dict[str, float]] = []
    start = saved = time.monotonic()
    step, done, end = 0, 0.0, begin + minutes * 60
    while done < 1:
        for group in adam.param_groups:
            group["lr"] = rate * schedule(done)
        with torch.autocast(device, torch.bfloat16, enabled=not smoke):
            loss, uneven = step_losses(model, next(feed))
        (loss + BALANCE * uneven).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            loss.item()
            start = time.monotonic()  # Compilation takes no share of the schedule.
        if step % 10 == 0:  # The clock sets the rate, so that the schedule ends in time on any machine.
            loss.item()
            done = (time.monotonic() - start) / (end - start)
        if step % (20 if smoke else 500) == 0 or done >= 1:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=not smoke):
                held, _ = losses(model, probe)
            history.append({"step": step, "train": loss.item(), "calibrate": held.item(), "balance": uneven.item()})
            print(f"{time.monotonic() - begin:6.1f} s {done:6.1%} {history[-1]}", flush=True)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower --rate")
        if time.monotonic() - saved > 60:
            save(model, out)
            saved = time.monotonic()
    save(model, out)
    return {
        "steps": step,
        "tokens_per_step": size * length,
        "sequence": length,
        "rate": rate,
        "seconds": round(time.monotonic() - start),
        "stream_tokens": len(stream),
        "history": history,
        **card.machine(device),
    }


def collect(data: Path, libraries: list[Path], folders: list[Path]) -> None:
    """Write the training and calibration tokens, the tokenizer and the counts to the data folder."""
    library, others, counts = corpus.collect(libraries, folders)
    plain = [document for document in library if stdlib.TESTS.isdisjoint(document[0].split("."))]
    tokenizer = corpus.train_tokenizer(plain, VOCABULARY)
    tokenizer.save_pretrained(data / "tokenizer")
    stream = corpus.encode(tokenizer, library + others + plain * (REPEAT - 1))
    save_file({"tokens": stream}, data / "train.safetensors")
    held = corpus.encode(tokenizer, stdlib.modules("calibrate"))
    save_file({"tokens": held}, data / "calibrate.safetensors")
    sizes = {
        name: sum(len(text.encode()) for _, text in documents)
        for name, documents in (("library", plain), ("library_with_tests", library), ("packages", others))
    }
    by_package = Counter[str]()
    for name, text in others:
        by_package[name.split("/")[0]] += len(text)
    facts = {
        "counts": counts,
        "bytes": sizes,
        "largest": [name for name, _ in by_package.most_common(6)],
        "libraries": [folder.name for folder in libraries],
        "tokens": len(stream),
    }
    (data / "text.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1))


def rename(file: Path, old: str, new: str) -> None:
    """Spell a name in a configuration as published checkpoints do: transformers 4 does not know what 5 writes."""
    file.write_text(file.read_text().replace(old, new))


def report(data: Path, out: Path, note: str) -> None:
    """Measure the model in the output folder, loaded as any user would, and write its card."""
    shutil.copytree(data / "tokenizer", out, dirs_exist_ok=True)
    rename(out / "config.json", '"num_local_experts"', '"num_experts"')
    rename(out / "tokenizer_config.json", '"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    # The plain loop over experts: on a CPU it takes half the time of the default, grouped_mm.
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, experts_implementation="eager")
    facts = {name: json.loads((data / f"{name}.json").read_text()) for name in ("text", "training")}
    facts["setting"] = {"repeat": REPEAT, "decay": WEIGHT_DECAY, "note": note}
    text = card.write(model, AutoTokenizer.from_pretrained(out), facts)
    (out / "README.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Run the stages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--data", type=Path, default=Path("demo-data"), help="folder for tokens, tokenizer and facts")
    parser.add_argument(
        "--library", dest="libraries", type=Path, action="append", help="standard library folders, newest first"
    )
    parser.add_argument("--extra", type=Path, nargs="*", default=[], help="package folders to train on as well")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for the stage fit")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--note", default="", help="a sentence for the card on how this run was made")
    parser.add_argument("--smoke", action="store_true", help="a toy size, on the CPU")
    parser.add_argument(
        "--stages", nargs="+", default=["collect", "fit", "report"], choices=["collect", "fit", "report"]
    )
    args = parser.parse_args()
    for folder in (args.data, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    if "collect" in args.stages:
        collect(args.data, args.libraries or [Path(sysconfig.get_path("stdlib"))], args.extra)
    if "fit" in args.stages:
        training = fit(args.data, args.out, args.minutes, args.rate, args.smoke)
        (args.data / "training.json").write_text(json.dumps(training, indent=1))
    if "report" in args.stages:
        report(args.data, args.out, args.note)


if __name__ == "__main__":
    main()
