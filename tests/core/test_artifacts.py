"""Artifacts: saved whole, read back equal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from moefold import Activity, Experts, Groups, PairMerge, Routed, Saved
from moefold.errors import StoreError
from moefold.replacements import Packed


def experts(gated: bool = True) -> Experts:
    return Experts(torch.arange(3 * 8 * 5.0).view(3, 8, 5).bfloat16(), torch.randn(3, 5, 4), gated=gated)


def test_round_trip_of_tensors_dicts_and_json(tmp_path: Path):
    packed = Packed(
        "exponent",
        [[0, 2]],
        [1],
        {"gate_proj": torch.randint(-9, 9, (1, 4, 5), dtype=torch.int16)},
        {},
        {"gate_proj": 120},
        {"weights": 20},
    )
    packed.save(tmp_path / "a")
    back = Packed.load(tmp_path / "a")
    assert torch.equal(back.words["gate_proj"], packed.words["gate_proj"])
    assert (back.format, back.pairs, back.dense, back.experts) == ("exponent", [[0, 2]], [1], {})
    assert (back.settings, back.counts) == (packed.settings, packed.counts)


def test_optional_tensors_and_views(tmp_path: Path):
    one = experts()
    one.save(tmp_path / "a")
    back = Experts.load(tmp_path / "a")
    assert back.gate_up.dtype == torch.bfloat16
    assert torch.equal(back.gate_up, one.gate_up)
    assert back.gate_up_bias is None
    Routed(torch.randn(2, 3, 4)[:, :, :2], torch.randn(4, 6).T, torch.ones(6, 2).long(), torch.ones(6, 2)).save(
        tmp_path / "b"
    )
    assert Routed.load(tmp_path / "b").tokens.shape == (6, 4)


def test_matrices_are_views_in_standard_names():
    one = experts()
    matrices = one.matrices()
    assert list(matrices) == ["gate_proj", "up_proj", "down_proj"]
    assert torch.equal(torch.cat([matrices["gate_proj"], matrices["up_proj"]], 1), one.gate_up)
    assert matrices["up_proj"].untyped_storage().data_ptr() == one.gate_up.untyped_storage().data_ptr()
    assert list(experts(gated=False).matrices()) == ["up_proj", "down_proj"]


def test_the_wrong_kind_is_refused(tmp_path: Path):
    Groups([[0, 1]], []).save(tmp_path / "a")
    with pytest.raises(StoreError, match="does not hold a Routed"):
        Routed.load(tmp_path / "a")


def test_a_recipe_cannot_be_stored(tmp_path: Path):
    with pytest.raises(StoreError, match="neither tensor nor JSON"):
        PairMerge(experts(), [], [], lambda m, p: None).save(tmp_path / "a")  # type: ignore[arg-type, return-value]


def test_saved_knows_when_its_files_changed(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"12345")
    saved = Saved.of(tmp_path, str(tmp_path), {}, leave_out="y")
    assert saved.files["x"][0] == 5
    assert saved.intact()
    (tmp_path / "y").write_bytes(b"the card may change")
    assert saved.intact()
    os.utime(tmp_path / "x", ns=(1, 1))  # the same size, written again
    assert not saved.intact()
    (tmp_path / "x").unlink()
    assert not saved.intact()


def test_activity_norm_by_matrix():
    activity = Activity(torch.tensor([3, 0]), torch.ones(2, 5), torch.zeros(2, 4), 3, 1, [1])
    assert activity.norm("up_proj", 0).tolist() == [1.0] * 5
    assert activity.norm("down_proj", 1).tolist() == [0.0] * 4
    assert activity.facts()["starved"] == [1]
