"""`check_family`: what moefold takes for granted of an architecture, tried on a small model of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefold.checkpoint import Checkpoint
from moefold.families import StreamedModel
from moefold.testing.failures import CheckError, failing, require
from moefold.testing.model import random_checkpoint
from moefold.testing.pipelines import run_pipeline
from moefold_kernels.grouped import fit

SAMPLES, LENGTH = 3, 17
TOLERANCE = 0.02
"""Of the experts' output in bf16, ||difference|| / ||output||: rounding alone gives some thousandths."""

_MERGED = """\
model: {model}
stages:
  - uses: group.random
  - uses: average
  - {{uses: save, with: {{to: {to}}}}}
"""


def check_family(model: Any) -> None:
    """Raise CheckError for what moefold would get wrong on an architecture; run this first on a new one.

    `model` is a transformers config of a few small layers, of which a random model is made, or a Checkpoint that fits
    into memory twice. Checked: routed experts are found, with the shapes that they should have; the experts' own
    mathematics give what the module gives; running layer by layer, and what is captured at the experts, is bit-equal to
    the whole stock model; experts taken out and put back change nothing; a checkpoint saved with merged experts runs in
    transformers as it does layer by layer.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        name = str(model.config.get("model_type", model.path) if isinstance(model, Checkpoint) else model.model_type)
        what = f"family {name}"
        with failing(what, "no checkpoint can be made of it" if not isinstance(model, Checkpoint) else "it is unread"):
            checkpoint = model if isinstance(model, Checkpoint) else random_checkpoint(model, root / "model")
        with failing(what, "moefold cannot read it"):
            require(bool(checkpoint.layers()), what, "it has no layer with routed experts")
            _shapes(checkpoint, what)
        _runs(checkpoint, what)
        with failing(what, "merged experts cannot be saved"):
            run_pipeline(_MERGED.format(model=checkpoint.path, to=root / "merged"), root)
        _runs(Checkpoint.open(str(root / "merged")), f"{what}, saved with merged experts")


def _shapes(checkpoint: Checkpoint, what: str) -> None:
    for layer in checkpoint.layers():
        experts = layer.experts()
        where = f"{what}, layer {layer.number}"
        count, hidden, inner = experts.down.shape
        rows = (2 if experts.gated else 1) * inner
        require(
            tuple(experts.gate_up.shape) == (count, rows, hidden),
            where,
            f"gate_up is {list(experts.gate_up.shape)} and down {list(experts.down.shape)}; [expert, {rows}, {hidden}] "
            "and [expert, hidden, inner] belong together",
        )
        require(
            count == layer.expert_count, where, f"{count} experts were read where the model has {layer.expert_count}"
        )
        finite = all(bool(weights.isfinite().all()) for weights in (experts.gate_up, experts.down))
        require(finite, where, "some expert weights are NaN or infinite")


@dataclass
class _Stock:
    """What passed through the fully loaded model: entering and leaving each decoder layer's experts, and leaving it."""

    experts_in: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    experts_out: dict[int, Tensor] = field(default_factory=dict)
    out: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    @contextmanager
    def listening(self, model: Any, checkpoint: Checkpoint) -> Iterator[None]:
        """Hooks on every decoder layer and its experts."""
        hooks = []
        for number, layer in enumerate(model.get_submodule(checkpoint.skeleton.layers)):
            hooks.append(layer.register_forward_hook(_keeper(self.out, number)))
        for number, path in checkpoint.skeleton.experts.items():
            module = model.get_submodule(path)
            hooks.append(module.register_forward_pre_hook(lambda _m, a, n=number: self.experts_in.__setitem__(n, a)))
            hooks.append(module.register_forward_hook(_keeper(self.experts_out, number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _keeper(into: dict[int, Tensor], number: int) -> Any:
    def keep(_: nn.Module, __: Any, out: Any) -> None:
        into[number] = out[0] if isinstance(out, tuple) else out

    return keep


@torch.no_grad()
def _runs(checkpoint: Checkpoint, what: str) -> None:
    """Layer by layer is what the whole is."""
    from transformers import AutoModelForCausalLM

    stock = _Stock()
    with failing(what, "transformers cannot run it"):
        with redirect_stderr(StringIO()):  # a progress bar
            whole: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto").eval()
            fit(whole)  # as layers by themselves are run
        words = min(whole.config.get_text_config().vocab_size, 256)
        ids = torch.randint(words, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
        with stock.listening(whole, checkpoint):
            stock.logits = whole(input_ids=ids, use_cache=False).logits
    with failing(what, "it does not run layer by layer"):
        model = StreamedModel(checkpoint)
        hidden = model.embed(ids)
        for number in range(model.layer_count):
            hidden = _layer(model, checkpoint, stock, number, ids, hidden, f"{what}, layer {number}")
        _equal(model.head(hidden), stock.logits, what, "the logits")


def _layer(
    model: StreamedModel, checkpoint: Checkpoint, stock: _Stock, number: int, ids: Tensor, hidden: Tensor, where: str
) -> Tensor:
    """One decoder layer, with its experts as they are and taken out and put back; what leaves it."""
    experts = None
    if number in model.expert_layers:
        with model.loaded(number, with_experts=False):
            entering = model.entering(number, ids, hidden)
        for found, expected, name in zip(
            entering, stock.experts_in[number], ("tokens", "top-k", "weights"), strict=True
        ):
            _equal(found, expected, where, f"what enters the experts ({name})")
        experts = next(one for one in checkpoint.layers() if one.number == number).experts()
        _mathematics(model, experts, number, entering, stock.experts_out[number], where)
    with model.loaded(number):
        after = model.through(number, ids, hidden)
    _equal(after, stock.out[number], where, "what leaves it, run alone")
    if experts is not None:
        with model.loaded(number, experts):
            _equal(
                model.through(number, ids, hidden),
                after,
                where,
                "what leaves it with its experts taken out and put back",
            )
    return after


def _mathematics(
    model: StreamedModel, experts: Any, number: int, entering: tuple[Tensor, ...], expected: Tensor, where: str
) -> None:
    """Each expert on its own tokens, added up by gate weight: differs where the flags lie about the layout."""
    tokens, index, weights = entering
    own = index if experts.route is None else experts.route[index]
    total = torch.zeros(tokens.shape, dtype=torch.float64)
    for expert in own.unique().tolist():
        rows, slots = torch.where(own == expert)
        out = model.activate(number, experts, expert, tokens[rows]).double() @ experts.down[expert].double().T
        if experts.down_bias is not None:
            out += experts.down_bias[expert].double()
        total.index_add_(0, rows, out * weights[rows, slots, None].double())
    found = float((total - expected.reshape(total.shape).double()).norm() / total.norm())
    require(
        found <= TOLERANCE,
        where,
        f"its experts' own gate, up and down give another output than the module (off by {found:.1%}); the flags "
        "is_concatenated, is_transposed, has_gate or has_bias, or _apply_gate, do not say what its forward does",
    )


def _equal(found: Tensor, expected: Tensor | None, where: str, name: str) -> None:
    if expected is None or found.shape != expected.shape or not torch.equal(found, expected):
        apart = "of another shape" if expected is None or found.shape != expected.shape else "other values"
        raise CheckError(
            f"{where}: {name} is not what the whole model has ({apart}); layers may keep state for each other, weights "
            "may be read into other places than transformers reads them, or something is left to chance"
        )
