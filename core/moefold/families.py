"""How to run one decoder layer of a model at a time, for every family with transformers' fused experts.

No table of models: the model's own forward runs with its embedding and its other decoder layers replaced by stand-ins,
so that masks, positions and mixed layer types stay the model's business. What that takes for granted (a decoder layer
gets hidden states from the layer before, and nothing else that depends on data) is probed when a model is made, and
a model that does otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from moefold import fused
from moefold.artifacts import Experts
from moefold.checkpoint import Checkpoint
from moefold.errors import CheckpointError
from moefold.pruned import kept, renumbered, standing_in
from moefold.standins import Forward, Stop, Unfit, bare, beside, compare, feed, hidden_of, replaced, rerouted, tupled
from moefold_kernels.grouped import say


class StreamedModel:
    """The model on `meta`, of which one decoder layer at a time is real."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """`dtype` None: the checkpoint's. Raises CheckpointError for a model that cannot run layer by layer."""
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        from moefold.skeleton import Skeleton  # transformers is slow to import, and most commands do not need it

        self._skeleton = Skeleton(checkpoint, dtype, checkpoint.skeleton.sources)
        self._model = self._skeleton.module("")  # Any: much of PreTrainedModel is untyped
        self._layers: Any = self._skeleton.module(self._skeleton.layers)  # pruned layers are put into it
        self._embedding = self._model.get_input_embeddings()
        self._ends = {
            "embed": self._names_in(self._embedding),
            "head": self._names_in(self._model.get_output_embeddings()),
        }
        self._open: dict[int, bool] = {}  # loaded decoder layer -> whether its experts are real too
        self.dtype = self._skeleton.dtype
        self.layer_count = len(self._layers)
        self.expert_layers = tuple(self._skeleton.experts)
        say(self._model)
        self.hidden_size = int(self._model.config.get_text_config().hidden_size)
        self._skeleton.fill(self.device, self._is_shell)
        self._reached = False  # whether the model's own forward came as far as to its decoder layers
        self._wrap = self._probe()

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[sample, length]` to what enters decoder layer 0, `[sample, length, hidden]`."""
        self._fill_end("embed")
        self._check_ids(ids)
        with self._stand_ins({0: Stop.at_entry}, embedding=None):
            hidden: Tensor = self._run(ids).arguments[0]
        return hidden

    @contextmanager
    def loaded(self, number: int, experts: Experts | None = None, *, with_experts: bool = True) -> Iterator[None]:
        """Decoder layer `number` is real inside.

        Its routed experts are `experts`, or the checkpoint's own; `with_experts=False` leaves them out.
        """
        if number in self._open:
            raise ValueError(f"decoder layer {number} is loaded already; leave that context first")
        own = self._expert_names(number)
        prefix = f"{self._skeleton.layers}.{number}."
        with ExitStack() as stack:
            stack.callback(self._open.pop, number, None)
            if experts is not None and (outputs := kept(experts)) is not None:
                stack.enter_context(standing_in(self._skeleton, number, outputs))
                experts = renumbered(experts)
            stack.callback(self._skeleton.clear, lambda name: name.startswith(prefix))
            direct = with_experts and experts is None and number not in self.checkpoint.entries
            self._skeleton.fill(self.device, lambda name: name.startswith(prefix) and (direct or name not in own))
            if with_experts and own and not direct:
                found = self.checkpoint.layer(number).experts(self.device) if experts is None else experts
                stack.enter_context(self._installed(number, found))
            self._open[number] = with_experts
            yield

    @torch.no_grad()
    def through(self, number: int, ids: Tensor, hidden: Tensor) -> Tensor:
        """What leaves loaded decoder layer `number` when `hidden` enters it; both `[sample, length, hidden]`."""
        self._require(number, experts=bool(self._expert_names(number)))
        with self._stand_ins({number: Stop.after(self._layers[number].forward, hidden)}):
            return self._run(ids).result(self._wrap)

    @torch.no_grad()
    def entering(self, number: int, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[token, hidden]`, top-k indices and weights `[token, top_k]` that enter the loaded layer's experts.

        Indices are the router's own, before any `route`. The forward stops there and needs no expert weights.
        """
        self._require(number, experts=False)
        module = self._experts_module(number)
        hook = module.register_forward_pre_hook(Stop.at_experts, prepend=True)
        try:
            with self._stand_ins({number: feed(self._layers[number].forward, hidden)}):
                tokens, index, weights = self._run(ids).arguments
        finally:
            hook.remove()
        return tokens, index, weights

    @torch.no_grad()
    def activate(self, number: int, experts: Experts, expert: int, tokens: Tensor) -> Tensor:
        """Hidden activations h_e(x), `[token, inner]`, of one expert through the family's own gate and biases."""
        return fused.activate(self._experts_module(number), experts, expert, tokens)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[sample, length, vocabulary]` of what leaves the last decoder layer."""
        self._fill_end("head")
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        with self._stand_ins({self.layer_count - 1: lambda *_, **__: self._wrap(hidden)}):
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

    def forget(self) -> None:
        """Free the embedding and the head; they are read again when they are needed."""
        for names in self._ends.values():
            self._skeleton.clear(names.__contains__)

    def live_bytes(self) -> int:
        """Bytes of parameters and buffers that are real now."""
        return self._skeleton.live_bytes()

    # -- which part of the model is which

    def _is_shell(self, name: str) -> bool:
        """Whether a parameter is outside decoder layers, embedding and head: final norm, rotary buffers."""
        return not name.startswith(f"{self._skeleton.layers}.") and not any(name in end for end in self._ends.values())

    def _names_in(self, part: Any) -> set[str]:
        """Full names of a module's parameters; none when the model has no such part (they then count as shell)."""
        paths = [path for path, module in self._model.named_modules() if module is part]
        return {f"{path}.{name}" for path in paths for name, _ in part.named_parameters()}

    def _check_ids(self, ids: Tensor) -> None:
        """On a GPU an id too large would end the process's use of the device, with a message that names nothing."""
        rows, largest = len(self._embedding.weight), int(ids.max()) if ids.numel() else 0
        if largest >= rows:
            raise CheckpointError(
                f"{self.checkpoint.path}: its tokenizer gives token {largest}, and its embedding has {rows}; put the "
                "model's own tokenizer.json and tokenizer_config.json beside the weights"
            )

    def _fill_end(self, end: str) -> None:
        self._skeleton.fill(self.device, self._ends[end].__contains__)

    def _expert_names(self, number: int) -> set[str]:
        """Full names of a layer's expert weights and biases; none when it has no routed experts."""
        if number not in self._skeleton.experts:
            return set()
        path = self._skeleton.experts[number]
        return {f"{path}.{name}" for name in fused.parameters(self._skeleton.module(path))}

    def _experts_module(self, number: int) -> Any:
        if number not in self._skeleton.experts:
            known = ", ".join(map(str, self.expert_layers))
            raise CheckpointError(f"decoder layer {number} has no routed experts; those that do: {known}")
        return self._skeleton.module(self._skeleton.experts[number])

    def _require(self, number: int, *, experts: bool) -> None:
        if number not in self._open:
            raise ValueError(f"decoder layer {number} is not loaded; write `with model.loaded({number}):` around it")
        if experts and not self._open[number]:
            raise ValueError(f"decoder layer {number} is loaded without its experts; drop with_experts=False")

    # -- experts that are not the checkpoint's own

    @contextmanager
    def _installed(self, number: int, experts: Experts) -> Iterator[None]:
        """A layer's experts module with these experts, their number, and their `route`."""
        path, module = self._skeleton.experts[number], self._experts_module(number)
        for name, tensor in fused.in_own_layout(module, experts).items():
            full = f"{path}.{name}"
            self._skeleton.place(full, tensor.to(device=self.device, dtype=self._skeleton.target_dtype(full)))
        stock, module.num_experts = module.num_experts, experts.count  # every stock implementation counts by it
        hook = None if experts.route is None else module.register_forward_pre_hook(rerouted(experts.route))
        try:
            yield
        finally:
            module.num_experts = stock
            if hook is not None:
                hook.remove()

    # -- running the model's own forward around one layer

    def _run(self, ids: Tensor) -> Stop:
        """Run the model until a stand-in stops it."""
        try:
            with torch.no_grad():
                self._model(input_ids=ids.to(self.device, torch.int64), use_cache=False)
        except Stop as stop:
            stop.__traceback__ = None  # its frames hold activations
            return stop
        raise CheckpointError(f"{self._skeleton.name} did not reach the layer; moefold cannot run it layer by layer")

    @contextmanager
    def _stand_ins(self, special: dict[int, Forward], *, embedding: float | None = 0.0) -> Iterator[None]:
        """Decoder layers pass on what they get, but for `special`; the embedding gives a constant (None: itself)."""
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                stand_in = special.get(number, lambda *args, **kwargs: self._wrap(hidden_of(args, kwargs)))
                stack.enter_context(replaced(layer, stand_in))
            if embedding is not None:
                stack.enter_context(replaced(self._embedding, self._constant(embedding)))
            yield

    def _constant(self, value: float) -> Forward:
        width = self._embedding.weight.shape[1]
        return lambda ids: torch.full((*ids.shape, width), value, dtype=self.dtype, device=self.device)

    def _probe(self) -> Callable[[Tensor], Any]:
        """How decoder layers return hidden states, found by running the model with stand-ins only.

        Twice, with other values: whatever a layer gets beside hidden states must not depend on them.
        """
        problems: list[Exception] = []
        for wrap in (bare, tupled):
            try:
                first, second = (self._trace(wrap, value) for value in (0.0, 1.0))
                for one, other in zip(first, second, strict=True):
                    compare(one, other)
            except (Unfit, TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
                problems.append(error)
            else:
                return wrap
        why = next((problem for problem in problems if isinstance(problem, Unfit)), problems[-1])
        if not self._reached:
            raise CheckpointError(
                f"{self.checkpoint.path}: {self._skeleton.name} fails before its first decoder layer ({why}); check "
                "config.json"
            )
        raise CheckpointError(
            f"{self.checkpoint.path}: {self._skeleton.name} passes more than hidden states from one decoder layer to "
            f"the next, so moefold cannot run it layer by layer ({why})"
        )

    def _trace(self, wrap: Callable[[Tensor], Any], value: float) -> list[dict[str, Any]]:
        """What each decoder layer gets beside hidden states; each must get exactly what the one before gave."""
        given: list[Tensor] = []
        given_beside: list[dict[str, Any]] = []

        def stand_in(number: int) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                self._reached = True
                hidden = hidden_of(args, kwargs)
                if number != len(given) or (given and hidden is not given[-1]):
                    raise Unfit(f"decoder layer {number} does not get what layer {number - 1} gave")
                given_beside.append(beside(args, kwargs))
                if number == self.layer_count - 1:
                    raise Stop((hidden,))
                given.append(torch.full_like(hidden, value))
                return wrap(given[-1])

            return forward

        ids = torch.arange(12, device=self.device).view(3, 4) % 3  # three samples: unpacking them as a pair must fail
        with self._stand_ins({n: stand_in(n) for n in range(self.layer_count)}, embedding=value):
            self._run(ids)
        return given_beside
