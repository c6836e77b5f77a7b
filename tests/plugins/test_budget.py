"""A budget of bytes: knapsack and matchings against brute force, protection, and what is said of bad budgets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moefold import PairDamage
from moefold.errors import InputError
from moefold.stage import Layers
from moefold_plugins.budget import Protect, budget_bytes, plan_budget
from moefold_plugins.knapsack import Option, choose
from moefold_plugins.matching import matchings, perfect

SIZES = {"exponent": 200, "pair8": 103, "pair6": 79, "pair5": 66, "pair4": 53}


def layer(count: int, seed: int, stream: float = 1.0) -> PairDamage:
    """Random damages, larger in fewer bits; each expert takes 200 bytes."""
    drawn = torch.rand(count, count, generator=torch.Generator().manual_seed(seed))
    damage = (drawn + drawn.T).fill_diagonal_(0)
    by_format = {name: damage * (1 + place) for place, name in enumerate(SIZES)}
    tokens = torch.arange(count) * 7 % count
    return PairDamage(by_format, tokens, torch.ones(count), stream, 100, 200, SIZES)


def model(*layers: PairDamage) -> Layers[PairDamage]:
    return Layers(dict(enumerate(layers)))


def bytes_of(plan: Any, damage: Mapping[int, PairDamage]) -> int:
    """Counted once more, from the plan itself."""
    total = 0
    for number, one in damage.items():
        found = plan.layers[str(number)]
        members = [*itertools.chain(*found["pairs"]), *found["alone"]]
        assert sorted(members) == list(range(one.count))
        total += len(found["alone"]) * 200 + len(found["pairs"]) * SIZES.get(found["format"], 0)
    return total


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_finds_what_trying_everything_finds(seed):
    draw = random.Random(seed)
    layers = [
        [Option(draw.randrange(1, 60), draw.random(), (n, i)) for i in range(draw.randrange(1, 6))] for n in range(4)
    ]
    budget = draw.randrange(40, 160)
    every = [c for c in itertools.product(*layers) if sum(o.bytes for o in c) <= budget]
    found = choose(layers, budget)
    if not every:
        assert found is None
    else:
        assert found is not None
        assert sum(o.bytes for o in found) <= budget
        assert sum(o.damage for o in found) == pytest.approx(min(sum(o.damage for o in c) for c in every))
        assert [o.what[0] for o in found] == [0, 1, 2, 3]


def test_the_knapsack_of_large_sizes_stays_within_the_budget_and_near_it():
    draw = random.Random(0)
    layers = [
        [Option(draw.randrange(10**9, 2 * 10**10), 0.0, None)._replace(damage=d) for d in range(60)] for _ in range(60)
    ]
    layers = [[Option(size, 1e10 / size, None) for size, _, _ in options] for options in layers]
    budget = 60 * 8 * 10**9
    found = choose(layers, budget)
    assert found is not None
    assert 0.99 * budget < sum(o.bytes for o in found) <= budget


def all_matchings(members: list[int]) -> list[list[tuple[int, int]]]:
    if len(members) < 2:
        return [[]]
    first, rest = members[0], members[1:]
    with_first = [[(first, other), *more] for other in rest for more in all_matchings([m for m in rest if m != other])]
    return with_first + all_matchings(rest)


@pytest.mark.parametrize("count", [2, 5, 6, 8])
def test_each_matching_is_the_cheapest_of_its_size(count):
    cost = layer(count, 3).damage["exponent"]
    every = all_matchings(list(range(count)))
    found = matchings(cost, list(range(count)))
    assert len(found[0]) == count // 2
    assert perfect(cost, list(range(count))) == found[0]
    for pairs in found:
        best = min(sum(float(cost[p]) for p in one) for one in every if len(one) == len(pairs))
        assert sum(float(cost[p]) for p in pairs) == pytest.approx(best, rel=1e-6)
    assert all(len(set(itertools.chain(*pairs))) == 2 * len(pairs) for pairs in found)


def test_matching_many_experts_considers_the_cheapest_partners_of_each():
    cost = layer(90, 5).damage["exponent"]
    (full, *fewer) = matchings(cost, [e for e in range(90) if e % 9])
    assert len(full) == 40
    assert all(len(pairs) < 40 for pairs in fewer)
    assert not any(expert % 9 == 0 for pairs in (full, *fewer) for pair in pairs for expert in pair)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.75, 0.6, 0.5, 0.35, 0.25, 0.15])
def test_a_budget_is_met_and_never_exceeded(share):
    damage = {n: layer(16, n) for n in range(5)}
    plan = plan_budget(Layers(damage), budget=share)
    found = bytes_of(plan, damage)
    assert plan.budget["after"] == found
    assert share - 0.01 <= found / (5 * 16 * 200) <= share
    assert {one["format"] for one in plan.layers.values()} <= ({None, "exponent"} if share >= 0.5 else {None, *SIZES})


def test_fewer_bytes_never_cost_less():
    damage = {n: layer(12, n) for n in range(3)}
    cost = [
        sum(plan_budget(Layers(damage), budget=share, formats=["exponent", "pair4"]).predicted(n) or 0 for n in damage)
        for share in (1.0, 0.8, 0.6, 0.4, 0.2)
    ]
    assert cost[0] == 0
    assert cost == sorted(cost)


def test_a_plan_says_what_all_formats_would_have_left():
    made = {n: layer(16, n) for n in range(5)}
    for one in made.values():  # fewer bits cost little more, as measured
        one.damage.update({name: one.damage["exponent"] * (1 + place / 10) for place, name in enumerate(SIZES)})
    damage = Layers(made)
    plan = plan_budget(damage, budget=0.75)
    every = plan_budget(damage, budget=0.75, formats=list(SIZES))
    known = [sum(each.predicted(n) for n in range(5)) for each in (plan, every)]
    assert [plan.budget["damage"], every.budget["damage"]] == pytest.approx(known, rel=1e-3)
    assert plan.budget["damage_with_all_formats"] == every.budget["damage"] < plan.budget["damage"]
    below = plan_budget(damage, budget=0.35)
    assert "damage_with_all_formats" not in every.budget | below.budget


def test_damage_counts_for_less_where_the_stream_is_large():
    damage = model(layer(8, 1), layer(8, 1, stream=100.0))
    plan = plan_budget(damage, budget=0.75)
    assert [len(plan.layers[n]["pairs"]) for n in ("0", "1")] == [0, 4]


@pytest.mark.parametrize(
    ("written", "wanted"),
    [(0.75, 1500), (1, 2000), (1.0, 2000), (1500, 1500), ("1.5KB", 1500), ("1500", 1500), ("1KiB", 1024)],
)
def test_budgets_are_shares_or_bytes(written, wanted):
    assert budget_bytes(written, 2000) == wanted


@pytest.mark.parametrize("written", [0, -1, 1.5, "much", "0", "-3GB", "3 PB"])
def test_other_budgets_are_refused(written):
    with pytest.raises(ValidationError, match="no budget; write"):
        plan_budget.options(budget=written)


def test_an_impossible_budget_names_what_can_be_reached():
    damage = model(layer(4, 0), layer(5, 1))
    with pytest.raises(InputError, match=r"0\.4000 of 1,800.* 1,000 bytes \(0\.5556\) to all 1,800"):
        plan_budget(damage, budget=0.4, formats=["exponent"])
    with pytest.raises(InputError, match="2 experts protected"):
        plan_budget(damage, budget=0.15, protect=Protect(most_used=1))


def test_protected_experts_are_in_no_pair():
    damage = {n: layer(8, n) for n in range(2)}
    peaks = damage[1].peak.clone()
    peaks[5] = 50.0
    damage[1] = PairDamage(**{**vars(damage[1]), "peak": peaks})
    protect = Protect(most_used=1, extreme=True, experts={0: [2, 3]})
    plan = plan_budget(Layers(damage), budget=0.75, protect=protect)
    assert plan.protected == {"0": [1, 2, 3], "1": [1, 5]}  # expert 1 has the most tokens
    for number, experts in plan.protected.items():
        assert set(experts) <= set(plan.layers[number]["alone"])


def test_nothing_is_extreme_where_all_are_alike():
    plan = plan_budget(model(layer(8, 1)), budget=0.75, protect=Protect(extreme=True))
    assert plan.protected == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [({"protect": Protect(experts={3: [0]})}, "layer 3 has no routed experts"), ({"skip": [9]}, "layer 9 has no"),
     ({"protect": Protect(experts={0: [8]})}, "experts 0 to 7, and protect names 8")],
)  # fmt: skip
def test_unknown_layers_and_experts_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        plan_budget(model(layer(8, 0)), budget=0.9, **given)


def test_skipped_layers_stay():
    plan = plan_budget(model(layer(8, 0), layer(8, 1)), budget=0.75, skip=[0])
    assert plan.layers["0"] == {"format": None, "pairs": [], "alone": list(range(8)), "damage": []}
    assert len(plan.layers["1"]["pairs"]) == 4
