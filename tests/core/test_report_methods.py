"""Which steps of a pipeline a report counts as calibration, as the method's own, as evaluation; what it measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import tiny
from moefold.artifact import Artifact
from moefold.artifacts import Groups, Routed
from moefold.checkpoint import Checkpoint
from moefold.comparison import method
from moefold.hooks import Registry, hookimpl
from moefold.methods import methods
from moefold.pipeline import load
from moefold.report import Times, build
from moefold.session import Session
from moefold.stage import stage

HEAD = """
model: demo
stages:
  - {id: calibration, uses: text.stdlib, with: {part: calibrate, samples: 2, length: 8}}
  - {uses: evaluate.baseline, needs: {texts: [unseen]}}
  - {id: unseen, uses: text.stdlib, with: {part: evaluate, samples: 2, length: 8}}
  - {uses: save, with: {to: out}, needs: {experts: pack.exponent}}
  - uses: evaluate.perplexity
"""


@dataclass(frozen=True)
class Moments(Artifact):
    """A kind that core does not know."""


@stage("moments")
def moments(routed: Routed) -> Moments:
    """Of the tokens alone: any method may use them."""
    return Moments()


@stage("sums")
def sums(routed: Routed, groups: Groups) -> Moments:
    """Of one method's groups."""
    return Moments()


@stage("group.moments")
def group_moments(moments: Moments) -> Groups:
    """Groups by moments."""
    return Groups([], [])


class Plugin:
    @hookimpl
    def moefold_stages(self) -> list[Any]:
        return [*Registry.installed().stages.values(), moments, sums, group_moments]

    @hookimpl
    def moefold_models(self) -> dict[str, Path]:
        return dict(Registry.installed().models)


def told(stages: str) -> dict[str, Any]:
    (found,) = methods(load(HEAD + stages, "p.yaml", Registry([("plugin", Plugin(), "plugin")]))).values()
    return found


PAIRS = """\
  - {uses: forward, needs: {text: calibration, experts: EXPERTS}}
  - {uses: observe, needs: {experts: model}}
  - uses: pack.exponent
  - {uses: puzzlemoe, with: {threshold: 0.3}, needs: {experts: model, pairs: pair.random}}
  - {uses: pair.random, with: {seed: 0}}
"""


def test_steps_stand_in_the_order_of_the_work_with_what_is_not_default():
    found = told(PAIRS.replace("EXPERTS", "model"))
    assert [(step["uses"], step["with"]) for step in found["steps"]] == [
        ("pair.random", {}), ("puzzlemoe", {"threshold": 0.3}), ("pack.exponent", {})
    ]  # fmt: skip
    assert found["own"] == ["pair.random", "puzzlemoe", "pack.exponent", "save"]
    assert found["calibration"] == ["calibration", "forward", "observe"]
    assert (found["texts"], found["metrics"], found["baselines"]) == (
        ["calibration"], ["evaluate.perplexity"], ["evaluate.baseline"]
    )  # fmt: skip
    assert found["through"] == []


def test_calibrating_through_compressed_layers_is_told_and_unpacking_for_it_is_no_step():
    found = told(PAIRS.replace("EXPERTS", "unpack.exponent") + "  - uses: unpack.exponent\n")
    assert found["through"] == ["unpack.exponent"]
    assert [step["uses"] for step in found["steps"]] == ["pair.random", "puzzlemoe", "pack.exponent"]
    assert method(found).endswith("-> pack.exponent, calibrated through unpack.exponent")
    assert "unpack.exponent" in found["own"]


def test_a_hybrid_names_both_methods():
    hybrid = PAIRS.replace("EXPERTS", "model").replace("{experts: model", "{experts: average")
    hybrid += "  - {uses: group.random, with: {experts: 8}}\n"
    hybrid += "  - {uses: average, needs: {experts: model, groups: group.random}}\n"
    found = told(hybrid)
    assert method(found) == (
        "group.random(experts=8) -> average -> pair.random -> puzzlemoe(threshold=0.3) -> pack.exponent"
    )
    assert "average" not in found["through"]


def test_a_mix_of_texts_is_one_calibration_text():
    mixed = PAIRS.replace("EXPERTS", "model").replace("{text: calibration,", "{text: mix,")
    mixed += "  - {id: second, uses: text.prose, with: {samples: 2, length: 8}}\n"
    mixed += "  - {id: mix, uses: text.mix, with: {samples: 2}, needs: {texts: [calibration, second]}}\n"
    found = told(mixed)
    assert found["texts"] == ["mix"]
    assert found["calibration"] == ["calibration", "second", "mix", "forward", "observe"]


def test_kinds_of_a_plugin_are_calibration_unless_they_read_what_one_method_chose():
    pairs = PAIRS.replace("EXPERTS", "model").replace("pairs: pair.random", "pairs: group.moments")
    pairs += "  - {uses: group.moments, needs: {moments: made}}\n"
    of_tokens = told(pairs.replace("- {uses: pair.random, with: {seed: 0}}", "- {id: made, uses: moments}"))
    assert "made" in of_tokens["calibration"]
    assert "group.moments" in of_tokens["own"]
    of_pairs = told(pairs + "  - {id: made, uses: sums, needs: {groups: pair.random}}\n")
    assert [step["id"] for step in of_pairs["steps"]][:3] == ["pair.random", "made", "group.moments"]


def test_a_report_counts_weights_and_holds_stored_peaks(tmp_path):
    model = tiny("mixtral", tmp_path / "model")
    session = Session.open("quickstart", str(model), None, None, None, tmp_path / "work", "cpu")
    note = {"seconds": 2.0, "peak_bytes": 5, "peak_device_bytes": 7, "facts": {}}
    times = Times(totals={"forward": (0, 3), "save": (1, 1)})
    found = build(session.plan, {"forward": {"0": note, "1": note | {"peak_device_bytes": 9}}}, times, "cpu")
    assert found["version"] == 2
    assert found["model"] == {
        "name": str(model),
        "fingerprint": Checkpoint.open(str(model)).fingerprint(),
        "expert_weights": 3 * 8 * (2 * 48 * 64 + 64 * 48),
    }
    took = found["stages"]["forward"]
    assert (took["stored_seconds"], took["stored_peak_bytes"], took["stored_peak_device_bytes"]) == (4.0, 5, 9)
    assert list(found["methods"]) == ["save"]
