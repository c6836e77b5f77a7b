"""A byte budget over all layers: whom to merge, and in which format, for the least predicted damage."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from moefold import Json, Layers, MergePlan, PairDamage, Stage, hookimpl, stage
from moefold.errors import InputError
from moefold_plugins.compensated import Format
from moefold_plugins.damage import FORMATS
from moefold_plugins.knapsack import Option, choose
from moefold_plugins.matching import Pairs, matchings

LOG = logging.getLogger("moefold.progress")  # "layer N of M" moves the bar of a stage that runs once
EXTREME_QUANTILE, EXTREME_SHARE = 0.995, 0.1
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{u}I": 1 << 10 * (i + 1) for i, u in enumerate("KMGT")
}


def check_budget(budget: float | str) -> float | str:
    """`budget` if it can be read (for options; pydantic shows the ValueError)."""
    budget_bytes(budget, 1)
    return budget


def budget_bytes(budget: float | str, before: int) -> int:
    """Bytes of `0.75` (of `before`), `3200000000` or `"3.2GB"`; raises ValueError for anything else."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", budget.upper())
        if match is None or match[2] not in _UNITS or not float(match[1]):
            raise ValueError(f"{budget!r} is no budget; write a share like 0.75, bytes as a number, or like 3.2GB")
        return int(float(match[1]) * _UNITS[match[2]])
    if 0 < budget <= 1:
        return int(budget * before + 1e-6)
    if budget < 1 or budget != int(budget):
        raise ValueError(f"{budget} is no budget; write a share from 0 to 1, or whole bytes")
    return int(budget)


class Protect(BaseModel):
    """Experts that no pair may have."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    most_used: Annotated[int, Field(ge=0, description="so many of the most used of every layer")] = 0
    extreme: Annotated[
        bool,
        Field(description="experts of extreme outputs: above the 99.5th percentile and a tenth of the model's largest"),
    ] = False
    experts: Annotated[dict[int, list[int]], Field(description="decoder layer -> experts")] = {}


@stage("plan.budget", version=2)
def plan_budget(
    damage: Layers[PairDamage],
    *,
    budget: Annotated[
        float | str,
        AfterValidator(check_budget),
        Field(description="expert bytes at most: a share of the present ones (0.75), bytes, or like 3.2GB"),
    ],
    formats: Annotated[
        list[Format] | None,
        Field(min_length=1, description="to choose from (default: exponent alone where that suffices, else all)"),
    ] = None,
    protect: Annotated[Protect, Field(description="experts that stay as they are")] = Protect(),  # noqa: B008  (frozen)
    skip: Annotated[list[int], Field(description="decoder layers that stay as they are")] = [],  # noqa: B006
) -> MergePlan:
    """Choose pairs and formats over all layers for the least damage within a budget of bytes."""
    found = dict(damage.items())
    protected = _protected(found, protect, skip)
    before = sum(one.expert_bytes * one.count for one in found.values())
    limit = budget_bytes(budget, before)
    candidates = {}
    for place, (number, one) in enumerate(found.items()):
        LOG.info("layer %d of %d", place, len(found))
        free = [] if number in skip else sorted(set(range(one.count)) - set(protected.get(number, ())))
        candidates[number] = Candidates(one, matchings(one.damage["exponent"], free))
    names = _enough(candidates, limit) if formats is None else [str(name) for name in formats]
    options = [each.options(names) for each in candidates.values()]
    chosen = choose(options, limit)
    if chosen is None:
        least = sum(min(option.bytes for option in each) for each in options)
        raise InputError(
            f"a budget of {limit:,} bytes ({limit / before:.4f} of {before:,}) cannot be met: with "
            f"{', '.join(names)} and {sum(map(len, protected.values()))} experts protected, {least:,} bytes "
            f"({least / before:.4f}) to all {before:,} can be; write a budget in between, or allow other formats"
        )
    after = sum(option.bytes for option in chosen)
    about = {"asked": budget, "bytes": limit, "before": before, "after": after, "formats": names}
    about["damage"] = _damage(chosen)
    if formats is None and len(names) < len(FORMATS):  # what that costs, for the user to decide
        freely = choose([each.options(list(FORMATS)) for each in candidates.values()], limit)
        about["damage_with_all_formats"] = _damage(freely or chosen)
    return MergePlan(
        {str(n): each.layer(option.what) for (n, each), option in zip(candidates.items(), chosen, strict=True)},
        {str(n): [one.count, one.weights] for n, one in found.items()},
        about,
        {str(n): experts for n, experts in protected.items()},
    )


class Choice(NamedTuple):
    """What a layer becomes."""

    format: str | None
    pairs: Pairs


class Candidates(NamedTuple):
    """What one layer could become."""

    damage: PairDamage
    matchings: list[Pairs]

    def options(self, formats: list[str]) -> list[Option]:
        """Left as it is, or some pairs of a matching, the cheapest first, in a format."""
        one = self.damage
        found = [Option(one.count * one.expert_bytes, 0.0, Choice(None, []))]
        for name in formats:
            for matching in self.matchings:
                ranked = sorted(matching, key=lambda pair: one.relative(name, pair))
                total = 0.0
                for count, pair in enumerate(ranked, 1):
                    total += one.relative(name, pair)
                    size = count * one.pair_bytes[name] + (one.count - 2 * count) * one.expert_bytes
                    found.append(Option(size, total, Choice(name, ranked[:count])))
        return found

    def layer(self, choice: Choice) -> dict[str, Json]:
        """The choice as plans have it."""
        pairs, name = sorted(choice.pairs), choice.format
        paired = {expert for pair in pairs for expert in pair}
        return {
            "format": choice.format,
            "pairs": [list(pair) for pair in pairs],
            "alone": [expert for expert in range(self.damage.count) if expert not in paired],
            "damage": [float(f"{self.damage.relative(name, pair):.5g}") for pair in pairs] if name else [],
        }


def _damage(chosen: list[Option]) -> float:
    return float(f"{math.fsum(option.damage for option in chosen):.5g}")


def _enough(candidates: Mapping[int, Candidates], limit: int) -> list[str]:
    """`exponent` alone where that meets the budget, all formats where it does not."""
    least = sum(min(option.bytes for option in each.options([FORMATS[0]])) for each in candidates.values())
    return [FORMATS[0]] if least <= limit else list(FORMATS)


def _protected(found: Mapping[int, PairDamage], protect: Protect, skip: list[int]) -> dict[int, list[int]]:
    """Layer -> experts, where there are any; raises InputError for layers and experts that there are not."""
    for number in (*protect.experts, *skip):
        if number not in found:
            raise InputError(f"layer {number} has no routed experts; those that have: {', '.join(map(str, found))}")
    highest = max((float(one.peak.max()) for one in found.values()), default=0.0)
    peaks = torch.cat([one.peak for one in found.values()])
    bound = max(float(peaks.double().quantile(EXTREME_QUANTILE)), EXTREME_SHARE * highest) if protect.extreme else None
    chosen: dict[int, list[int]] = {}
    for number, one in found.items():
        named = protect.experts.get(number, [])
        if unknown := [expert for expert in named if not 0 <= expert < one.count]:
            raise InputError(f"layer {number} has experts 0 to {one.count - 1}, and protect names {unknown[0]}")
        used = one.tokens.argsort(descending=True, stable=True)[: protect.most_used].tolist()
        extreme = [] if bound is None else (one.peak > bound).nonzero().flatten().tolist()
        if experts := sorted({*named, *used, *extreme}):
            chosen[number] = experts
    return chosen


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [plan_budget]
