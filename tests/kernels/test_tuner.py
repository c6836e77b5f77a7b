"""Tuning with pretended times: the fastest right plan is found, and what is broken is named and never chosen."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
from moefold_kernels import errors, layout_pairs
from moefold_kernels.bench import Shape
from moefold_kernels.triton import compilation, configs, layer, portability, search, tune
from moefold_kernels.triton.candidates import Room, by_entry, candidates, streamed
from moefold_kernels.triton.compilation import Compiler, Job
from moefold_kernels.triton.plans import Plan, Tile, alone, fits, join, leveled_bytes, tile_fits

FOREVER = float("inf")
SMALL = Shape("small", experts=4, hidden=32, inner=48, top_k=2)
TILES = [Tile("pair", 16, 0, 32, 32, 4, stages) for stages in (2, 3, 4, 5)]
OLD = Plan(TILES[0], TILES[0])
BEST = Plan(TILES[2], TILES[3])


class Pretended:
    """Times by what `cost` says of a plan; the first projection's best is TILES[2], the second's TILES[3]."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.parts: list[str] = []

    def cost(self, plan: Plan, part: str) -> float:
        first, second = abs(plan.first.stages - 4), abs(plan.second.stages - 5)
        return 10.0 + {"first": first, "second": second, "whole": first + second}[part]

    def __call__(self, plan, part, call, inputs):
        self.clock += 1
        self.parts.append(part)
        return lambda: self.cost(plan, part) * 1e-6


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Four tiles to try, the first of which the shape has now, and a clock that each timing advances by a second."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(search, "candidates", lambda shape, room, before: (TILES, TILES))
    monkeypatch.setattr(configs, "choose", lambda shape, device: OLD)
    monkeypatch.setattr(search, "_batches", lambda tokens: 2)
    monkeypatch.setattr(tune.ceilings, "measure", lambda device: SimpleNamespace(read_bandwidth=1e12))
    timer = Pretended()
    for module in (search, tune):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: timer.clock))
    return timer


@pytest.fixture
def unchecked(monkeypatch):
    """Results are taken for right: interpreting takes a second."""
    monkeypatch.setattr(search.Search, "_error", lambda self, plan: 0.001)


def tuned(timer, device, tokens=(4,), **options):
    return list(tune.Tuner(SMALL, device, workers=0, timer=timer, **options).run(tokens))


@pytest.mark.parametrize("dense", [False, True])
def test_the_fastest_is_found_and_checked(dense, few, device):
    (found,) = tuned(few, device, dense=dense)
    plan = replace(found.plan, first=replace(found.plan.first, ahead=4), second=replace(found.plan.second, ahead=4))
    assert plan == BEST
    assert (found.before, found.seconds, found.seconds_before) == (OLD, pytest.approx(10e-6), pytest.approx(15e-6))
    assert found.shape == configs.Shape(32, 48, 4, 2, dense, 4)
    assert 0 < found.error < 2e-2
    assert (found.tried, found.late, found.rejected) == (8, 0, {})
    assert 2 * SMALL.unit_bytes / (1 if dense else 2) <= found.read <= 4 * SMALL.unit_bytes
    assert tune.entry(found) == (found.shape, found.plan, {"us": 10.0})
    assert few.parts[:9] == ["first"] * 4 + ["second"] * 4 + ["whole"]


@pytest.mark.parametrize("dense", [False, True])
def test_one_launch_for_both_projections_is_tried(dense, few, device):
    """Joined plans are timed whole, and only where the layer allows them (SMALL's sizes do not)."""
    apart = few.cost
    few.cost = lambda plan, part: 5.0 + abs(plan.first.stages - 3) if plan.joined else apart(plan, part)
    wide = replace(SMALL, inner=64)
    (found,) = tune.Tuner(wide, device, dense=dense, workers=0, timer=few).run([4])
    assert replace(found.plan.first, ahead=4) == TILES[1]
    assert found.plan == join(found.plan.first)
    assert (found.seconds, found.rejected) == (pytest.approx(5e-6), {})
    assert 0 < found.error < 2e-2


def test_the_plan_before_stays_unless_another_is_faster(few, device, unchecked):
    few.cost = lambda plan, part: 10.0
    (found,) = tuned(few, device)
    assert found.plan == OLD
    assert found.seconds == found.seconds_before


def test_a_plan_that_is_wrong_is_named_and_never_chosen(few, device, monkeypatch):
    right = layer.forward

    def sometimes_wrong(*arguments, plan):
        out = right(*arguments, plan=plan)
        return out * 1.5 if replace(plan.first, ahead=4) == BEST.first else out

    monkeypatch.setattr(layer, "forward", sometimes_wrong)
    (found,) = tuned(few, device)
    assert replace(found.plan.first, ahead=4) in (TILES[1], TILES[3])
    wrong = [plan for plan, why in found.rejected.items() if "the output is off float64 by" in why]
    assert wrong
    assert all(plan.startswith(str(BEST.first)) for plan in wrong)
    assert device.type == "cuda" or str(BEST) in wrong


def test_the_plan_before_may_be_the_wrong_one(few, device, monkeypatch):
    right = layer.forward
    wrong = lambda *arguments, plan: right(*arguments, plan=plan) * (2 if plan == OLD else 1)  # noqa: E731
    monkeypatch.setattr(layer, "forward", wrong)
    (found,) = tuned(few, device)
    assert found.plan.second == BEST.second
    assert found.seconds_before is None
    assert list(found.rejected) == [str(OLD)]


def test_nothing_right_is_an_error_with_reasons(few, device, monkeypatch):
    monkeypatch.setattr(layer, "forward", lambda weights, hidden, *_, plan: torch.zeros_like(hidden))
    with pytest.raises(errors.WrongResultError, match=r"small, 4 tokens: no plan is right .*off float64 by 1"):
        tuned(few, device)


def test_a_tile_that_cannot_be_run_is_named_and_never_chosen(few, device, unchecked):
    class Broken(Pretended):
        def __call__(self, plan, part, call, inputs):
            if plan.first == TILES[2]:
                raise RuntimeError("out of resource: shared memory\nand more")
            return super().__call__(plan, part, call, inputs)

    (found,) = tuned(Broken(), device)
    assert found.plan.first in (TILES[1], TILES[3])
    assert found.rejected["gate and up " + str(TILES[2])] == "RuntimeError: out of resource: shared memory"


def test_time_that_is_over_leaves_out_tiles_and_then_numbers_of_tokens(few, device, unchecked):
    found = tuned(few, device, tokens=(4, 5), seconds=200)
    assert [one.shape.tokens for one in found] == [4, 5]
    few.clock = 0.0
    (found,) = tuned(few, device, tokens=(4, 5), seconds=7)  # 4 of the first's tiles, 3 of the second's
    assert (found.shape.tokens, found.tried, found.late) == (4, 7, 1)
    assert found.plan.second.stages == 4
    few.clock = 0.0
    assert tuned(few, device, tokens=(4, 5), seconds=5) == []  # of the second, the old one only
    assert tuned(few, device, seconds=0) == []


def test_where_nothing_can_be_measured(few):
    with pytest.raises(errors.BenchmarkError, match="cannot tune on meta: meta tensors hold no values"):
        tuned(few, torch.device("meta"))


def test_too_little_memory_is_said(few, device, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(tune, "random_experts", no_memory)
    with pytest.raises(errors.BenchmarkError, match="small and what is made around it do not fit the free memory"):
        tuned(few, device)


def job(part="whole", plan=OLD, device="cpu", **changes) -> Job:
    return Job(SMALL, False, 4, plan, part, str(device))._replace(**changes)


def test_processes_compile_and_say_why_not(device):
    """What is not a plan at all stands for what the compiler refuses."""
    jobs, seen = [job("first", device=device), job("second", plan=None, device=device), job(device=device)], []
    with Compiler(1) as compiler:
        able, refused = compiler.compile(jobs, FOREVER, lambda *progress: seen.append(progress))
        assert able == [jobs[0], jobs[2]]
        assert "AttributeError" in refused[jobs[1]]
        assert seen == [(1, 3), (2, 3), (3, 3)]
        assert compiler.compile(jobs, 0.0, lambda *_: None) == ([], {})  # no time


def die(_job):
    os._exit(1)


def test_a_process_that_dies_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(compilation, "build", die)
    with Compiler(1) as compiler, pytest.raises(errors.BenchmarkError, match="give --workers a smaller number"):
        compiler.compile([job()], FOREVER, lambda *_: None)


SPECIAL = ("capacity", "units")
"""What the kernels are told not to specialise on, and depends on the routing."""


def seen_by(kernel, monkeypatch, run):
    """What Triton would specialise on in a launch: types, divisibility, alignment, and constants."""
    launches = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *arguments, **named: launches.append(
                [special(a) for a in arguments] + [(k, special(v)) for k, v in named.items() if k not in SPECIAL]
            )

    with monkeypatch.context() as patch:
        module, name = kernel.split(".")
        patch.setattr(getattr(layer, module), name, Launch())
        run()
    return launches


def special(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "float"
    if isinstance(value, int) and not isinstance(value, bool) and value > 64:  # smaller ones are constants here
        return "int", value % 16 == 0, value < 2**31
    return ("int", True, True) if value == 0 and not isinstance(value, bool) else value


@pytest.mark.filterwarnings("ignore:.*encountered in reduce")  # what no tile computed is summed all the same
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tokens", [4, 7])
@pytest.mark.parametrize(
    ("kernel", "part"),
    [("project.project_in", "first"), ("project.project_out", "second"), ("joined.project", "whole")],
)
def test_what_is_compiled_ahead_is_what_is_run(kernel, part, tokens, dense, monkeypatch, device):
    """Else every candidate would be compiled again, one after another, where it is timed."""
    plan = Plan(replace(TILES[1], group=4), replace(TILES[2], splits=2))
    plan = join(plan.first) if part == "whole" else plan
    shape = Shape("wide", 4, 128, 160, 2)
    experts, weights = tune._layer(shape, dense, torch.Generator(device).manual_seed(0))
    ground = search.Ground(
        shape, device, dense, experts, weights, Compiler(0), Pretended(), lambda *_: None, FOREVER
    )  # fmt: skip
    one = search.Search(ground, tokens)
    real = seen_by(kernel, monkeypatch, lambda: one._call(plan, part)(one._work(plan)[0]))
    wanted = Job(shape, dense, tokens, plan, part, str(device))
    ahead = seen_by(kernel, monkeypatch, lambda: compilation._run(wanted))
    assert len(real) == 1
    assert ahead == real


@pytest.mark.filterwarnings("ignore:.*encountered in reduce")
@pytest.mark.parametrize("kernel", ["project.project_in", "project.project_out"])
def test_so_it_is_where_a_layer_is_run_by_other_kernels_than_its_plan_says(kernel, monkeypatch, device):
    """Few bits of 320 columns, which are no whole steps, with a plan for e4m3 operands."""
    shape, tokens = Shape("between", 4, 128, 320, 2), 3
    plan = Plan(Tile("overlapped", 4, 0, 64, 256, 8, 2, terms=2), Tile("overlapped_pair", 4, 0, 64, 256, 4, 2, terms=2))
    weights = compilation._stand_in(shape, False, "pair6", str(device))
    x = torch.zeros(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
    index = torch.zeros(tokens, shape.top_k, dtype=torch.int64, device=device)
    gates = torch.zeros(tokens, shape.top_k, dtype=torch.bfloat16, device=device)
    real = seen_by(kernel, monkeypatch, lambda: layer.forward(weights, x, index, gates, plan=plan))
    wanted = Job(shape, False, tokens, plan, "whole", str(device), "pair6")
    ahead = seen_by(kernel, monkeypatch, lambda: compilation._run(wanted))
    assert len(real) == 1
    assert ahead == real


ROOMS = {
    "H200": Room(232448, 132, overlap=True),
    "A100": Room(166912, 108, overlap=False),
    "RTX 4060": Room(101376, 24, overlap=False),
}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tokens", tune.TOKENS)
@pytest.mark.parametrize("sizes", [(4096, 14336, 8, 2), (2048, 768, 128, 8), (2048, 1408, 64, 6), (72, 40, 6, 2)])
def test_candidates_suit_the_device(sizes, tokens, dense):
    shape = configs.Shape(*sizes, dense, tokens)
    counts = []
    for room in ROOMS.values():
        before = configs.rule(shape)
        firsts, seconds = candidates(shape, room, before)
        assert (firsts[0], seconds[0]) == (before.first, before.second)
        for tiles, gated, length in ((firsts, True, shape.hidden), (seconds, False, shape.inner)):
            assert len(tiles) == len(set(tiles))
            assert 8 <= len(tiles) <= 130
            assert all(tile_fits(tile, gated, room.memory) for tile in tiles)
            overlapped = [tile for tile in tiles if tile.overlapped]
            assert room.overlap or not overlapped
            assert not (dense and overlapped)
            assert all(length % (2 * tile.columns) == 0 and tile.splits == 1 for tile in overlapped)
        assert all(tile.splits == 1 for tile in firsts)
        counts.append(len(firsts) + len(seconds))
    assert counts[2] < counts[1]


@pytest.mark.parametrize("format", ["exponent", "pair4", "pair8"])
@pytest.mark.parametrize(
    ("hidden", "inner", "above", "tried"),
    [
        (2048, 768, {1, 2, 3, 4}, {1, 2, 4}), (2304, 768, {1, 2, 3, 4}, {1, 2, 3}), (2048, 896, {1, 2}, {1}),
        (2176, 768, {1}, {1}),
    ],
)  # fmt: skip
def test_blocks_in_turn_by_warps_apart_are_tried(hidden, inner, above, tried, format):
    """Where rows and steps are whole; of gate and up in few bits."""
    shape = configs.Shape(hidden, inner, 128, 8, False, 4096, format)
    firsts, seconds = candidates(shape, ROOMS["H200"], configs.rule(shape))
    above = above if format != "exponent" else {1}
    assert {tile.blocks for tile in firsts if tile.tokens == 256 and tile.warps == 8} == above
    assert {tile.blocks for tile in firsts if tile.tokens != 256 or tile.warps != 8} == {1}
    assert {tile.blocks for tile in seconds if tile.tokens == 256 and tile.rows == 128} == tried


@pytest.mark.parametrize("tokens", [512, 1024])
def test_blocks_in_turn_of_pairs_are_tried(tokens):
    """In few bits, where tiles have extra tokens, by as many warps as did well."""
    shape = configs.Shape(2048, 768, 128, 8, False, tokens, "pair8")
    for tiles, warps in zip(candidates(shape, ROOMS["H200"], configs.rule(shape)), (8, 4), strict=True):
        pairs = [tile for tile in tiles if tile.paired and tile.extra and not tile.terms]
        assert {tile.blocks for tile in pairs if (tile.warps, tile.group, tile.rows) == (warps, 1, 64)} >= {
            1,
            2,
            6 if warps == 8 else 8,
        }
        assert {tile.blocks for tile in pairs if tile.warps != warps} == {1}


@pytest.mark.parametrize("format", layout_pairs.MAGNITUDE_BITS)
@pytest.mark.parametrize("tokens", tune.TOKENS)
@pytest.mark.parametrize("sizes", [(4096, 14336, 8, 2), (2048, 768, 128, 8)])
def test_candidates_for_few_bits(sizes, tokens, format):
    """What e4m3.py takes, and leveled.py where entries are many; and elsewhere what project.py does."""
    shape = configs.Shape(*sizes, False, tokens, format)
    sides = candidates(shape, ROOMS["H200"], configs.rule(shape))
    for tiles, gated in zip(sides, (True, False), strict=True):
        assert 8 <= len(tiles) <= 130
        assert all(leveled_bytes(tile, gated, format) <= ROOMS["H200"].memory for tile in tiles)
        assert all(tile.overlapped and tile.rows * (1 + gated) % 64 == 0 for tile in tiles)
        assert any(tile.terms for tile in tiles) == (shape.load <= 110)
        assert all(tile.terms or tile.tokens >= 32 for tile in tiles[1:])
        for tile in tiles:
            alone(tile, second=not gated)  # a plan that can be made
    elsewhere = candidates(shape, ROOMS["A100"], configs.rule(shape))
    assert not any(tile.terms for tiles in elsewhere for tile in tiles)


def test_candidates_for_few_bits_of_odd_sizes():
    """Sizes that are no multiples of 128 run in project.py on Hopper, too."""
    shape = configs.Shape(2880, 2880, 32, 4, False, 64, "pair4")
    sides = candidates(shape, ROOMS["H200"], configs.rule(shape))
    assert not any(tile.overlapped for tiles in sides for tile in tiles[1:])


@pytest.mark.parametrize(
    ("format", "overlap", "tried"), [("exponent", True, 4), ("pair4", True, 0), ("pair4", False, 4)]
)
def test_lines_ahead_are_tried_where_a_kernel_asks_for_some(format, overlap, tried, monkeypatch):
    target = portability.Target(assembly=True, upcast=False, overlap=overlap, chain=True)
    monkeypatch.setattr(portability.Target, "of", classmethod(lambda cls, tensor: target))
    ground = SimpleNamespace(weights=SimpleNamespace(places=torch.empty(0)))
    one = SimpleNamespace(ground=ground, shape=configs.Shape(4096, 14336, 8, 2, False, 1, format))
    assert len(search.Search._ahead(one, OLD)) == tried


@pytest.mark.parametrize(("format", "more"), [("exponent", True), ("pair4", False)])
def test_plans_by_entry_to_try(format, more):
    """All ask for nothing at first; of 16 bits some add choices in two sums, or limit registers."""
    plans = by_entry(configs.Shape(2048, 768, 128, 8, False, 1, format))
    assert len(set(plans)) == len(plans) > 10
    assert not any(tile.ahead for plan in plans for tile in plan.tiles)
    assert any(plan.second.splits == 2 for plan in plans) == any(plan.second.registers for plan in plans) == more
    assert not any(plan.first.registers for plan in plans)
    assert by_entry(configs.Shape(2048, 768, 128, 8, False, 64, format)) == []


@pytest.mark.parametrize(
    ("tokens", "hidden", "format", "tried"),
    [(1, 2048, "exponent", {1}), (2, 2048, "exponent", {1, 2}), (3, 2048, "exponent", {1, 4}),
     (4, 2048, "exponent", {1, 4}), (4, 2050, "exponent", {1}), (4, 2048, "pair4", {1})],
)  # fmt: skip
def test_blocks_by_entry_to_try(tokens, hidden, format, tried):
    """One, or so many that down has about as many programs as of one token, if rows are whole."""
    plans = by_entry(configs.Shape(hidden, 768, 128, 8, False, tokens, format))
    assert {plan.second.blocks for plan in plans} == tried
    assert {plan.first.blocks for plan in plans} == {1}


@pytest.mark.parametrize(("format", "tried"), [("exponent", [1, 2, 4]), ("pair4", [])])
@pytest.mark.parametrize("overlap", [True, False])
def test_lines_ahead_by_entry_are_downs_of_16_bits(format, overlap, tried, monkeypatch):
    target = portability.Target(assembly=True, upcast=False, overlap=overlap, chain=True)
    monkeypatch.setattr(portability.Target, "of", classmethod(lambda cls, tensor: target))
    ground = SimpleNamespace(weights=SimpleNamespace(places=torch.empty(0)))
    one = SimpleNamespace(ground=ground, shape=configs.Shape(4096, 14336, 8, 2, False, 1, format))
    tile = Tile("entry", 1, 0, 2, 256, 1, 1, ahead=0)
    plans = search.Search._ahead(one, Plan(tile, tile))
    assert [plan.second.ahead for plan in plans] == tried
    assert all(plan.first == tile for plan in plans)


def test_columns_are_split_where_processors_wait():
    splits = lambda tokens, room: {t.splits for t in candidates(shape._replace(tokens=tokens), room, OLD)[1]}  # noqa: E731
    shape = configs.Shape(4096, 14336, 8, 2, False, 1)
    assert splits(1, ROOMS["H200"]) == {1, 2, 4}
    assert splits(64, ROOMS["H200"]) == {1}
    shape = configs.Shape(4096, 1024, 8, 2, False, 1)
    assert splits(1, ROOMS["H200"]) == {1, 2}


def test_all_gpus_and_the_interpreter_have_room(device):
    room = Room.of(torch.empty(0, device=device))
    assert room.memory >= 48 * 1024
    assert compilation.workers(SMALL, 4096, torch.device("cpu")) == 0


@pytest.mark.gpu
def test_tuning_on_a_gpu(device, tmp_path, monkeypatch):
    """Processes, graphs and all, with the tiles of a tiny layer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = Shape("small", 8, 256, 128, 2)
    (found,) = tune.Tuner(shape, device, workers=4, seconds=300).run([4])
    assert found.late == 0
    assert found.seconds_before is None or found.seconds <= found.seconds_before
    path = configs.cache() / tune.table_name(device)
    configs.write_table(path, tune.about(device), [tune.entry(found)])
    assert configs.choose(found.shape, device) == found.plan


def test_one_stream_is_tried_where_it_can_be():
    room = Room(232448, 132, overlap=True)
    shape = configs.Shape(2048, 1408, 64, 6, False, 128)
    tried = streamed(shape, room)
    assert {(plan.first.mode, plan.first.rows, plan.first.columns) for plan in tried} == {
        ("streamed", 64, 64), ("streamed", 64, 128),
    }  # fmt: skip
    assert {(plan.first.tokens, plan.first.extra) for plan in tried} == {(32, 0), (32, 8), (16, 16)}
    assert all(plan.joined and fits(plan, room.memory) for plan in tried)
    assert {plan.first.columns for plan in streamed(shape._replace(inner=1408 - 64), room)} == {64}
    for change in ({"dense": True}, {"format": "pair8"}, {"tokens": 4}, {"tokens": 4096}, {"inner": 1400}):
        assert not streamed(shape._replace(**change), room)
    assert not streamed(shape, room._replace(overlap=False))


def test_one_stream_is_timed_and_chosen(few, device, monkeypatch, unchecked):
    """Whole, beside the other plans, where the layer can be one stream."""
    monkeypatch.setattr(search.Room, "of", lambda places: Room(232448, 132, overlap=True))
    few.cost = lambda plan, part: 5.0 if plan.first.mode == "streamed" else 10.0
    for inner, chosen in ((64, True), (48, False)):
        (found,) = tune.Tuner(replace(SMALL, hidden=64, inner=inner), device, workers=0, timer=few).run([8])
        assert (found.plan.first.mode == "streamed") == chosen
        assert found.plan.joined == chosen
