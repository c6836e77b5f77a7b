"""The same model with fewer experts in every layer: which of its tensors and which key of its config follow.

No table of models: the model is made on `meta` once more, from a config with fewer experts, and shapes are compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefold import fused
from moefold.errors import CheckpointError, InputError
from moefold.meta import on_meta, tensors_of
from moefold.standins import Stop

if TYPE_CHECKING:
    from moefold.skeleton import Skeleton

_GROUPS = ("n_group", "num_expert_group")  # the two names that transformers has for the groups of a router's outputs


class _TooFew(Exception):  # noqa: N818  (turned into an InputError)
    """A router wants more outputs than it has."""


@dataclass(frozen=True)
class Narrow:
    """A model on `meta` whose layers have `count` experts each, and how it comes from the one that it narrows."""

    count: int
    model: PreTrainedModel
    config: dict[str, int]
    """What changes in config.json (in its text part, for composite models)."""
    axes: dict[str, int]
    """Every parameter and buffer that has something for each expert -> its axis of experts."""
    blank: dict[str, Tensor]
    """Every parameter and buffer of the model, as long as none of it is real."""

    @classmethod
    def of(cls, skeleton: Skeleton, count: int) -> Narrow:
        """Raises CheckpointError where it cannot be told for sure what follows the number of experts."""
        total = total_experts(skeleton)
        if total == 1:
            raise InputError(f"{skeleton.where} has one expert a layer, of which none can be left out")
        if not 0 < count < total:
            raise InputError(f"{skeleton.where} has {total} experts a layer; leave 1 to {total - 1}, not {count}")
        key, model = _made(skeleton, total, count)
        blank = dict(tensors_of(model))
        return cls(count, model, _in_file(skeleton, key, count), _axes(skeleton, blank, total, count), blank)

    def check_choice(self, skeleton: Skeleton) -> None:
        """Raises InputError where a router with so few outputs cannot choose what it has to."""
        groups, opened = expert_groups(skeleton)
        where = f"{skeleton.where}, {self.count} experts left of {total_experts(skeleton)}"
        if self.count % groups:
            lower = self.count // groups * groups
            offer = " or ".join(f"experts: {n}" for n in (lower, lower + groups) if n)
            raise InputError(f"{where}: its router has {groups} equal groups of experts; write {offer}")
        for number in skeleton.experts:
            self._check_router(skeleton, number, where, groups, opened)

    def _check_router(self, skeleton: Skeleton, number: int, where: str, groups: int, opened: int) -> None:
        layer = f"{skeleton.layers}.{number}"
        said = _top_k_said(self.model.get_submodule(layer))
        try:
            top_k = _chosen(self.model, skeleton.experts[number]) or said
        except _TooFew as error:
            least = max(self.count + groups, _least(said or 1, groups, opened))
            raise InputError(
                f"{where}: too few for the router of decoder layer {number}; leave more of them (experts: {least})"
            ) from error
        if top_k is None:
            raise CheckpointError(f"{skeleton.where}: how many experts a token takes in {layer} cannot be told")
        least = _least(top_k, groups, opened)
        if self.count < least:
            among = f" out of {opened} of {groups} groups" if groups > 1 else ""
            raise InputError(f"{where}: a token takes {top_k} experts{among}; leave more of them (experts: {least})")


def _least(top_k: int, groups: int, opened: int) -> int:
    """How many experts there must be so that `top_k` are in the groups that are open to a token."""
    return math.ceil(top_k / opened) * groups


def total_experts(skeleton: Skeleton) -> int:
    """How many experts every layer has; raises CheckpointError where layers differ, or are compressed already."""
    if skeleton.checkpoint.entries:
        raise CheckpointError(
            f"{skeleton.where}: its experts are merged or packed already; prune the model before that"
        )
    counts = {number: skeleton.expert_count(number) for number in skeleton.experts}
    if len(set(counts.values())) > 1:
        raise CheckpointError(f"{skeleton.where} has layers with different numbers of experts; those cannot be pruned")
    return next(iter(counts.values()))


def expert_groups(skeleton: Skeleton) -> tuple[int, int]:
    """Into how many groups of neighbours the router puts experts, and out of how many a token may choose."""
    config = skeleton.model.config.get_text_config()
    groups = next((n for n in (getattr(config, key, None) for key in _GROUPS) if isinstance(n, int) and n > 1), 1)
    opened = getattr(config, "topk_group", None)
    return groups, opened if groups > 1 and isinstance(opened, int) and 0 < opened <= groups else groups


def routers(skeleton: Skeleton) -> dict[int, tuple[str, str | None]]:
    """The parameters of each layer's router: its weight, `[expert, hidden]`, and the bias of its logits, if any."""
    axes = Narrow.of(skeleton, total_experts(skeleton) - 1).axes
    return {number: _router(skeleton, number, axes) for number in skeleton.experts}


def _router(skeleton: Skeleton, number: int, axes: Mapping[str, int]) -> tuple[str, str | None]:
    hidden = int(skeleton.model.config.get_text_config().hidden_size)
    prefix, experts = f"{skeleton.layers}.{number}.", f"{skeleton.experts[number]}."
    mine = [name for name in axes if name.startswith(prefix) and not name.startswith(experts)]
    found = [name for name in mine if axes[name] == 0 and skeleton.blank[name].shape[1:] == (hidden,)]
    if len(found) != 1:
        raise CheckpointError(
            f"{skeleton.where}: the router of decoder layer {number} cannot be told; candidates: {', '.join(mine)}"
        )
    bias = f"{found[0].rpartition('.')[0]}.bias"
    return found[0], bias if bias in axes else None


def _made(skeleton: Skeleton, total: int, count: int) -> tuple[str, PreTrainedModel]:
    """The config's key that the experts follow, and the model that it makes.

    Other keys may have the same value by chance (nemotron_h: n_groups of its Mamba layers), hence the trial of each.
    """
    values = skeleton.model.config.get_text_config().to_dict().items()
    keys = sorted((key for key, value in values if type(value) is int and value == total), key=_unlikely)
    problems = [f"no key of config.json is {total}"] if not keys else []
    for key in keys:
        try:
            model = on_meta(skeleton.checkpoint, skeleton.dtype, {key: count})
            modules = [model.get_submodule(path) for path in skeleton.experts.values()]
        except Exception as error:  # whatever a model says to a key that should not have been changed
            problems.append(f"{key}: {error}")
            continue
        if all(getattr(module, fused.parameters(module)[1]).shape[0] == count for module in modules):
            return key, model
        problems.append(f"{key}: experts do not follow")
    raise CheckpointError(
        f"{skeleton.where}: which key of config.json counts experts cannot be told ({'; '.join(problems)})"
    )


def _unlikely(key: str) -> bool:
    return "expert" not in key


def _in_file(skeleton: Skeleton, key: str, count: int) -> dict[str, int]:
    """The key under the names that config.json has for it: the config's own, or what it maps to that."""
    text = skeleton.model.config.get_text_config()
    config = skeleton.checkpoint.config
    part = config.get("text_config", config)
    if not isinstance(part, dict) or part.get("model_type", text.model_type) != text.model_type:
        raise CheckpointError(
            f"{skeleton.where}: the config of {text.model_type}, where the number of experts belongs, is neither "
            "config.json nor its text_config"
        )
    names = [key, *(alias for alias, own in text.attribute_map.items() if own == key)]
    return {name: count for name in names if name in part} or {key: count}


def _axes(skeleton: Skeleton, after: Mapping[str, Tensor], total: int, count: int) -> dict[str, int]:
    before = skeleton.blank
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())[0]
        raise CheckpointError(f"{skeleton.where}: {odd} comes or goes with the number of experts; it cannot be pruned")
    axes = {name: _axis(name, before[name], after[name], total, count, skeleton) for name in before}
    found = {name: axis for name, axis in axes.items() if axis is not None}
    for number, path in skeleton.experts.items():
        prefix = f"{skeleton.layers}.{number}."
        mine = [name for name in found if name.startswith(prefix)]
        if all(name.startswith(f"{path}.") for name in mine):
            raise CheckpointError(f"{skeleton.where}: the router of decoder layer {number} does not follow its experts")
        numbers = [n for n, t in after.items() if n.startswith(prefix) and not t.is_floating_point()]
        if numbers:  # deepseek_v4 stores the experts of each word
            raise CheckpointError(f"{skeleton.where}: {numbers[0]} may hold numbers of experts; it cannot be pruned")
    return found


def _axis(name: str, one: Tensor, other: Tensor, total: int, count: int, skeleton: Skeleton) -> int | None:
    if one.shape == other.shape:
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(one.shape, other.shape, strict=False)) if a != b]
    layer = name.removeprefix(f"{skeleton.layers}.").partition(".")[0]
    expected = len(one.shape) == len(other.shape) and [(one.shape[a], other.shape[a]) for a in axes] == [(total, count)]
    if not expected or not layer.isdigit() or int(layer) not in skeleton.experts:
        raise CheckpointError(
            f"{skeleton.where}: {name} is {list(one.shape)} for {total} experts and {list(other.shape)} for {count}, "
            "not one row for each expert of a layer; it cannot be pruned"
        )
    return axes[0]


def _chosen(model: PreTrainedModel, path: str) -> int | None:
    """How many experts a token takes, by running a layer's router on `meta`; None where it does not run alone."""
    experts, block = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    hidden = int(model.config.get_text_config().hidden_size)
    hook = experts.register_forward_pre_hook(Stop.at_experts, prepend=True)
    try:
        with torch.no_grad():
            block(torch.empty(1, 2, hidden, dtype=model.dtype, device="meta"))
    except Stop as stop:
        return int(stop.arguments[1].shape[-1])
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, CheckpointError) as error:
        if re.search(r"\bk (not in|out of) range", str(error)):  # topk's, where it wants more than there are
            raise _TooFew(str(error)) from error
        return None  # a block that needs more than hidden states
    finally:
        hook.remove()
    return None


def _top_k_said(layer: Any) -> int | None:
    """The `top_k` that a module of the layer keeps, as transformers' routers do."""
    values = (getattr(module, "top_k", None) for module in layer.modules())
    return next((value for value in values if isinstance(value, int)), None)
