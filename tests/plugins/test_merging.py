"""Averages, M-SMoE and MergeMoE: exact where they have to be, and against the paper's own formula."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from models import samples, tiny
from moefold import Activity, Checkpoint, Context, Experts, Groups, Routed, StreamedModel, Text
from moefold.errors import InputError, StageError
from moefold_plugins import fitting
from moefold_plugins.align import align
from moefold_plugins.averaging import average, msmoe, usage
from moefold_plugins.calibrate import forward, observe
from moefold_plugins.mergemoe import mergemoe

CONTEXT = Context(torch.device("cpu"), torch.Generator())
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")
PAIRS = Groups([[0, 5], [3, 1], [2, 7]], [4, 6])


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A family's first layer with experts, calibrated."""
    return calibrated(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return calibrated("qwen3_moe", tmp_path_factory.mktemp("model"))


def calibrated(family: str, path, count: int = 16) -> SimpleNamespace:
    layer = Checkpoint.open(str(tiny(family, path))).layers()[0]
    text = Text("random", samples(count, 32).int())
    with torch.no_grad():
        routed = forward(layer, text, None, None, CONTEXT)
        experts = layer.experts()
        return SimpleNamespace(
            layer=layer, text=text, routed=routed, experts=experts, activity=observe(layer, routed, experts, CONTEXT)
        )


def merges(w: SimpleNamespace, experts: Experts, groups: Groups) -> dict[str, Experts]:
    with torch.no_grad():
        return {
            "average": average(experts, groups, CONTEXT),
            "msmoe": msmoe(experts, groups, w.activity, CONTEXT),
            "routed": mergemoe(w.layer, w.routed, experts, groups, w.activity, CONTEXT),
            "published": mergemoe(w.layer, w.routed, experts, groups, w.activity, CONTEXT, target="published"),
        }


def outputs(w: SimpleNamespace, experts: Experts) -> torch.Tensor:
    """What leaves the decoder layer with these experts."""
    streamed = StreamedModel(w.layer.checkpoint, "cpu")
    with streamed.loaded(w.layer.number, experts):
        return streamed.through(w.layer.number, w.text.tokens.long(), w.routed.layer_input)


def doubled(experts: Experts, groups: Groups) -> Experts:
    """Every group's members become copies of its first."""
    first = torch.arange(experts.count)
    for group in groups.members:
        first[group] = group[0]
    biases = {n: None if b is None else b[first] for n, b in vars(experts).items() if n.endswith("bias")}
    return replace(experts, gate_up=experts.gate_up[first], down=experts.down[first], **biases)


def test_with_as_many_groups_as_experts_nothing_changes(world):
    alone = Groups([], list(range(world.experts.count)))
    for name, merged in merges(world, world.experts, alone).items():
        for field in ("gate_up", "down", "gate_up_bias", "down_bias"):
            was, now = getattr(world.experts, field), getattr(merged, field)
            assert (was is None and now is None) or torch.equal(was, now), (name, field)
        assert merged.route.tolist() == list(range(world.experts.count))


def test_copies_merge_into_what_they_are_copies_of(world):
    twins = doubled(world.experts, PAIRS)
    expected = outputs(world, twins).float()
    for name, merged in merges(world, twins, PAIRS).items():
        assert merged.count == 5
        found = outputs(world, merged).float()
        # two choices of one expert: g1 f + g2 f is summed in another order than before
        assert (found - expected).norm() / expected.norm() < 2e-3, name


def test_copies_in_another_order_merge_once_aligned(qwen):
    twins = doubled(qwen.experts, PAIRS)
    order = torch.randperm(twins.inner, generator=torch.Generator().manual_seed(3))
    shuffled = replace(twins, gate_up=twins.gate_up.clone(), down=twins.down.clone())
    for _, *others in PAIRS.members:
        for expert in others:
            for name, weights in shuffled.matrices().items():
                weights[expert] = weights[expert][:, order] if name == "down_proj" else weights[expert][order]
    expected = outputs(qwen, twins).float()
    for method in ("greedy", "hungarian"):
        aligned = align(shuffled, PAIRS, CONTEXT, method=method)
        found = outputs(qwen, average(aligned, PAIRS, CONTEXT)).float()
        assert (found - expected).norm() / expected.norm() < 2e-3
    unaligned = outputs(qwen, average(shuffled, PAIRS, CONTEXT)).float()
    assert (unaligned - expected).norm() / expected.norm() > 2e-2


def in_float64(w: SimpleNamespace) -> tuple[Experts, Routed]:
    experts = replace(w.experts, gate_up=w.experts.gate_up.double(), down=w.experts.down.double())
    return experts, replace(w.routed, tokens=w.routed.tokens.double(), top_k_weights=w.routed.top_k_weights.double())


def test_streamed_t1_is_the_papers(qwen, monkeypatch):
    """T1 = Q P^+ and D = [b_e D_e] T1, directly, with more tokens than neurons; in float64 to rounding."""
    monkeypatch.setattr(fitting, "CHUNK", 100)
    experts, routed = in_float64(qwen)
    options = {"target": "published", "ridge": 0.0, "anchor": "zero"}
    merged = mergemoe(qwen.layer, routed, experts, PAIRS, qwen.activity, CONTEXT, **options)
    shares = usage(PAIRS, qwen.activity)
    for number, group in enumerate(merged.groups):
        if len(group) == 1:
            continue
        rows = torch.isin(routed.top_k_index, torch.tensor(group)).any(dim=1)
        x = routed.tokens[rows]
        assert len(x) > 2 * experts.inner
        p = qwen.layer.activate(merged, number, x).T  # [inner, token]
        q = torch.cat([qwen.layer.activate(experts, e, x).T for e in group])
        t1 = q @ torch.linalg.pinv(p)
        expected = torch.cat([shares[e] * experts.down[e] for e in group], dim=1) @ t1
        torch.testing.assert_close(merged.down[number], expected, rtol=1e-8, atol=1e-10)


def test_the_routed_fit_is_the_weighted_least_squares_solution(qwen):
    """sum_t || G_t D p_t - sum_e g_te D_e h_e(x_t) ||^2, solved by lstsq over all tokens at once."""
    experts, routed = in_float64(qwen)
    merged = mergemoe(qwen.layer, routed, experts, PAIRS, qwen.activity, CONTEXT, ridge=0.0)
    for number, group in enumerate(merged.groups):
        if len(group) == 1:
            continue
        gates = [(routed.top_k_weights * (routed.top_k_index == e)).sum(dim=1, keepdim=True) for e in group]
        p = qwen.layer.activate(merged, number, routed.tokens) * sum(gates)
        pairs = zip(gates, group, strict=True)
        target = sum(g * (qwen.layer.activate(experts, e, routed.tokens) @ experts.down[e].T) for g, e in pairs)
        expected = torch.linalg.lstsq(p, target).solution.T
        torch.testing.assert_close(merged.down[number], expected, rtol=1e-6, atol=1e-8)


def test_sums_gathered_in_several_passes_are_the_same(qwen, monkeypatch):
    once = merges(qwen, qwen.experts, PAIRS)["routed"]
    monkeypatch.setattr(fitting, "BUDGET", 1)
    again = merges(qwen, qwen.experts, PAIRS)["routed"]
    assert torch.equal(once.down, again.down)
    assert once.figures == again.figures


def test_the_fit_beats_the_average_on_what_it_is_fitted_for(world):
    """On the layer's own output; with the seven ridges and the average to choose from it can hardly do worse."""
    expected = outputs(world, world.experts).float()
    errors = {
        n: float((outputs(world, m).float() - expected).norm()) for n, m in merges(world, world.experts, PAIRS).items()
    }
    assert errors["routed"] < errors["msmoe"]


@pytest.mark.parametrize("target", ["routed", "published"])
@pytest.mark.parametrize("ridge", ["auto", 1e-2])
def test_little_text_leans_on_the_average_and_says_so(tmp_path, target, ridge):
    w = calibrated("qwen3_moe", tmp_path, count=1)
    merged = mergemoe(w.layer, w.routed, w.experts, PAIRS, w.activity, CONTEXT, target=target, ridge=ridge)
    assert bool(merged.down.isfinite().all())
    assert merged.figures["thin"]  # 32 tokens, of which a part for each group of 32 neurons
    start = msmoe(w.experts, PAIRS, w.activity, CONTEXT)
    assert float((merged.down - start.down).norm() / start.down.norm()) < 1.5


def test_a_ridge_that_is_too_small_says_so(tmp_path):
    """With fewer tokens than neurons; `auto` passes over it."""
    w = calibrated("qwen3_moe", tmp_path, count=1)
    inputs = (w.layer, w.routed, w.experts, PAIRS, w.activity, CONTEXT)
    with pytest.raises(StageError, match="no Cholesky factor; write a larger one, or auto"):
        mergemoe(*inputs, ridge=1e-18)
    assert all(fit["ridge"] != 1e-18 for fit in mergemoe(*inputs).figures["fits"].values())


def test_the_ridge_is_the_one_that_predicts_held_out_tokens_best(qwen):
    """Against every ridge tried one by one on the same tokens, from outside."""
    inputs = (qwen.layer, qwen.routed, qwen.experts, PAIRS, qwen.activity, CONTEXT)
    chosen = mergemoe(*inputs).figures["fits"]
    every = {ridge: mergemoe(*inputs, ridge=ridge).figures["fits"] for ridge in fitting.RIDGES}
    for number, fit in chosen.items():
        best = min(every, key=lambda ridge: every[ridge][number]["left"])
        left = every[best][number]["left"]
        assert fit["ridge"] == (best if left < 1 else None)
        assert fit["left"] == pytest.approx(min(left, 1))
    assert any(fit["ridge"] for fit in chosen.values())


def test_a_group_that_no_token_reaches_is_averaged(qwen):
    nowhere = replace(qwen.routed, top_k_index=torch.full_like(qwen.routed.top_k_index, 4))
    unused = replace(qwen.activity, tokens=torch.zeros_like(qwen.activity.tokens))
    merged = mergemoe(qwen.layer, nowhere, qwen.experts, PAIRS, unused, CONTEXT)
    assert torch.equal(merged.down, average(qwen.experts, PAIRS, CONTEXT).down)
    assert merged.figures["thin"] == [number for number, group in enumerate(merged.groups) if len(group) > 1]


def test_merging_what_was_merged_leads_through_both_routes(qwen):
    once = average(qwen.experts, PAIRS, CONTEXT)  # groups [0, 5], [3, 1], [2, 7], [4], [6]: 0, 1, 2, 3, 4
    activity = Activity(torch.ones(once.count, dtype=torch.int64), torch.empty(0), torch.empty(0))
    twice = msmoe(once, Groups([[0, 4]], [1, 2, 3]), activity, CONTEXT)
    assert twice.count == 4
    assert twice.route.tolist() == [0, 1, 2, 1, 3, 0, 0, 2]
    torch.testing.assert_close(twice.down[0], ((once.down[0].float() + once.down[4].float()) / 2).bfloat16())


def test_usage_weights(qwen):
    activity = Activity(torch.tensor([30, 1, 0, 3, 5, 10, 5, 0]), torch.empty(0), torch.empty(0))
    shares = usage(PAIRS, activity)
    assert shares[0] == 0.75
    assert shares[5] == 0.25
    assert shares[2] == shares[7] == 0.5
    merged = msmoe(qwen.experts, PAIRS, activity, CONTEXT)
    expected = 0.75 * qwen.experts.down[0].float() + 0.25 * qwen.experts.down[5].float()
    torch.testing.assert_close(merged.down[0], expected.bfloat16())


def test_groups_of_other_experts_are_refused(qwen):
    with pytest.raises(InputError, match="the groups name 4 experts, and there are 8"):
        average(qwen.experts, Groups([[0, 1]], [2, 3]), CONTEXT)
