"""What the demo model reaches on text that it has not seen, and the model card that says so."""

import lzma
import math
import platform
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from moefold_plugins.demo import stdlib
from moefold_plugins.demo.corpus import COPIED, END

WINDOW = 2048


def windows(tokenizer: Any, documents: Iterable[tuple[str, str]]) -> Iterator[torch.Tensor]:
    """Yield token windows of each document in turn, overlapping by the one token that starts the next."""
    for _, text in documents:
        ids = [tokenizer.convert_tokens_to_ids(END), *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for start in range(0, len(ids) - 1, WINDOW):
            yield torch.tensor(ids[start : start + WINDOW + 1])[None]


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, documents: list[tuple[str, str]]) -> tuple[float, list[list[float]]]:
    """Return bits per byte, and each expert's share of the routed tokens in each layer: 1 / experts when even.

    Every document is read alone, in windows of 2,048 tokens that do not overlap.
    """
    model.eval()
    nats = 0.0
    used = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for window in windows(tokenizer, documents):
        output = model(window[:, :-1], output_router_logits=True, use_cache=False)
        nats += F.cross_entropy(output.logits[0].float(), window[0, 1:], reduction="sum").item()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok).indices
            used[layer] += chosen.flatten().bincount(minlength=model.config.num_experts)
    size = sum(len(text.encode()) for _, text in documents)
    return nats / math.log(2) / size, (used / used.sum(1, keepdim=True)).tolist()


def xz(documents: list[tuple[str, str]]) -> float:
    """Return the bits per byte of `xz -9` on the documents, joined: one stream sees them all."""
    text = "".join(text for _, text in documents).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def rows(*columns: list[str]) -> str:
    """Return the rows of a Markdown table, given its columns."""
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def least_and_most(shares: list[list[float]]) -> tuple[list[str], list[str]]:
    """Return each layer's smallest and largest share, written out."""
    return [f"{min(layer):.1%}" for layer in shares], [f"{max(layer):.1%}" for layer in shares]


def write(model: Any, tokenizer: Any, facts: dict[str, Any]) -> str:
    """Measure the model and return its card."""
    code, prose = stdlib.modules("evaluate"), stdlib.prose()
    (bits, shares), (prose_bits, prose_shares) = (measure(model, tokenizer, text) for text in (code, prose))
    training, text, size = facts["training"], facts["text"], model.config
    seen = training["tokens_per_step"] * training["steps"]
    reasons = list(text["counts"]["packages"])
    counts = [[f"{text['counts'][kind].get(reason, 0):,}" for reason in reasons] for kind in ("library", "packages")]
    layers = [str(layer) for layer in range(size.num_hidden_layers)]
    return TEMPLATE.format(
        million=sum(p.numel() for p in model.parameters()) / 1e6,
        size=size,
        even=1 / size.num_experts,
        modules=len(code),
        megabytes=sum(len(text.encode()) for _, text in code) / 1e6,
        bits=bits,
        prose_bits=prose_bits,
        xz=xz(code),
        prose_xz=xz(prose),
        uses=rows(layers, *least_and_most(shares), *least_and_most(prose_shares)),
        text=text,
        tests=(text["bytes"]["library_with_tests"] - text["bytes"]["library"]) / 1e6,
        mb={name: count / 1e6 for name, count in text["bytes"].items()},
        libraries=" to ".join((text["libraries"][-1], text["libraries"][0])),
        largest=", ".join(text["largest"]),
        drops=rows(reasons, *counts),
        copied=COPIED,
        run=training,
        seen=seen / 1e6,
        passes=seen / training["stream_tokens"],
        minutes=training["seconds"] / 60,
        end=training["history"][-1],
        versions=", ".join(f"{name} {version}" for name, version in training["versions"].items()),
        setting=facts["setting"],
    )


def machine(device: str) -> dict[str, Any]:
    """Return what the run ran on."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": {"python": platform.python_version(), **versions},
    }


TEMPLATE = """\
---
license: apache-2.0
language:
- code
library_name: transformers
pipeline_tag: text-generation
tags:
- qwen3_moe
- mixture-of-experts
- python
---

# moefold demo: a small Mixture-of-Experts model of Python source

{million:.2f} million parameters, {size.num_hidden_layers} layers, {size.num_experts} experts per layer
of which each token uses {size.num_experts_per_tok}, trained from random weights on Python code.
It exists so that merging experts can be tried, tested and measured offline, on weights that were trained rather than
drawn. The architecture is Qwen3-MoE as transformers has it: hidden size {size.hidden_size},
expert size {size.moe_intermediate_size}, {size.num_attention_heads} query and {size.num_key_value_heads} key-value
heads of {size.head_dim}, tied embeddings, byte-level BPE with {size.vocab_size:,} tokens, bf16.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefold_plugins.demo import PATH

tokenizer = AutoTokenizer.from_pretrained(PATH)
model = AutoModelForCausalLM.from_pretrained(PATH)
inputs = tokenizer("def read_lines(path):\\n    ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))
```

## What it reaches

Bits per byte on text that was in no training step; every document alone, windows of 2,048 tokens without overlap.

| text | model | `xz -9` |
|---|---|---|
| `evaluate` modules of the standard library ({modules} modules, {megabytes:.2f} MB) | {bits:.3f} | {xz:.3f} |
| English: `pydoc_data.topics` | {prose_bits:.3f} | {prose_xz:.3f} |

Share of the routed tokens that the least and the most used expert of a layer gets (even: {even:.2%}):

| layer | code, least | code, most | English, least | English, most |
|---|---|---|---|---|
{uses}

## Data

- *Split.* By the sha256 of a module's dotted name, so that a module stays unseen in every Python version: see
  `moefold_plugins/demo/stdlib.py`. About a tenth of the eligible modules each are `calibrate` and `evaluate`; neither
  was trained on, and training watched the loss on `calibrate` without acting on it. `pydoc_data.topics` is in no part.
- *Training text.* The `train` modules of {libraries}:
  {mb[library]:.1f} MB without tests, repeated {setting[repeat]} times, and {tests:.1f} MB of tests;
  {mb[packages]:.0f} MB of other packages' code, most of it from
  {largest}.
  Together {text[tokens]:,} tokens, repetitions included.
- *No leak.* A file was dropped if over {copied:.0%} of its long lines stand in a held-out module or topic of any of
  these versions, or if it holds over {copied:.0%} of one's; so were folders of vendored code and known
  copies, by name.

| files | standard library | other packages |
|---|---|---|
{drops}

## Training

{run[steps]:,} steps of {run[tokens_per_step]:,} tokens (sequences of {run[sequence]:,}): {seen:,.0f} million tokens,
{passes:.1f} passes over the stream, in {minutes:.1f} minutes on one {run[device]}
({versions}).
AdamW, peak learning rate {run[rate]}, weight decay {setting[decay]}, warm-up, then a line down to zero;
load-balancing loss per layer with weight {size.router_aux_loss_coef}, small so that experts are used unevenly, as in
large models; bf16 autocast over float32 weights. {setting[note]}
Loss at the end, nats per token: {end[train]:.3f} on the last batch, {end[calibrate]:.3f} on a probe of `calibrate`.
The schedule follows the clock, so a second run gives a like model, not the same one.

    python -m moefold_plugins.demo.train --out DIR --library LIB --library LIB --extra site-packages/* --minutes 9

## Licence and limits

Weights, tokenizer and this card: Apache-2.0, as the project. The training text is the work of its authors under their
own licences (PSF, BSD, MIT, Apache-2.0 and others) and is not part of this folder.

It writes code that looks like Python and seldom is a program. It knows no language but Python, little English, and
answers no questions. A module that a newer Python than {text[libraries][0]} adds or renames may be in part known to it.
Effects of compression are larger here than on large models: it shows whether a method works and how methods compare,
not what a large model would lose.
"""
