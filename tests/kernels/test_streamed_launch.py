"""How a stream's items are shared among its programs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from layers import batch, operands, random_layer  # noqa: E402

from moefold_kernels.triton import layer as kernels  # noqa: E402
from moefold_kernels.triton import streamed_launch  # noqa: E402
from moefold_kernels.triton.operands import weights as weights_of  # noqa: E402
from moefold_kernels.triton.plans import Tile, join  # noqa: E402

DEEPSEEK = 132, 32, (22, 16), (16, 11)


def test_some_programs_go_on_to_down_early_where_all_then_end_together():
    """704 items of 16 steps and 512 of 11 are 128 steps a program: 135 where each takes what is next."""
    few, most = streamed_launch.early(*DEEPSEEK)
    assert (few, most) == streamed_launch.early.__wrapped__(*DEEPSEEK)  # however often it is asked
    assert 0 < few < 66
    assert 128 <= streamed_launch.ends(*DEEPSEEK, (few, most)) < 0.98 * streamed_launch.ends(*DEEPSEEK, (0, 0))


@pytest.mark.parametrize(
    ("programs", "n_tiles", "of_tile", "steps"),
    [
        (132, 4, (4, 8), (7, 4)),  # fewer items than programs
        (132, 12, (22, 16), (16, 11)),  # two rounds: nobody may go early
        (132, 128, (32, 56), (56, 16)),  # so many that one more does not matter
        (132, 66, (4, 2), (8, 8)),  # two items and one of a tile's for each program, all alike
    ],
)
def test_all_take_what_comes_next_where_that_is_as_good(programs, n_tiles, of_tile, steps):
    assert streamed_launch.early(programs, n_tiles, of_tile, steps) == (0, 0)


def test_without_draws_items_are_shared_as_reckoned(monkeypatch):
    """16 items of 5 steps and 8 of 2 for three programs: 32 steps each, if one takes a short one early; else one 33."""
    monkeypatch.setattr(streamed_launch, "SPREAD", 0.0)
    assert streamed_launch.ends(3, 8, (2, 1), (5, 2), (0, 0)) == pytest.approx(33)
    assert streamed_launch.ends(3, 8, (2, 1), (5, 2), (1, 1)) == pytest.approx(32)
    monkeypatch.setattr(streamed_launch, "MARGIN", 6)  # of 18 items: never
    assert streamed_launch.ends(3, 8, (2, 1), (5, 2), (1, 1)) == pytest.approx(33)


@pytest.mark.parametrize(("entries", "units", "wanted"), [(384, 32, 32), (96, 32, 30), (1, 32, 1), (32, 4, 4)])
def test_tiles_that_are_likely(entries, units, wanted):
    assert streamed_launch.tiles(entries, units) == wanted


@pytest.mark.parametrize(("row", "file", "extra"), [(128, "streamed", 8), (136, "streamed", 8), (132, "joined", 16)])
def test_what_is_launched_where_a_layer_can_be_one_stream_and_where_not(row, file, extra, launched):
    """Tokens' rows are copied by 16 bytes, or not at all; tables are cut for the kernel that takes the layer."""
    made = weights_of(operands(random_layer(6, 128, 128)))
    _, index, weights = batch(20, 128, 2, 6)
    x = torch.zeros(20, row, dtype=torch.bfloat16)[:, :128]
    kernels.forward(made, x, index, weights, plan=join(Tile("streamed", 32, 8, 64, 64, 8, 4)))
    route, project, _ = launched
    assert project[:2] == ("project", f"moefold_kernels.triton.{file}")
    assert project[-1]["EXTRA"] == extra
    assert route[-1]["TOKENS1"] == 32 + extra
    assert route[-1]["ITEMS"] is (file == "streamed")
