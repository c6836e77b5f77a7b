"""Lets stock transformers load packed and merged checkpoints: importing this module registers the quantization method.

    import moefold_kernels.transformers
    model = AutoModelForCausalLM.from_pretrained(directory)

Packed experts are run by the implementation `moefold` (implementation.py) unless `experts_implementation` names another
one; a checkpoint whose experts are merged and not packed has transformers' own default.
It rests on functions that transformers does not promise (5.17 to 5.23 read and tried); they are used here only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moefold_kernels import implementation
from moefold_kernels.checkpoint import METHOD, VERSION, LayerEntry, PackedLayer, read_config
from moefold_kernels.conversion import Place, converters
from moefold_kernels.errors import FormatError
from moefold_kernels.finding import check_tensors, find, headers, renamed, wanted_dtypes
from moefold_kernels.grouped import fit, say
from moefold_kernels.module import ENDS, PackedModule, is_experts, pack_module, unpack_module
from moefold_kernels.quantized import MATRICES, MatrixReader
from moefold_kernels.routed import MergedModule, RoutedModule, merge_module, unmerge_module


class MoefoldConfig(QuantizationConfigMixin):
    """config.json's entry; `MoefoldConfig(dequantize=True)`, given to from_pretrained, asks for a stock dense model."""

    def __init__(
        self,
        quant_method: str = METHOD,
        version: int = VERSION,
        layers: Mapping[str, Any] | None = None,
        dequantize: bool = False,
        matrices: Mapping[str, Any] | None = None,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # an enum of transformers' own methods there
        self.version = version
        self.layers = dict(layers or {})
        self.dequantize = dequantize
        self.matrices = matrices

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read and check the entry; FormatError names the place in it."""
        read_config({key: value for key, value in config_dict.items() if key != "dequantize"})
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        """The entry as it was read."""
        entry = {"quant_method": self.quant_method, "version": self.version, "layers": self.layers}
        return entry if self.matrices is None else entry | {MATRICES: self.matrices}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a caller may choose about a checkpoint whose entry says the rest."""
        return {"dequantize": self.dequantize}

    def entries(self) -> dict[int, LayerEntry]:
        """The packed and merged decoder layers by number."""
        return read_config(self.to_dict())

    @property
    def packs(self) -> bool:
        """Whether any layer is packed, rather than merged only."""
        return any(isinstance(entry, PackedLayer) for entry in self.entries().values())


class MoefoldQuantizer(HfQuantizer):
    """Puts packed and merged experts modules into a model before its weights are read; checks that all of them came."""

    requires_calibration = True  # it loads what moefold packed; it packs nothing
    quantization_config: MoefoldConfig

    def __init__(self, quantization_config: MoefoldConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.places: list[Place] = []
        self.dtypes: dict[str, torch.dtype] = {}
        stored = quantization_config.matrices
        self.reader = None if stored is None else MatrixReader(stored)
        self.dtype: torch.dtype | None = None
        self.named = True
        """Whether the user named an experts implementation; update_attn_implementation finds out."""

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Keep the dtype that was asked for, which transformers does not pass on to what follows."""
        self.dtype = dtype
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _refuse_expert_parallelism(model)
        found, entries = headers(kwargs.get("checkpoint_files")), self.quantization_config.entries().values()
        wires = [] if self.reader is None or found is None else [name for name, shape in found.items() if 0 in shape]
        found = None if found is None else renamed(model, found, entries)
        tripwires: set[str] = set()
        for entry in entries:
            place = find(model, entry.prefix)
            module = model.get_submodule(place.module)
            if found is not None:
                check_tensors(entry, module, {name: shape for name, shape in found.items() if name not in wires})
            if isinstance(entry, PackedLayer):
                self.places.append(Place(entry, *place))
                pack_module(module, entry, place.module)
            else:
                merge_module(module, entry, place.module)
                own = [name.removeprefix(entry.prefix) for name in wires if name.startswith(f"{entry.prefix}.")]
                tripwires |= {prefix + name for prefix in (*place, entry.prefix) for name in own}
        if self.places:
            self._provide_fallbacks(model)
        tripwires |= {name for place in self.places for name in place.tripwires()}
        ignored = [f"{re.escape(name)}$" for name in tripwires]
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        self.dtypes = wanted_dtypes(model, self.dtype)
        return model

    def _process_model_after_weight_loading(
        self,
        model: PreTrainedModel,
        **kwargs: Any,  # noqa: ARG002  (the interface's)
    ) -> PreTrainedModel:
        for place in self.places:
            place.check_loaded(model)
        for module in model.modules():
            if isinstance(module, RoutedModule):
                module.fill_tables()  # transformers gives buffers memory, and no values
        for name, parameter in model.named_parameters():
            # transformers 5.17 leaves renamed float tensors of prequantised checkpoints in the file's dtype
            if name in self.dtypes and parameter.dtype != self.dtypes[name] and not parameter.is_meta:
                parameter.data = parameter.data.to(self.dtypes[name])
        if self.reader is not None:  # experts are dense now, and are saved so
            self.quantization_config.matrices = None
            if hasattr(model, "_weight_conversions"):
                del model._weight_conversions
        return self._dequantize(model) if self.quantization_config.dequantize else model

    def _provide_fallbacks(self, model: PreTrainedModel) -> None:
        """Tell every experts module what runs where `moefold` cannot, as transformers would have chosen it."""
        stock = model.get_correct_experts_implementation(None)
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.fallback = None if self.named else stock
            elif is_experts(module):
                module.fallback = stock  # type: ignore[assignment]  # a plain attribute of a stock module

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # a string is what transformers makes of its configuration's once it has saved it
        kind: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for module in [module for module in model.modules() if isinstance(module, RoutedModule)]:
            if isinstance(module, PackedModule):
                unpack_module(module, kind)
            elif isinstance(module, MergedModule):
                unmerge_module(module, kind)
        stock, named = model.get_correct_experts_implementation(None), model.get_experts_implementation()
        model.set_experts_implementation({k: stock if v == implementation.NAME else v for k, v in named.items()})
        fit(model)
        say(model)
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions  # so that saving takes the stock ones
        return model

    def update_weight_conversions(
        self,
        weight_conversions: list[Any],
        model: Any = None,  # 5.17 does not pass it
    ) -> list[Any]:
        """Ours first: the names of experts left alone in a packed layer match the stock converters, too."""
        if self.reader is not None:
            return self.reader.conversions(weight_conversions, model)
        return [converter for place in self.places for converter in converters(place)] + weight_conversions

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:  # noqa: ARG002  (the interface's)
        """The packed parameters are split as the dense ones are (transformers from 5.20 on)."""
        plan.update(_packed_styles(plan))

    def update_tp_plan(self, config: Any) -> Any:
        """The same for transformers up to 5.20, where the plan is still in the configuration."""
        self._take_by_default(config)  # 5.17 shows the configuration here only
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            plan = getattr(part, "base_model_tp_plan", None)
            if plan:
                part.base_model_tp_plan = {**plan, **_packed_styles(plan)}
        return config

    def update_attn_implementation(self, config: Any) -> Any:
        """Take `moefold` for packed layers where the user named nothing: the last look at it, from 5.18 on."""
        return self._take_by_default(config)

    def _take_by_default(self, config: Any) -> Any:
        if config._experts_implementation is None and self.quantization_config.packs:
            parts = {key: getattr(config, key, None) for key in config.sub_configs}
            named = {key: getattr(part, "_experts_implementation", None) for key, part in parts.items()}
            default = dict.fromkeys(("", *named), implementation.NAME)
            config._experts_implementation = default | {key: name for key, name in named.items() if name is not None}
            self.named = False
        return config

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]  (the base has no body)
        """save_pretrained writes the same per-pair names, tripwire and configuration again."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether generate may compile the model (it does with a static cache): every path is traced whole."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]  (the base has no body)
        return False


def register() -> None:
    """Make transformers know the method; done at import, and harmless when repeated."""
    implementation.register()
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(MoefoldConfig)
        auto.register_quantizer(METHOD)(MoefoldQuantizer)
        # without this, transformers drops what `quantization_config=MoefoldConfig(dequantize=True)` asks for
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, MoefoldConfig)  # type: ignore[assignment]  # a tuple of fixed length there


def _packed_styles(plan: Mapping[str, str]) -> dict[str, str]:
    styles: dict[str, str] = {}
    for name, style in plan.items():
        for stock, packed in (("gate_up_proj", "gate_up"), ("up_proj", "gate_up"), ("down_proj", "down")):
            if name.endswith(f".experts.{stock}"):  # with the dot: not shared_experts
                styles |= {f"{name.removesuffix(stock)}{packed}_{end}": style for end in ENDS.values()}
    return styles


def _refuse_expert_parallelism(model: PreTrainedModel) -> None:
    settings = getattr(model.config, "distributed_config", None)
    if getattr(settings, "enable_expert_parallel", False) or (getattr(settings, "ep_size", None) or 1) > 1:
        raise FormatError(
            "expert parallelism would separate the experts of a pair, and route to experts that were merged away; "
            "use tensor parallelism (tp_plan)"
        )


register()
