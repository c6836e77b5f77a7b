"""Plans: which one a shape gets, what a table's file may hold, and what ships."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moefold_kernels.errors import FormatError
from moefold_kernels.triton import configs
from moefold_kernels.triton.configs import SHIPPED, Shape
from moefold_kernels.triton.fitting import fitted
from moefold_kernels.triton.plans import STEP, Plan, Tile, alone, fits, join, leveled_bytes, tile_fits

GPU = torch.device("cuda")
H200 = 232448  # bytes of shared memory of a block
SHAPE = Shape(2048, 768, 128, 8, False, 64)  # 4 entries per expert


def plan(stages: int = 3, **tile) -> Plan:
    """Plans that differ in their stages."""
    one = Tile(
        **{"mode": "pair", "tokens": 16, "extra": 0, "rows": 32, "columns": 64, "warps": 4, "stages": stages} | tile
    )
    return Plan(one, one)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A device called "NVIDIA Test 9", and a folder with `shipped` and the user's cache."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties("NVIDIA Test 9"))
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    forget()
    yield tmp_path
    forget()


def properties(name: str, memory: int = H200, capability: tuple[int, int] = (9, 0), processors: int = 132):
    major, minor = capability
    return SimpleNamespace(
        name=name, shared_memory_per_block_optin=memory, major=major, minor=minor, multi_processor_count=processors
    )


def forget() -> None:
    configs._choose.cache_clear()
    configs._measured.cache_clear()
    configs._shipped.cache_clear()


def ship(folder: Path, plans: dict[Shape, Plan], about=None, device: str = "NVIDIA Test 9") -> None:
    about = {"device": device} | (about or {})
    configs.write_table(
        folder / "shipped" / configs.table_name(device), about, [(s, p, {}) for s, p in plans.items()]
    )  # fmt: skip


def test_a_shape_that_was_measured_gets_its_plan(folder):
    ship(folder, {SHAPE: plan(2), SHAPE._replace(tokens=65): plan(3), SHAPE._replace(hidden=2049): plan(4)})
    assert configs.choose(SHAPE, GPU) == plan(2)
    assert configs.choose(SHAPE._replace(tokens=65), GPU) == plan(3)


def test_others_get_that_of_the_nearest_load(folder):
    """Whatever the sizes are: 4 entries per expert want other tiles than 64."""
    near, far = Shape(4096, 1536, 64, 4, False, 64), SHAPE._replace(tokens=1024)
    ship(folder, {far: plan(2), near: plan(3)})
    assert configs.choose(SHAPE, GPU) == plan(3)
    assert configs.choose(SHAPE._replace(tokens=900), GPU) == plan(2)


def test_of_those_of_the_same_load_the_nearest_sizes(folder):
    ship(folder, {SHAPE._replace(hidden=8192): plan(2), SHAPE._replace(hidden=1024): plan(3)})
    assert configs.choose(SHAPE, GPU) == plan(3)
    assert configs.choose(SHAPE._replace(hidden=7168), GPU) == plan(2)


def test_plans_by_entry_are_for_as_many_tokens_as_they_were_measured_with(folder):
    """And for layers that by_entry.py takes; others get the next."""
    one, several = SHAPE._replace(tokens=1), SHAPE._replace(tokens=16)
    entry = Plan(Tile("entry", 1, 0, 4, 256, 2, 2), Tile("entry", 1, 0, 8, 256, 4, 1))
    ship(folder, {one: entry, several: plan(2)})
    assert configs.choose(one, GPU) == entry
    assert configs.choose(one, GPU, by_entry=False) == plan(2)
    large = SHAPE._replace(experts=512, tokens=2)  # fewer entries an expert than there
    assert large.load < one.load
    assert configs.choose(large, GPU) == plan(2)
    assert configs.choose(large._replace(tokens=1), GPU) == entry


def test_plans_by_entry_of_the_same_choices_and_sizes_come_first(folder):
    """However many experts there are, and whatever has the nearer load; but not for more load than they were for."""
    entry, other = (Plan(Tile("entry", 1, 0, 4, 256, 2, 2), Tile("entry", 1, 0, rows, 256, 4, 1)) for rows in (8, 16))
    sorted_ones = SHAPE._replace(tokens=4)
    own, further = SHAPE._replace(tokens=2), Shape(4096, 4096, 256, 4, False, 2)
    ship(folder, {own: entry, further: other, sorted_ones: plan(2)})
    assert own.top_k != further.top_k
    many = SHAPE._replace(experts=512, tokens=2)
    assert abs(many.load - further.load) < abs(many.load - own.load)
    assert configs.choose(many, GPU) == entry
    assert configs.choose(further._replace(hidden=2048, experts=1024), GPU) == other
    assert configs.choose(SHAPE._replace(experts=SHAPE.top_k, tokens=2), GPU) == plan(2)  # every word is wanted twice


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 2}, "mode entry: write 1 for tokens and group, 1 or 2 for splits, and 0 for extra"),
        ({"splits": 3}, "mode entry"),
        ({"rows": 3}, "rows is 3, and must be a power of two, at least 1"),
        ({"columns": 32}, "columns is 32, and must be a power of two, at least 64"),
        ({"ahead": 3}, "ahead is 3, and must be 0 or a power of two"),
        ({"registers": 100}, "registers is 100"),
    ],
)
def test_tiles_by_entry_that_are_refused(change, said):
    good = {"mode": "entry", "tokens": 1, "extra": 0, "rows": 2, "columns": 256, "warps": 1, "stages": 1}
    tile = Tile(**good)
    with pytest.raises(FormatError, match=said):
        Tile(**good | change)
    with pytest.raises(FormatError, match="by entry are both or neither"):
        Plan(tile, Tile("slot", 16, 0, 32, 64, 4, 3))
    for more in ({"splits": 2}, {"blocks": 2}):
        with pytest.raises(FormatError, match="by entry splits and blocks are of down"):
            Plan(Tile(**good | more), tile)


def test_tiles_by_entry_may_limit_registers_and_ask_for_nothing():
    tile = Tile("entry", 1, 0, 2, 256, 1, 1, ahead=0, registers=128)
    assert str(tile) == "entry 1 2x256 w1 s1 a0 r128"


QWEN, MIXTRAL = Shape(2048, 768, 128, 8, False, 1), Shape(4096, 14336, 8, 2, False, 1)


def cut(mode: str, tokens: int, rows: int, **more) -> Tile:
    return Tile(mode, tokens, 0, rows, 64, 4, 2, **more)


def test_a_plan_of_the_same_shape_stays_as_it_is():
    known = Plan(cut("overlapped", 64, 64, blocks=4), cut("overlapped", 64, 64, splits=4, blocks=4))
    assert fitted(known, QWEN, QWEN, 132) is known
    one = join(Tile("pair", 16, 0, 32, 64, 4, 3, splits=1))
    assert fitted(one, QWEN, MIXTRAL, 132) is one
    entry = Plan(Tile("entry", 1, 0, 2, 512, 1, 2), Tile("entry", 1, 0, 4, 512, 4, 1, splits=2))
    assert fitted(entry, QWEN, Shape(2048, 512, 8, 2, False, 1), 132) is entry


@pytest.mark.parametrize(
    ("known", "shape", "splits"),
    [
        (MIXTRAL._replace(tokens=16), Shape(2048, 4096, 128, 8, False, 128), 1),  # 2048, and 4096 without splits
        (MIXTRAL, QWEN, 1),  # 768 columns are too few for splits
        (MIXTRAL, Shape(4096, 7168, 8, 2, False, 1), 4),  # as many as there
        (MIXTRAL, Shape(4096, 7168, 64, 4, False, 1), 2),  # twice the experts hit
        (MIXTRAL, Shape(2048, 7168, 8, 2, False, 1), 4),  # never more than measured
    ],
)
def test_columns_are_split_where_rows_make_too_few_programs(known, shape, splits):
    plan = Plan(cut("overlapped", 16, 64), cut("overlapped", 16, 64, splits=4))
    found = fitted(plan, known, shape, 132)
    assert found == replace(plan, second=replace(plan.second, splits=splits))


@pytest.mark.parametrize(
    ("shape", "first", "second"),
    [
        (MIXTRAL._replace(tokens=128), 4, 1),  # 1792 programs of gate and up, 512 of down
        (MIXTRAL._replace(tokens=512), 4, 1),  # of two tiles an expert: 1024 of down
        (MIXTRAL._replace(tokens=1024), 4, 2),  # of four: 2048, in 64 blocks of rows, of which 3 are no divisor
        (Shape(2048, 1408, 64, 6, False, 683), 2, 4),  # 22 blocks of rows, of which 4 are no divisor
        (Shape(2048, 1536, 128, 8, False, 1024), 4, 4),
    ],
)
def test_blocks_are_in_turn_where_there_are_programs_enough(shape, first, second):
    """As many as where it was measured, a fourth of 1536 and 4096 here, or four for each of 132 processors."""
    plan = Plan(cut("overlapped", 64, 64, blocks=4), cut("overlapped", 64, 64, blocks=4))
    found = fitted(plan, QWEN._replace(tokens=1024), shape, 132)
    assert (found.first.blocks, found.second.blocks) == (first, second)


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        (QWEN._replace(tokens=3), 4),  # 3072 programs of one block; 528 are enough for 132 processors
        (QWEN._replace(tokens=2), 2),
        (QWEN, 1),
        (QWEN._replace(hidden=7168, top_k=6), 4),
        (QWEN._replace(hidden=2050, tokens=4), 1),  # 1025 blocks of rows, of which 2, 3 and 4 are no divisor
    ],
)
def test_blocks_by_entry_are_in_turn_where_there_are_programs_enough(shape, blocks):
    """Of down, whose programs are of tokens."""
    plan = Plan(Tile("entry", 1, 0, 2, 512, 1, 2), Tile("entry", 1, 0, 2, 256, 2, 1, splits=2, blocks=4))
    found = fitted(plan, QWEN._replace(tokens=4), shape, 132)
    assert found == replace(plan, second=replace(plan.second, blocks=blocks))


def test_the_nearest_plan_is_fitted(folder):
    split = Plan(cut("overlapped", 16, 64), cut("overlapped", 16, 64, splits=4))
    ship(folder, {MIXTRAL: split})
    assert configs.choose(MIXTRAL, GPU) == split
    assert configs.choose(QWEN, GPU) == replace(split, second=replace(split.second, splits=1))


def test_dense_and_packed_are_kept_apart(folder):
    ship(folder, {SHAPE: plan(2), SHAPE._replace(tokens=4096, dense=True): plan(3)})
    assert configs.choose(SHAPE._replace(tokens=4096), GPU) == plan(2)
    assert configs.choose(SHAPE._replace(dense=True), GPU) == plan(3)


@pytest.mark.parametrize("tokens", [1, 64, 256, 4096])
def test_a_device_that_nobody_measured_gets_the_rule(tokens, folder):
    shape = SHAPE._replace(tokens=tokens)
    assert configs.choose(shape, GPU) == configs.rule(shape)
    assert fits(configs.rule(shape), 101376)
    assert "by a rule" in configs.origin(GPU)


def test_a_device_like_a_measured_one_gets_its_plans(folder, monkeypatch):
    """Of the same capability, and of several the one with the nearest number of processors; one's own go first."""
    near = {"capability": [9, 0], "processors": 132}
    ship(folder, {SHAPE: plan(2), SHAPE._replace(tokens=65): plan(9, rows=64)}, near, "NVIDIA Near")
    ship(folder, {SHAPE: plan(3)}, near | {"processors": 78}, "NVIDIA Far")
    ship(folder, {SHAPE: plan(4)}, near | {"capability": [8, 0], "processors": 131}, "NVIDIA Other")
    ship(folder, {SHAPE: plan(5)}, device="NVIDIA Untold")

    def now(*told, **more):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties(*told, **more))
        forget()
        return configs.choose(SHAPE, GPU)

    assert now("NVIDIA Test 9", processors=131) == plan(2)
    told = "shipped; those shipped on NVIDIA Near, of the same compute capability: run `moefold tune` for this one"
    assert configs.origin(GPU) == f"measured: 2 {told}"
    assert now("NVIDIA Test 9", memory=101376) == plan(2)
    assert configs.origin(GPU) == f"measured: 1 {told}"  # the other does not fit
    assert now("NVIDIA Test 9", processors=80) == plan(3)
    assert now("NVIDIA Test 9", capability=(8, 0)) == plan(4)
    assert now("NVIDIA Test 9", capability=(8, 6)) == configs.rule(SHAPE)
    assert "by a rule" in configs.origin(GPU)
    configs.write_table(configs.cache() / configs.table_name("NVIDIA Test 9"), {}, [(SHAPE, plan(6), {})])
    assert now("NVIDIA Test 9") == plan(6)
    assert configs.origin(GPU).startswith("measured: 2 shipped, 1 of your own; those shipped on NVIDIA Near")
    assert now("NVIDIA Far") == plan(3)
    assert configs.origin(GPU) == "measured: 1 shipped"


def test_planes_and_terms_of_a_format_have_to_fit(folder):
    """Which depends on the format: pair8 has planes of twice pair4's size."""
    first = Tile("overlapped_pair", 8, 0, 64, 256, 8, 6, terms=2)
    made, few = Plan(first, replace(first, rows=128)), SHAPE._replace(format="pair4")
    assert leveled_bytes(first, True, "pair4") == 2 * 6 * (128 * 68 + 16 * 256) + 8192
    assert leveled_bytes(first, True, "pair8") == 2 * 6 * (128 * 132 + 16 * 256) + 8192
    assert leveled_bytes(replace(first, columns=128), False, "pair6") == 6 * (64 * 100 + 16 * 256) + 8192
    few_tokens = replace(first, tokens=4)  # down has a factor for each group
    assert leveled_bytes(few_tokens, False, "pair6") == 2 * 6 * (64 * 100 + 8 * 272) + 8192
    assert leveled_bytes(few_tokens, True, "pair6") == 2 * 6 * (128 * 100 + 8 * 256) + 8192
    many = replace(first, tokens=32, stages=2)  # whose tokens have one place
    assert leveled_bytes(many, True, "pair8") == 2 * (2 * 128 * 132 + 64 * 256) + 8192
    assert leveled_bytes(replace(many, splits=2), False, "pair8") == 2 * (2 * 64 * 132 + 64 * 256) + 8192
    assert leveled_bytes(replace(many, columns=128), True, "pair8") == 2 * (128 * 132 + 64 * 256) + 8192
    assert leveled_bytes(replace(first, terms=0, stages=3), False, "pair6") == 3 * (64 * 100 + 16 * 256) + 4096
    apart = Tile("overlapped", 256, 32, 128, 64, 8, 2)  # as compiled for pair8: 181788, and 187772 with blocks in turn
    assert leveled_bytes(apart, False, "pair8") == 2 * (128 * 132 + 288 * 256) + 4096 + 512
    assert leveled_bytes(replace(apart, blocks=4), False, "pair8") == 2 * (128 * 132 + 288 * 256) + 4096 + 512 + 8 * 288
    ship(folder, {few: made})
    assert configs.choose(few, GPU) == made
    assert configs.choose(few._replace(format="pair8"), GPU) == configs.rule(few)
    wide = Tile("overlapped", 256, 32, 64, 64, 8, 3)  # steps of leveled.py have 128 columns, whatever the tile's
    assert tile_fits(replace(wide, stages=2), True, 232448, "pair4")
    assert not tile_fits(wide, True, 232448, "pair4")
    assert not tile_fits(replace(wide, extra=0, stages=5), True, 232448)  # 240 KB of places
    assert tile_fits(replace(wide, extra=0, stages=4), True, 232448)
    places = 2 * (128 + 288) * 64 * 4
    assert tile_fits(replace(apart, stages=4, blocks=2), False, places + 4096 + 512 + 8 * 288)
    assert not tile_fits(replace(apart, stages=4, blocks=2), False, places + 4096 + 512)


def test_plans_that_get_other_kernels_than_they_want_are_named(folder, monkeypatch):
    portability = pytest.importorskip("moefold_kernels.triton.portability", reason="needs triton")
    apart, joined = plan(mode="overlapped_pair"), join(plan().first)
    ship(folder, {SHAPE: joined})
    assert configs.overlapped(GPU) == ""
    ship(folder, {SHAPE._replace(tokens=65): apart, SHAPE._replace(tokens=66): replace(plan(), second=apart.second)})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    plain = "2 of them overlap decoding with products, and get the plain kernels instead: "
    assert configs.overlapped(GPU) == plain + "they are for compute capability 9.0 (Hopper)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(portability, "_no_gluon", lambda: "no Gluon here")
    assert configs.overlapped(GPU) == plain + "no Gluon here"
    monkeypatch.setattr(portability, "_no_gluon", lambda: "")
    assert configs.overlapped(GPU) == "2 of them overlap decoding with products, where sizes are multiples of 128"


def test_one_stream_is_counted_among_them(folder, monkeypatch):
    portability = pytest.importorskip("moefold_kernels.triton.portability", reason="needs triton")
    ship(folder, {SHAPE: join(Tile("streamed", 16, 0, 64, 64, 8, 4))})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(portability, "_no_gluon", lambda: "")
    assert configs.overlapped(GPU) == "1 of them overlap decoding with products, where sizes are multiples of 64"


def test_plans_that_do_not_fit_are_passed_over(folder):
    large = plan(9, rows=128)  # 2 * (256 + 32) * 64 * 9 bytes
    ship(folder, {SHAPE: large, SHAPE._replace(tokens=2): plan(2)})
    assert configs.choose(SHAPE, GPU) == plan(2)
    ship(folder, {SHAPE._replace(tokens=2): large})
    assert configs.choose(SHAPE, GPU) == configs.rule(SHAPE)


def test_the_users_table_goes_first_and_is_seen_at_once(folder):
    ship(folder, {SHAPE: plan(2), SHAPE._replace(tokens=4096): plan(3)})
    assert configs.choose(SHAPE, GPU) == plan(2)
    assert configs.cache() == folder / "xdg" / "moefold" / "tune"
    configs.write_table(configs.cache() / configs.table_name("NVIDIA Test 9"), {}, [(SHAPE, plan(4), {})])
    assert configs.choose(SHAPE, GPU) == plan(4)
    assert configs.choose(SHAPE._replace(tokens=4096), GPU) == plan(3)
    assert configs.origin(GPU) == "measured: 2 shipped, 1 of your own"


def test_the_cache_is_under_home_if_nothing_else_is_said(folder, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(folder))
    assert configs.cache() == folder / ".cache" / "moefold" / "tune"


def test_a_table_is_read_as_it_was_written_and_keeps_what_it_knew(tmp_path):
    path, other = tmp_path / "new" / "t.json", SHAPE._replace(tokens=1, dense=True)
    configs.write_table(
        path, {"device": "one"}, [(SHAPE, plan(2), {"us": 1.5}), (other, plan(3, extra=16), {"us": 2.5})]
    )
    configs.write_table(path, {"device": "two"}, [(other, plan(4), {"us": 3.5})])
    assert configs.read_table(path) == {SHAPE: plan(2), other: plan(4)}
    written = json.loads(path.read_text())
    assert written["about"] == {"device": "two"}
    assert {item["tokens"]: item["us"] for item in written["plans"]} == {64: 1.5, 1: 3.5}
    assert [p.name for p in path.parent.iterdir()] == ["t.json"]


def spoilt(**changes) -> str:
    tile = vars(plan().first) | changes
    return json.dumps({"plans": [SHAPE._asdict() | {"plan": {"first": tile, "second": tile}}]})


@pytest.mark.parametrize(
    "text",
    [
        "", "no JSON", "[]", "{}", '{"plans": [{}]}', '{"plans": 3}', spoilt(mode="pears"), spoilt(tokens=24),
        spoilt(warps="4"), spoilt(speed=3), json.dumps({"plans": [SHAPE._replace(tokens=0)._asdict()]}),
        spoilt().replace('"experts": 128', '"experts": 0'),
    ],
)  # fmt: skip
def test_a_broken_table_is_named(text, folder):
    path = configs.cache() / "nvidia-test-9.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(FormatError, match=rf"{path} is no table of plans .*delete it"):
        configs.choose(SHAPE, GPU)
    with pytest.raises(FormatError, match="nvidia-test-9"):
        configs.write_table(path, {}, [(SHAPE, plan(), {})])
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "both"}, "no mode 'both'; there are: pair, slot"),
        ({"tokens": 8}, "tokens is 8, and must be a power of two, at least 16"),
        ({"extra": 24}, "extra is 24"),
        ({"extra": 8}, "extra is 8, and must be a power of two, at least 16"),
        ({"mode": "streamed", "columns": 64, "extra": 4}, "extra is 4, and must be a power of two, at least 8"),
        ({"rows": 48}, "rows is 48"),
        ({"columns": 0}, "columns is 0"),
        ({"warps": 3}, "warps is 3"),
        ({"ahead": 3}, "ahead is 3"),
        ({"ahead": 0}, "ahead is 0, and must be a power of two, at least 1"),
        ({"stages": 0}, "stages is 0"),
        ({"mode": "overlapped", "stages": 1}, "stages is 1, and must be a whole number, at least 2"),
        ({"group": 0}, "group is 0"),
        ({"splits": 1.5}, "splits is 1.5"),
        ({"terms": 2}, "terms is 2, and must be 0, or 2 in an overlapped mode"),
        (
            {"mode": "overlapped_pair", "extra": 16, "terms": 2},
            r"or 2 in an overlapped mode \(overlapped_pair: nothing",
        ),
        ({"mode": "overlapped", "terms": 1}, "terms is 1"),
        ({"registers": 128}, "registers is 128, and must be 0, or with e4m3 operands or by entry a multiple of 8"),
        ({"mode": "overlapped", "terms": 2, "registers": 132}, "registers is 132"),
        ({"mode": "overlapped", "terms": 2, "registers": 256}, "registers is 256"),
        ({"mode": "overlapped", "terms": 2, "registers": 128.0}, "registers is 128.0"),
        ({"mode": "overlapped", "terms": 2, "tokens": 2}, "tokens is 2, and must be a power of two, at least 4"),
        ({"blocks": 2}, "blocks is 2, and must be 1 but in an overlapped mode with bf16 operands"),
        ({"mode": "overlapped", "terms": 2, "blocks": 2}, "blocks is 2"),
        ({"mode": "overlapped", "blocks": 0}, "blocks is 0, and must be a whole number, at least 1"),
        ({"mode": "overlapped", "tokens": 4}, "tokens is 4, and must be a power of two, at least 8"),
        ({"mode": "streamed", "columns": 32}, "mode streamed: write 64 or 128 for columns, 4 or 8 for warps"),
        ({"mode": "streamed", "columns": 64, "stages": 1}, "stages is 1, and must be a whole number, at least 2"),
        ({"mode": "streamed", "columns": 64, "warps": 2}, "mode streamed: write 64 or 128 for columns"),
        ({"mode": "streamed", "columns": 64, "group": 2}, "and 1 for group"),
        ({"mode": "streamed", "columns": 64, "tokens": "16"}, "tokens is '16', and must be a power of two"),
        ({"mode": "streamed", "columns": 64, "tokens": 128}, "tokens and extra are 128 and 0, and must be no more"),
    ],
)
def test_a_tile_that_no_kernel_takes_cannot_be_made(change, message):
    with pytest.raises(FormatError, match=message):
        replace(plan().first, **change)


def test_what_cannot_be_joined():
    first = plan().first
    assert join(first) == Plan(first, replace(first, rows=64), joined=True)
    for tile in (replace(first, mode="overlapped_pair"), replace(first, splits=2)):
        with pytest.raises(FormatError, match="cannot be joined in one launch"):
            join(tile)
    with pytest.raises(FormatError, match="cannot be joined in one launch"):
        Plan(first, first, joined=True)


def test_one_stream_and_its_projections_apart():
    tile = Tile("streamed", 64, 32, 64, 64, 8, 5)
    plan = join(tile)
    assert tile.paired
    assert not tile.overlapped
    assert str(tile.as_pair(3)) == "pair 64+32 64x64 w8 s3"
    few = Tile("streamed", 32, 8, 64, 128, 8, 4)
    assert str(few.as_pair(4)) == "pair 32+16 64x128 w8 s4"  # which plain Triton can
    assert str(few.unstreamed()) == "overlapped_pair 32+16 32x64 w4 s4"
    separate, narrow = plan.separate(), join(Tile("streamed", 16, 0, 64, 128, 8, 4)).separate()
    assert [str(one) for one in separate.tiles] == [
        "overlapped_pair 64+16 32x64 w4 s4", "overlapped_pair 64+16 64x64 w4 s4",
    ]  # fmt: skip
    assert [str(one) for one in narrow.tiles] == ["pair 16 32x64 w4 s5 a1", "pair 16 64x64 w4 s5 a1"]
    assert not separate.joined
    assert not narrow.joined
    for first, second in ((tile, replace(tile, rows=128)), (replace(tile, mode="pair"), replace(tile, rows=128))):
        with pytest.raises(FormatError, match="mode streamed is for joined plans"):
            Plan(first, second)
    with pytest.raises(FormatError, match="16 rows a warp"):
        join(replace(tile, rows=32))


def test_one_stream_for_sizes_that_are_whole_in_64_columns(folder):
    """gpt-oss has 2880: half as many columns, at twice as many places."""
    ship(folder, {SHAPE: join(Tile("streamed", 16, 0, 64, 128, 8, 4))})
    near = {"hidden": 2880, "inner": 2880}
    assert str(configs.choose(SHAPE._replace(**near), GPU)) == "joined streamed 16 64x64 w8 s8"
    assert str(configs.choose(SHAPE._replace(hidden=4096), GPU)) == "joined streamed 16 64x128 w8 s4"


def test_the_memory_of_one_stream():
    """As compiled for 9.0: 208644 bytes of 64 and 32 entries in five places, 231684 of 32 and 16 in steps of 128."""
    assert fits(join(Tile("streamed", 64, 32, 64, 64, 8, 5)), 232448)
    assert not fits(join(Tile("streamed", 64, 32, 64, 64, 8, 6)), 232448)
    assert not tile_fits(Tile("streamed", 64, 32, 64, 64, 8, 5), True, 208644 - 1)
    wide = Tile("streamed", 32, 16, 64, 128, 8, 4)
    assert tile_fits(wide, True, 4 * 256 * 224 + 896 + 2 * (32 + 16 * 48))
    assert fits(join(wide), 232448)
    assert not tile_fits(wide, True, 231684 - 1)


def test_plans_in_words():
    tile = Tile("slot", 64, 16, 64, 32, 8, 4, group=4, splits=2)
    assert str(join(plan().first)) == "joined pair 16 32x64 w4 s3"
    assert str(Plan(plan().first, tile)) == "pair 16 32x64 w4 s3 / slot 64+16 64x32 w8 s4 g4 k2"
    few = replace(plan(4).first, mode="overlapped", ahead=1, terms=2, registers=128)
    assert str(few) == "overlapped 16 32x64 w4 s4 a1 e4m3 r128"


def test_e4m3_operands_are_for_whole_groups_and_both_projections():
    first = Tile("overlapped", 4, 0, 64, 256, 4, 3, terms=2)
    assert alone(first, second=False) == Plan(first, first)
    wide = replace(first, warps=8)
    assert alone(wide, second=False) == Plan(wide, replace(wide, rows=128))
    assert alone(replace(wide, rows=128, splits=2), second=True).first == replace(wide, rows=128)
    for one, other, said in (
        (first, replace(first, terms=0, tokens=8), "for both or for neither"),
        (replace(first, rows=32), first, "whole groups of 64 rows"),
        (first, replace(first, warps=8), "16 a warp"),
        (replace(first, warps=2), first, "whole groups"),
    ):
        with pytest.raises(FormatError, match=said):
            Plan(one, other)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_what_ships_can_be_run(path):
    """Reading checks each tile; these are the limits that depend on the shape, and on the one device there is."""
    about = json.loads(path.read_text())["about"]
    assert path.name == configs.table_name(about["device"])
    assert len(about["capability"]) == 2
    assert about["processors"] > 0
    for shape, found in configs.read_table(path).items():
        assert fits(found, H200, shape.format), shape
        assert found.first.splits == 1, shape
        if found.joined:
            assert shape.hidden % found.first.columns == 0, shape
            assert shape.inner % found.first.columns == 0, shape
        for tile, length in ((found.first, shape.hidden), (found.second, shape.inner)):
            if tile.mode == "streamed":
                assert not shape.dense
                assert shape.format == "exponent"
            if tile.overlapped:
                assert not shape.dense
                assert tile.splits == 1 or shape.format != "exponent"  # leveled.py has splits
                assert tile.warps in (4, 8, 16)
                whole = max(tile.columns, STEP) if shape.format != "exponent" else 2 * tile.columns
                assert length % whole == 0, f"{shape}: {tile} would fall back"


def test_tables_are_in_the_wheel():
    builders = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling")
    builder = builders.WheelBuilder(str(Path(__file__).parents[2]))
    packed = {file.distribution_path for file in builder.recurse_included_files()}
    tables = {f"moefold_kernels/triton/tables/{path.name}" for path in SHIPPED.glob("*.json")}
    assert tables
    assert tables <= packed
