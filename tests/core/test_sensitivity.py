"""Predicted beside measured errors of layers: what a plan's report says."""

from __future__ import annotations

import io
from typing import Any

import pytest
from reports import synthetic
from rich.console import Console
from scipy.stats import spearmanr

from moefold import run_page
from moefold.sensitivity import sensitivity
from moefold.terminal import show


def report(damage: list[list[float | None]], errors: list[float | None]) -> dict[str, Any]:
    layers = {
        str(n): {"format": "pair6", "pairs": [[0, 1]] * len(costs), "alone": [4], "damage": costs}
        for n, costs in enumerate(damage)
    }
    rows = [{"layer": n, "output_error": error} for n, error in enumerate(errors) if error is not None]
    return {
        "methods": {
            "save": {"own": ["plan", "save"], "metrics": ["layers"]},
            "other": {"own": ["other"], "metrics": []},
        },
        "plans": {"plan": {"all": {"layers": layers}}},
        "merged": {},
        "reduced": {},
        "metrics": {"layers": {"all": {"rows": rows}}},
    }


def test_each_layer_has_both_and_checkpoints_without_a_plan_none():
    found = sensitivity(report([[0.09, 0.07], [0.01], []], [0.3, 0.2, 0.0]))
    assert set(found) == {"save"}
    layer = found["save"]["layers"]["0"]
    assert layer == {
        "format": "pair6", "pairs": 2, "alone": 1, "predicted": pytest.approx(0.4), "expected": None, "measured": 0.3
    }  # fmt: skip
    assert found["save"]["rank_correlation"] == pytest.approx(1)


def merged(lost: list[float | None], errors: list[float]) -> dict[str, Any]:
    """Of a merge without a plan."""
    told = report([[]] * len(lost), list(errors)) | {"plans": {}}
    told["methods"]["save"]["own"] = ["merge", "save"]
    for row in told["metrics"]["layers"]["all"]["rows"]:
        row["inverse_length"] = 0.5
    layers = {
        str(n): {"format": "exponent", "pairs": [[0, 1]], "alone": [], "figures": {"lost": one}}
        for n, one in enumerate(lost)
    }
    return told | {"merged": {"merge": layers}}


def test_without_a_plan_a_merges_own_account_stands_beside_what_was_measured():
    found = sensitivity(merged([0.4, 0.2, 0.8], [0.3, 0.2, 0.1]))
    layer = found["save"]["layers"]["0"]
    assert (layer["predicted"], layer["expected"], layer["measured"]) == (None, pytest.approx(0.2), 0.3)
    assert found["save"]["rank_correlation"] == pytest.approx(spearmanr([0.4, 0.2, 0.8], [0.3, 0.2, 0.1])[0])


def test_of_layers_without_pairs_nothing_is_expected_and_of_older_results_it_is_not_known():
    told = merged([None, None], [0.0, 0.1])
    told["merged"]["merge"]["0"]["pairs"] = []
    layers = sensitivity(told)["save"]["layers"]
    assert (layers["0"]["expected"], layers["1"]["expected"]) == (0.0, None)


def test_what_was_merged_before_is_not_in_a_merges_account():
    told = merged([0.4, 0.2, 0.8], [0.3, 0.2, 0.1])
    told["methods"]["save"]["own"] = ["reduce", "merge", "save"]
    assert sensitivity(told | {"reduced": {"reduce": {}}}) == {}


def test_a_plans_layers_have_both_accounts():
    told = report([[0.04], [0.01], [0.09]], [0.3, 0.2, 0.1])
    told["merged"] = {"save": merged([0.4, 0.2, 0.8], [0.3, 0.2, 0.1])["merged"]["merge"]}
    for row in told["metrics"]["layers"]["all"]["rows"]:
        row["inverse_length"] = 0.5
    found = sensitivity(told)["save"]
    assert [round(one["expected"], 6) for one in found["layers"].values()] == [0.2, 0.1, 0.4]
    assert found["rank_correlation"] == pytest.approx(spearmanr([0.2, 0.1, 0.3], [0.3, 0.2, 0.1])[0])


@pytest.mark.parametrize("errors", [[0.3, 0.2, 0.1, 0.4], [0.1, 0.1, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]])
def test_the_rank_correlation_is_spearmans(errors):
    damage = [0.1, 0.2, 0.2, 0.9]
    found = sensitivity(report([[d] for d in damage], errors))["save"]["rank_correlation"]
    assert found == pytest.approx(spearmanr(damage, errors)[0])


@pytest.mark.parametrize(
    ("damage", "errors"),
    [([[0.1], [0.2]], [0.1, 0.2]), ([[0.1]] * 3, [0.1, 0.2, 0.3]), ([[None], [0.1], [0.2]], [0.1, 0.2, 0.3]),
     ([[0.1], [0.2], [0.3]], [0.1, 0.2, None])],
)  # fmt: skip
def test_too_little_to_compare_gives_none(damage, errors):
    assert sensitivity(report(damage, errors))["save"]["rank_correlation"] is None


def test_the_page_and_the_terminal_tell_it():
    made = synthetic()
    numbers = list(made["saved"]["save"]["all"]["experts"])
    layers = {
        n: {"format": "exponent", "pairs": 2, "alone": 4, "predicted": 0.1234, "measured": 0.0567} for n in numbers
    }
    made["sensitivity"] = {"save": {"layers": layers, "rank_correlation": 0.5}}
    text = run_page.page(made).render()
    assert "Rank correlation over layers: +0.50" in text
    assert "12.34%" in text
    del made["sensitivity"]
    assert "Rank correlation" not in run_page.page(made).render()


@pytest.mark.parametrize(("least", "said"), [(0.03, True), (0.04, False), (None, False)])
def test_the_terminal_says_what_more_formats_would_have_given(least, said):
    console = Console(width=150, record=True, file=io.StringIO())
    told = report([[0.04]], [0.3])
    told["plans"]["plan"]["all"]["budget"] = {"formats": ["exponent"], "damage": 0.04}
    if least is not None:
        told["plans"]["plan"]["all"]["budget"]["damage_with_all_formats"] = least
    show(told | {"warnings": [], "saved": {}, "metrics": {}, "stages": {}, "sensitivity": sensitivity(told)}, console)
    text = console.export_text()
    assert ("0.75x at the same bytes: --set plan.formats=[exponent,pair8" in text) == said


def test_the_terminal_shows_the_layers_of_most_error():
    console = Console(width=150, record=True, file=io.StringIO())
    told = {
        "layers": {
            str(n): {"format": None if n else "pair4", "pairs": n, "alone": 1, "predicted": None, "measured": n / 100}
            for n in range(12)
        },
        "rank_correlation": None,
    }
    show({"warnings": [], "saved": {}, "metrics": {}, "stages": {}, "sensitivity": {"save": told}}, console)
    text = console.export_text()
    assert "the 8 of most error of 12" in text
    assert "11.00%" in text
    assert " 3.00%" not in text
