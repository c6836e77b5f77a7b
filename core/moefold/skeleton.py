"""The model without weights, of which a part at a time becomes real.

Leans on functions of transformers that are importable but not promised (`initialization`, dtype plans; read at 5.17
and 5.23); so do sources.py and meta.py, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import build_glob_alternation

from moefold import fused
from moefold.artifacts import Experts
from moefold.checkpoint import Checkpoint
from moefold.errors import CheckpointError
from moefold.meta import SUPPORTED, dtype_of, on_meta, tensors_of
from moefold.narrow import Narrow, routers
from moefold.sources import Device, Sources
from moefold_kernels import PackedLayer, read_layer
from moefold_kernels.errors import FormatError as KernelFormatError
from moefold_kernels.routed import resize

Wanted = Callable[[str], bool]


class Skeleton:
    """A model on `meta`; parts of it become real with `fill` and go back with `clear`.

    `dtype` None: the checkpoint's. Raises CheckpointError for a model without experts that moefold can find.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype | None = None, sources: Sources | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype or dtype_of(checkpoint)
        self.model = on_meta(checkpoint, self.dtype)
        self.name = type(self.model).__name__
        self.experts, self.layers = self._find_experts()
        """Decoder layer -> path of its experts module; the path of the list of decoder layers."""
        self._fit_routes()
        self.blank = dict(tensors_of(self.model))
        """What stands where nothing is real: every parameter and buffer on `meta`."""
        # Another skeleton's serve this one too: which tensor fills what is the same, and 45,000 names take 1.6 s.
        self.sources = sources or Sources(checkpoint, self.model)
        self._narrow: dict[int, Narrow] = {}
        self.parts: dict[str, tuple[int, Tensor]] = {}
        """Parameters of which only an index along an axis is wanted, as in a pruned layer."""
        self._plan: dict[str, torch.dtype] = self.model._get_dtype_plan(self.dtype)

    @property
    def where(self) -> str:
        """Which model this is, for messages."""
        return f"{self.checkpoint.path}: {type(self.model).__name__}"

    def module(self, path: str) -> Any:
        """A submodule by its path."""
        return self.model.get_submodule(path)

    def expert_count(self, number: int) -> int:
        """How many routed experts a decoder layer has."""
        module = self.module(self.experts[number])
        return int(getattr(module, fused.parameters(module)[1]).shape[0])

    def read_experts(self, number: int, device: Device = "cpu") -> Experts:
        """One layer's routed experts, canonical, in the dtype of the files; packed ones decoded."""
        path = self.experts[number]
        module = self.module(path)
        packed = self.checkpoint.packed_layers.get(number)
        names = fused.parameters(module)
        stored = names if packed is None else names[2:]  # a packed layer keeps the source's biases
        own = {name: self.sources.read(f"{path}.{name}", device)[f"{path}.{name}"] for name in stored}
        if packed is None:
            return replace(fused.canonical(module, own), route=self._route(number, device))
        return fused.with_biases(module, self._decoded(number, packed, device), [own[name] for name in stored])

    def activate(self, number: int, experts: Experts, expert: int, tokens: Tensor) -> Tensor:
        """Hidden activations h_e(x), `[token, inner]`, of one expert through the module's own gate and biases."""
        return fused.activate(self.module(self.experts[number]), experts, expert, tokens)

    def slopes(self, number: int, experts: Experts, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """h_e(x), and its derivatives by the rows of `W x + b`: `[token, inner]` and `[token, rows]`, float32."""
        return fused.slopes(self.module(self.experts[number]), experts, expert, tokens)

    def narrow(self, count: int) -> Narrow:
        """The same model with `count` experts in every layer; raises InputError where its router cannot do with them.

        Raises CheckpointError for a model of which it cannot be told what follows the number of experts.
        """
        if count not in self._narrow:
            made = Narrow.of(self, count)
            made.check_choice(self)
            self._narrow[count] = made
        return self._narrow[count]

    def router(self, number: int, device: Device = "cpu") -> tuple[Tensor, Tensor | None]:
        """A layer's router in the dtype of the files: weight `[output, hidden]`, and the bias of its logits, if any."""
        names = [name for name in self._routers[number] if name is not None]
        weight, *bias = (self.sources.read(name, device)[name] for name in names)
        return weight, bias[0] if bias else None

    @cached_property
    def _routers(self) -> dict[int, tuple[str, str | None]]:
        return routers(self)

    def fill(self, device: Device, wanted: Wanted) -> None:
        """Make the `wanted` parameters and buffers real, in the dtypes that stock loading gives them.

        Raises CheckpointError when the checkpoint lacks one.
        """
        names = [name for name in self.blank if wanted(name)]
        for name in names:
            if not self._computed(name) and not self.is_real(name):
                for target, tensor in self.sources.read(name, device, self.target_dtype(name)).items():
                    axis, index = self.parts.get(target, (0, None))
                    self.place(target, tensor if index is None else tensor.index_select(axis, index.to(tensor.device)))
        self._compute(device, [name for name in names if self._computed(name)])

    def place(self, name: str, tensor: Tensor) -> None:
        """Put a tensor where the model has a parameter or buffer of this name."""
        module, local = self._owner(name)
        if local in module._parameters:
            parameter: Any = nn.Parameter(tensor, requires_grad=False)
            parameter._is_hf_initialized = True  # what `_init_weights` must leave alone
            module._parameters[local] = parameter
        else:
            module._buffers[local] = tensor

    def clear(self, wanted: Wanted) -> None:
        """Free what is real and `wanted`."""
        for name in filter(wanted, self.blank):
            module, local = self._owner(name)
            holder: dict[str, Any] = module._parameters if local in module._parameters else module._buffers
            holder[local] = self.blank[name]

    def is_real(self, name: str) -> bool:
        """Whether a parameter or buffer holds values now."""
        module, local = self._owner(name)
        return not getattr(module, local).is_meta

    def live_bytes(self) -> int:
        """Bytes of everything that is real now."""
        return sum(t.numel() * t.element_size() for _, t in tensors_of(self.model) if not t.is_meta)

    def target_dtype(self, name: str) -> torch.dtype:
        """The dtype in which stock loading keeps a parameter (some stay in float32)."""
        if self._plan:
            pattern, groups, _ = build_glob_alternation(list(self._plan))
            match = pattern.search(name)
            if match is not None and match.lastgroup is not None:
                return self._plan[groups[match.lastgroup]]
        return self.blank[name].dtype

    def _decoded(self, number: int, packed: PackedLayer, device: Device) -> Experts:
        """A packed layer's weights; one matrix at a time, so that no second copy of the layer exists."""
        gate_up, down, rows = None, None, 0
        try:
            with self.checkpoint.reading() as read:
                for matrix in packed.matrix:
                    one = read_layer(lambda key: read(key).to(device), packed, matrices=[matrix])[matrix]
                    if matrix == "down_proj":
                        down = one
                        continue
                    if gate_up is None:
                        gate_up = one.new_empty(one.shape[0], one.shape[1] * (1 + packed.gated), one.shape[2])
                    gate_up[:, rows : rows + one.shape[1]] = one
                    rows += one.shape[1]
        except KernelFormatError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {error}") from error
        if gate_up is None or down is None:
            raise CheckpointError(f"{self.checkpoint.path}: {packed.prefix} names no up_proj or down_proj")
        return Experts(gate_up, down, gated=packed.gated, route=self._route(number, device))

    def _route(self, number: int, device: Device) -> Tensor | None:
        entry = self.checkpoint.entries.get(number)
        route = None if entry is None else entry.route
        return None if route is None else torch.tensor(route, dtype=torch.int64, device=device)

    def _fit_routes(self) -> None:
        """Give the layers whose experts were merged as many as they have, which is fewer than config.json says."""
        for number, entry in self.checkpoint.entries.items():
            if number not in self.experts:
                raise CheckpointError(f"{self.where} has no experts in layer {number}, of which config.json says more")
            if entry.route is None:
                continue
            module, count = self.module(self.experts[number]), self.expert_count(number)
            if len(entry.route) != count:
                raise CheckpointError(
                    f"{self.checkpoint.path / 'config.json'}: quantization_config.layers.{number}.route has "
                    f"{len(entry.route)} entries, the router {count} outputs; they do not belong together"
                )
            resize(module, fused.parameters(module), entry.experts)

    def _find_experts(self) -> tuple[dict[int, str], str]:
        lists = [name for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)]
        experts: dict[int, str] = {}
        trunks: set[str] = set()
        for path, module in self.model.named_modules():
            if not fused.is_fused(module):
                continue
            trunk = min((name for name in lists if path.startswith(f"{name}.")), key=len, default="")
            number = path.removeprefix(f"{trunk}.").partition(".")[0]
            if not number.isdigit() or int(number) in experts:
                raise CheckpointError(f"{self.where} has experts outside its decoder layers, or two kinds ({path})")
            experts[int(number)] = path
            trunks.add(trunk)
        if not experts:
            raise CheckpointError(f"{self.where} {self._why_no_experts()}; {SUPPORTED}")
        if len(trunks) > 1:
            raise CheckpointError(f"{self.where} has experts in several towers ({', '.join(sorted(trunks))})")
        return dict(sorted(experts.items())), trunks.pop()

    def _why_no_experts(self) -> str:
        """By its modules: configurations of families that have both kinds speak of experts in dense models, too."""
        family = self.name.partition("For")[0]  # JetMoe, whose every module says so
        modules = self.model.named_modules()
        kinds = {f"{name.rpartition('.')[2]} {type(part).__name__.removeprefix(family)}" for name, part in modules}
        if any("expert" in kind.lower() or "moe" in kind.lower() for kind in kinds):
            return "keeps its routed experts in a form of its own, not in transformers' fused interface"
        if any("expert" in key or "moe" in key for key in self.model.config.to_dict()):
            return "has no routed experts: config.json makes each of its decoder layers a dense one"
        return "has no routed experts"

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, local = name.rpartition(".")
        return self.model.get_submodule(path), local

    def _computed(self, name: str) -> bool:
        """Whether the model computes it (rotary frequencies) instead of storing it."""
        module, local = self._owner(name)
        return local in module._non_persistent_buffers_set

    def _compute(self, device: Device, names: list[str]) -> None:
        """Fill buffers by the model's own initialisation; it leaves loaded parameters as they are."""
        for name in names:
            self.place(name, torch.empty_like(self.blank[name], device=device))
        with torch.no_grad(), init.guard_torch_init_functions():
            for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
                self._initialiser(path)._init_weights(self.module(path))

    def _initialiser(self, path: str) -> Any:
        """The nearest model around a module: composite models initialise each part by its own rules."""
        while not isinstance(self.module(path), PreTrainedModel):
            path = path.rpartition(".")[0]
        return self.module(path)
