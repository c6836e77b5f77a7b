"""The whole layer by the kernels against the definition, over awkward shapes, batches and ways to cut it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import assert_near, batch, clamped_gate, expected, operands, random_layer

from moefold_kernels import reference
from moefold_kernels.activation import silu

ops = pytest.importorskip("moefold_kernels.triton.ops", reason="needs triton")
from moefold_kernels.triton import layer as kernels  # noqa: E402
from moefold_kernels.triton.operands import weights as weights_of  # noqa: E402
from moefold_kernels.triton.plans import Plan, Tile, join  # noqa: E402

SMALL = {"rows": 32, "columns": 32, "warps": 4, "stages": 2}
PLANS = {
    "pair": Plan(Tile("pair", 16, 0, **SMALL), Tile("pair", 16, 0, **SMALL)),
    "slot": Plan(Tile("slot", 16, 0, **SMALL), Tile("slot", 16, 0, **SMALL)),
    "extra": Plan(Tile("pair", 32, 16, **SMALL), Tile("pair", 32, 16, **SMALL)),
    "slot, extra, groups": Plan(Tile("slot", 16, 16, **SMALL, group=2), Tile("slot", 16, 16, **SMALL, group=4)),
    "splits": Plan(Tile("pair", 16, 0, **SMALL), Tile("slot", 32, 0, 32, 16, 4, 2, group=2, splits=3)),
    "entry": Plan(Tile("entry", 1, 0, 16, 64, 4, 1), Tile("entry", 1, 0, 32, 64, 4, 1)),
    "entry, places": Plan(Tile("entry", 1, 0, 32, 64, 4, 2), Tile("entry", 1, 0, 16, 64, 4, 3, splits=2)),
    "entry, blocks in turn": Plan(Tile("entry", 1, 0, 4, 64, 1, 1), Tile("entry", 1, 0, 4, 64, 1, 1, blocks=17)),
    "entry, blocks in turn, places": Plan(
        Tile("entry", 1, 0, 4, 64, 1, 2), Tile("entry", 1, 0, 2, 64, 1, 2, splits=2, blocks=2)
    ),
    "joined": join(Tile("pair", 16, 0, 16, 32, 4, 2)),
    "joined, slot, extra, groups": join(Tile("slot", 16, 16, 32, 16, 4, 2, group=2)),
    "joined, a stream where none can be": join(Tile("streamed", 16, 8, 64, 64, 4, 2)),
}
JOINED = [name for name in PLANS if name.startswith("joined")]


def overlapped(
    mode: str, tokens: int, extra: int, places: int, columns: int = 64, warps: int = 4, blocks: int = 1
) -> Plan:
    """A plan for overlapped.py, overlapped_apart.py or overlapped_pair.py."""
    first, second = ((rows, columns, warps, places) for rows in (8 * warps, 16 * warps))
    return Plan(Tile(mode, tokens, extra, *first), Tile(mode, tokens, extra, *second, blocks=blocks))


HOPPERS = {
    "pair 16 and 16, two places": overlapped("overlapped_pair", 16, 16, 2),
    "pair 32, three places": overlapped("overlapped_pair", 32, 0, 3),
    "pair 8, six places": overlapped("overlapped_pair", 8, 0, 6),
    "slot 64 and 16, four places": overlapped("overlapped", 64, 16, 4),
    "slot 16, two places": overlapped("overlapped", 16, 0, 2),
    "slot 32 and 32, eight places": overlapped("overlapped", 32, 32, 8, columns=32),
    "slot 128 and 32, eight warps": overlapped("overlapped", 128, 32, 3, warps=8),
    "slot 256 and 32, warps apart": overlapped("overlapped", 256, 32, 3, warps=8),
    "slot 256, warps apart": overlapped("overlapped", 256, 0, 4, warps=8),
    "slot 256 and 32, warps apart, blocks in turn": overlapped("overlapped", 256, 32, 3, warps=8, blocks=5),
    "slot 256, warps apart, blocks in turn": overlapped("overlapped", 256, 0, 4, warps=8, blocks=2),
    "slot 256, warps apart, no whole blocks": overlapped("overlapped", 256, 0, 4, warps=8, blocks=3),
}


STREAMS = {
    "16, nine places": join(Tile("streamed", 16, 0, 64, 64, 8, 9)),
    "16 and 16, six places": join(Tile("streamed", 16, 16, 64, 64, 8, 6)),
    "32, 128 columns": join(Tile("streamed", 32, 0, 64, 128, 8, 3)),
    "16 and 16, 128 columns": join(Tile("streamed", 16, 16, 64, 128, 8, 3)),
    "32 and 8, 128 columns": join(Tile("streamed", 32, 8, 64, 128, 8, 4)),
    "32 and 16, 128 columns": join(Tile("streamed", 32, 16, 64, 128, 8, 4)),
    "64 and 16, five places": join(Tile("streamed", 64, 16, 64, 64, 8, 5)),
    "64 and 32, four places": join(Tile("streamed", 64, 32, 64, 64, 8, 4)),
    "16, four warps": join(Tile("streamed", 16, 0, 32, 64, 4, 4)),
    "16, large blocks": join(Tile("streamed", 16, 0, 128, 64, 8, 4)),
}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody writes holds NaN, and the largest integers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def run(layer, x, index, weights, device, *, activation=None, dtype=torch.float32, plan=None, interleaved=False):
    """The layer on the device, with the plan that a test wants."""
    made = weights_of(operands(layer.to(device), interleaved=interleaved))
    arguments = (t.to(device) for t in (x, index, weights))
    return kernels.forward(made, *arguments, activation or kernels.SILU, dtype, plan or PLANS["pair"])


EVEN, ODD, PRIME = (8, 64, 32, 0, 2), (9, 72, 40, 1, 3), (6, 33, 17, 2, 6)
"""Experts, hidden, inner, experts alone, top-k."""


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("experts", "hidden", "inner", "alone", "top_k"), [ODD, PRIME])
def test_shapes(experts, hidden, inner, alone, top_k, plan, device):
    layer = random_layer(experts, hidden, inner, alone)
    arguments = batch(9, hidden, top_k, experts)
    assert_near(run(layer, *arguments, device, plan=PLANS[plan]), reference.experts(layer.packed, *arguments, silu))


@pytest.mark.parametrize("plan", ["pair", "splits"])
def test_sizes_that_are_whole_blocks(plan, device):
    experts, hidden, inner, alone, top_k = EVEN
    layer = random_layer(experts, hidden, inner, alone)
    arguments = batch(9, hidden, top_k, experts)
    assert_near(run(layer, *arguments, device, plan=PLANS[plan]), expected(layer, *arguments))


@pytest.mark.parametrize("plan", ["pair", "slot", "entry"])
@pytest.mark.parametrize(("tokens", "skew"), [(1, 0.0), (2, 9.0), (40, 9.0)])
def test_batches(tokens, skew, plan, device):
    layer = random_layer(7, 40, 24, 1)
    arguments = batch(tokens, 40, 2, 7, skew=skew, seed=tokens)
    assert_near(run(layer, *arguments, device, plan=PLANS[plan]), expected(layer, *arguments))


@pytest.mark.parametrize("plan", JOINED)
@pytest.mark.parametrize("alone", [0, 6])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_both_projections_in_one_launch(tokens, biased, alone, plan, device, monkeypatch):
    monkeypatch.delattr(kernels, "gate_up")
    layer = random_layer(6, 64, 128, alone, biased=biased)
    arguments = batch(tokens, 64, 2, 6, skew=9.0 * (tokens > 1))
    activation = kernels.Activation("clamped", 1.5, 1.702) if biased else kernels.SILU
    found = run(layer, *arguments, device, activation=activation, plan=PLANS[plan])
    assert_near(found, expected(layer, *arguments, clamped_gate if biased else silu))


@pytest.mark.parametrize("alone", [0, 1, 6])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("plan", [name for name in PLANS if name.startswith("entry")])
def test_each_entry_by_itself(plan, biased, alone, device, monkeypatch):
    """Nothing is sorted; pairs, experts alone, and both."""
    monkeypatch.delattr(kernels, "route_for")
    layer = random_layer(6 + alone % 2, 68, 36, alone, biased=biased)
    arguments = batch(3, 68, 3, 6 + alone % 2)
    activation = kernels.Activation("clamped", 1.5, 1.702) if biased else kernels.SILU
    found = run(layer, *arguments, device, activation=activation, plan=PLANS[plan])
    assert_near(found, expected(layer, *arguments, clamped_gate if biased else silu))


@pytest.mark.parametrize("alone", [0, 6])
@pytest.mark.parametrize(("places", "splits"), [(1, 1), (2, 2)])
def test_blocks_of_several_steps_in_turn_entry_by_entry(places, splits, alone, device):
    """Two programs of down for a token, each of three blocks of five steps, the last of which is not whole."""
    layer = random_layer(6, 24, 4 * 64 + 34, alone)
    arguments = batch(2, 24, 3, 6)
    plan = replace(PLANS["entry"], second=Tile("entry", 1, 0, 4, 64, 1, places, splits=splits, blocks=3))
    assert_near(run(layer, *arguments, device, plan=plan), expected(layer, *arguments))


@pytest.mark.parametrize(("hidden", "inner"), [(132, 36), (68, 68)])
def test_no_axis_of_a_grid_by_entry_is_too_long(hidden, inner, device, monkeypatch):
    """Five blocks of rows: of down, or of gate and up."""
    made = weights_of(operands(random_layer(4, hidden, inner).to(device)))
    for most, answer in ((5, True), (4, False)):
        monkeypatch.setattr(kernels.by_entry_launch, "MOST", most)
        assert kernels.by_entry_launch.takes(made, PLANS["entry"], 1, 2) is answer


@pytest.mark.parametrize(
    ("hidden", "inner", "top_k", "gated"),
    [(67, 36, 3, True), (68, 35, 3, True), (68, 36, 9, True), (68, 36, 3, False)],
)
def test_what_cannot_go_entry_by_entry_is_sorted(hidden, inner, top_k, gated, device):
    takes = kernels.by_entry_launch.takes
    layer = random_layer(18, hidden, inner, gated=gated)
    made = weights_of(operands(layer.to(device)))
    assert not takes(made, PLANS["entry"], 2, top_k)
    assert takes(weights_of(operands(random_layer(4, 68, 36).to(device))), PLANS["entry"], 2, 3)
    if gated:  # else nothing that kernels compute lies between the projections
        arguments = batch(2, hidden, top_k, 18)
        assert_near(run(layer, *arguments, device, plan=PLANS["entry"]), expected(layer, *arguments))


def test_words_that_are_not_two_an_integer_are_sorted(device):
    """Rows an odd number of words apart, or beginning at one."""
    made = weights_of(operands(random_layer(4, 68, 36).to(device)))
    packed = made.packed
    wide = torch.zeros(*packed.down.shape[:2], 37, dtype=torch.int16, device=device)
    even = torch.zeros(*packed.down.shape[:2], 38, dtype=torch.int16, device=device)
    for down, answer in ((wide[..., :36], False), (even[..., :36], True), (even[..., 1:37], False)):
        changed = replace(made, packed=packed._replace(down=down))
        assert kernels.by_entry_launch.takes(changed, PLANS["entry"], 1, 2) is answer


def test_no_token(device):
    for name, plan in PLANS.items():
        found = run(random_layer(5, 40, 24, 1), *batch(0, 40, 2, 5), device, plan=plan)
        assert found.shape == (0, 40), name


@pytest.mark.parametrize("plan", ["pair", "slot", "entry"])
def test_experts_that_do_not_exist_add_nothing(plan, device):
    layer = random_layer(5, 40, 24, 1)
    x, index, weights = batch(9, 40, 3, 5)
    index[0], index[1, 0], index[2, 2], index[3, 1] = 5, -1, 2**31 - 1, -(2**31)
    found = run(layer, x, index, weights, device, plan=PLANS[plan])
    assert_near(found, expected(layer, x, index, weights))
    assert not found[0].any()


def test_only_experts_that_do_not_exist(device):
    x, index, weights = batch(3, 40, 2, 6)
    assert not run(random_layer(6, 40, 24), x, index + 6, weights, device).any()


@pytest.mark.parametrize("plan", ["pair", "slot", "entry"])
def test_one_expert_named_twice_by_a_token(plan, device):
    layer = random_layer(4, 40, 24)
    x, _, weights = batch(5, 40, 2, 4)
    index = torch.tensor([[1, 1], [0, 1], [1, 1], [3, 3], [1, 0]])
    assert_near(run(layer, x, index, weights, device, plan=PLANS[plan]), expected(layer, x, index, weights))


@pytest.mark.parametrize("plan", ["pair", "entry"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_what_is_not_contiguous(kind, plan, device):
    layer = random_layer(6, 40, 24)
    x, index, weights = batch(3, 40, 2, 6)
    right = expected(layer, x, index, weights)
    spread = lambda t: torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0]  # noqa: E731  (every other element)
    odd = lambda t: torch.cat([t[:, :1], t, t], dim=1)[:, 1 : 1 + t.shape[1]]  # noqa: E731  (rows begin anywhere)
    for change in (spread, lambda t: t.T.contiguous().T, lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]], odd):
        parts = [change(t.to(device)) for t in (x.bfloat16(), index.to(kind), weights)]
        assert not parts[1].is_contiguous()
        assert_near(run(layer, *parts, device, plan=PLANS[plan]), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype, device):
    layer = random_layer(7, 40, 24, 1)
    x, index, weights = batch(6, 40, 2, 7)
    x, weights = x.to(dtype), weights.to(dtype)
    found = torch.ops.moefold.experts(
        *(t.to(device) for t in (x, index, weights)), *operands(layer.to(device)), "silu", 0.0, 0.0, dtype
    )
    assert found.dtype == dtype
    assert_near(found, expected(layer, x, index, weights))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("plan", ["pair", "slot", "splits", "entry"])
def test_clamped_with_biases(plan, interleaved, device):
    layer = random_layer(7, 40, 24, 1, biased=True)
    arguments = batch(7, 40, 3, 7)
    activation = kernels.Activation("clamped", 1.5, 1.702)
    found = run(layer, *arguments, device, activation=activation, plan=PLANS[plan], interleaved=interleaved)
    assert_near(found, expected(layer, *arguments, clamped_gate))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("plan", ["pair", "slot"])
def test_activations_that_are_not_fused(plan, gated, biased, device):
    layer = random_layer(7, 40, 24, 1, gated=gated, biased=biased)
    arguments = batch(7, 40, 3, 7)
    gate = (lambda gate, up: torch.nn.functional.gelu(gate) * up) if gated else (lambda up: up.relu() ** 2)
    function = lambda rows: gate(*rows.float().chunk(2 if gated else 1, dim=-1))  # noqa: E731
    activation = kernels.Activation("other", function=function)
    found = run(layer, *arguments, device, activation=activation, plan=PLANS[plan])
    assert_near(found, expected(layer, *arguments, gate), fused=False)


def test_the_same_bits_again(device):
    """Sums are in a fixed order."""
    layer = random_layer(8, 40, 24)
    arguments = batch(12, 40, 2, 8)
    first, second = (run(layer, *arguments, device, plan=PLANS["splits"]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("chained", [True, False])
def test_down_may_not_be_chained_to_what_made_its_tables(chained, device, monkeypatch):
    """It reads them before it waits. As the operation of its own it follows them at once."""
    made, (x, index, weights) = weights_of(operands(random_layer(4, 64, 32).to(device))), batch(3, 64, 2, 4)
    index, weights = index.to(device), weights.to(device)
    tables = kernels.route_for(made, index, PLANS["pair"])
    launched = {}
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *given, **options: launched.update({kernel: options}))
    monkeypatch.setattr(kernels.Target, "of", lambda tensor: kernels.Target(False, False, False, chain=True))
    inner = kernels.Inner(x.new_zeros(6, 32, dtype=torch.bfloat16, device=device))
    kernels.down(made, inner, index, weights, tables, PLANS["pair"], torch.float32, chained)
    options = launched[kernels.project.project_out]
    assert options["CHAIN"] is chained
    assert options.get("launch_pdl", False) is chained


def test_the_operation_down_is_not_chained(device, monkeypatch):
    layer, (x, index, weights) = random_layer(4, 64, 32), batch(3, 64, 2, 4)
    asked = []
    right = kernels.down
    monkeypatch.setattr(kernels, "down", lambda *given, chained=True: asked.append(chained) or right(*given, chained))
    rows = x.new_zeros(6, 32).to(device)
    torch.ops.moefold.down(rows, index.to(device), weights.to(device), *operands(layer.to(device)), torch.float32)
    assert asked == [False]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 64, 300, 3000])
@pytest.mark.parametrize("shape", [(8, 1024, 3584, 2), (128, 512, 192, 8), (65, 520, 200, 6)])
def test_compiled_with_the_plans_that_users_get(shape, tokens, device):
    experts, hidden, inner, top_k = shape
    layer = random_layer(experts, hidden, inner, experts % 2)
    for skew in (0.0, 9.0):
        arguments = batch(tokens, hidden, top_k, experts, skew=skew)
        found = torch.ops.moefold.experts(
            *(t.to(device) for t in arguments), *operands(layer.to(device)), "silu", 0.0, 0.0, torch.float32
        )
        assert_near(found, expected(layer, *arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", HOPPERS)
def test_hoppers_kernels(plan, device, monkeypatch):
    """No other kernels run; experts with no entry, a few, and more than a tile."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for compute capability 9.0")
    from moefold_kernels.triton import overlapped, overlapped_apart

    for module in (kernels.project, overlapped if "apart" in plan else overlapped_apart):
        monkeypatch.delattr(module, "project_in")
        monkeypatch.delattr(module, "project_out")
    biased, second = "and" in plan, HOPPERS[plan].second
    hidden, inner = (1280, 768) if "blocks" in plan else (640, 384)
    in_turn = kernels.leveled_launch.in_turn(second, hidden, inner, inner, second.columns)
    assert in_turn == (second.blocks if "in turn" in plan else 1)
    layer = random_layer(6, hidden, inner, biased=biased)
    activation = kernels.Activation("clamped", 1.5, 1.702) if biased else kernels.SILU
    batches = [(1, 0.0), (7, 0.0), (150, 0.0), (150, 9.0), *[(300, 0.0), (500, 9.0)] * ("apart" in plan)]
    for tokens, skew in batches + [(850, 0.0)] * ("blocks" in plan):
        arguments = batch(tokens, hidden, 2, 6, skew=skew)
        found = run(layer, *arguments, device, activation=activation, plan=HOPPERS[plan])
        assert_near(found, expected(layer, *arguments, clamped_gate if biased else silu))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", STREAMS)
def test_both_projections_as_one_stream(plan, device, monkeypatch):
    """More blocks than programs and fewer, rows behind the last, steps that are no number of places."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for compute capability 9.0")
    for module, name in ((kernels.joined, "project"), (kernels, "gate_up")):
        monkeypatch.delattr(module, name)
    whole = STREAMS[plan].first.columns == 128
    for experts, hidden, inner, top_k in ((6, 640 if whole else 704, 384 if whole else 320, 2), (40, 896, 256, 4)):
        biased = experts == 6 and "and" in plan
        layer = random_layer(experts, hidden, inner, biased=biased)
        activation = kernels.Activation("clamped", 1.5, 1.702) if biased else kernels.SILU
        for tokens, skew in ((0, 0.0), (7, 0.0), (150, 9.0), (300, 0.0)):
            arguments = batch(tokens, hidden, top_k, experts, skew=skew)
            found = run(layer, *arguments, device, activation=activation, plan=STREAMS[plan])
            again = run(layer, *arguments, device, activation=activation, plan=STREAMS[plan])
            assert torch.equal(found, again)  # whoever takes which block
            assert_near(found, expected(layer, *arguments, clamped_gate if biased else silu))


@pytest.mark.gpu
@pytest.mark.parametrize("early", [(1, 1), (30, 1), (32, 0)])
def test_whichever_programs_of_a_stream_go_on_to_down_early(early, device, monkeypatch):
    """The same bits, also where a unit has several tiles, and nobody waits for ever.

    With 32 programs, 20 tiles of 8 and 4 items: down's first may be taken early once 128 or 136 of the 160 before
    have been, by 30 or 32 programs.
    """
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for compute capability 9.0")
    monkeypatch.setattr(kernels.streamed_launch, "processors", lambda device: 32)
    layer = random_layer(40, 512, 512)
    plan = STREAMS["16 and 16, six places"]
    for tokens, skew in ((90, 0.0), (90, 9.0), (200, 9.0)):
        arguments = batch(tokens, 512, 4, 40, skew=skew)
        plain = run(layer, *arguments, device, plan=plan)
        with monkeypatch.context() as patch:
            patch.setattr(kernels.streamed_launch, "early", lambda *_: early)
            patch.setattr(kernels.streamed_launch, "tiles", lambda entries, units: units)
            found = [run(layer, *arguments, device, plan=plan) for _ in range(3)]
        assert all(torch.equal(plain, one) for one in found)
        assert_near(plain, expected(layer, *arguments, silu))


@pytest.mark.parametrize(
    ("alone", "inner", "view", "kernels_run"),
    [
        (0, 128, False, ["streamed"]), (0, 128, True, ["joined"]), (1, 128, False, ["overlapped_pair", "project"] * 2),
        (6, 128, False, ["joined"]), (0, 96, False, ["overlapped_pair", "project"]),
    ],
)  # fmt: skip
def test_what_is_launched_for_one_stream(alone, inner, view, kernels_run, launched):
    """Not for rows that 16 bytes do not divide, nor where pairs are beside experts alone, or steps are not whole."""
    layer = random_layer(6 + alone % 2, 128, inner, alone)
    made = weights_of(operands(layer))
    x, index, weights = batch(40, 128, 2, 6 + alone % 2)
    x = torch.cat([x, x[:, :1]], 1)[:, :128].to(torch.bfloat16) if view else x
    kernels.forward(made, x, index, weights, plan=join(Tile("streamed", 32, 0, 64, 64, 8, 4)))
    files = [file.rpartition(".")[2] for name, file, *_ in launched if name.startswith("project")]
    assert files == kernels_run
    if kernels_run == ["streamed"]:
        (one,) = (one for one in launched if one[0] == "project")
        assert one[2] == (
            min(132, (2 + 1) * len(one[3][6]) // 8),
        )  # no more programs than items: two blocks and one of a tile


@pytest.mark.parametrize(("alone", "inner"), [(0, 64), (1, 64), (6, 64), (0, 96)])
@pytest.mark.parametrize("tokens", [16, 32])
def test_a_plan_of_one_stream_is_right_everywhere(tokens, alone, inner, device):
    """As such on Hopper; joined plain kernels elsewhere, and a launch each where layers are not for one."""
    plan = join(Tile("streamed", tokens, 0, 32, 64, 4, 4))
    layer = random_layer(6 + alone % 2, 128, inner, alone)
    arguments = batch(9, 128, 2, 6 + alone % 2)
    assert_near(run(layer, *arguments, device, plan=plan), expected(layer, *arguments))


@pytest.mark.parametrize(
    ("hidden", "inner", "change", "blocks"),
    [
        (640, 512, {}, 5), (640, 384, {}, 1), (768, 512, {}, 1), (640, 512, {"tokens": 128}, None),
        (640, 512, {"columns": 32}, None),
    ],
)  # fmt: skip
def test_what_is_launched_for_blocks_in_turn_by_warps_apart(hidden, inner, change, blocks, launched):
    """Steps of all places, and whole blocks; other kernels of the 16-bit format do not have them."""
    plan = overlapped("overlapped", 256, 32, 4, warps=8, blocks=5)
    made = weights_of(operands(random_layer(6, hidden, inner)))
    plan = Plan(replace(plan.first, **change), replace(plan.second, **change))
    kernels.forward(made, *batch(20, hidden, 2, 6), plan=plan)
    first, second = (one for one in launched if one[0] in ("project_in", "project_out"))
    name = "overlapped_apart" if blocks else "overlapped"
    assert [file.rpartition(".")[2] for _, file, *_ in (first, second)] == [name] * 2
    assert second[-1].get("BLOCKS") == blocks
    assert second[2][0] * (blocks or 1) * 128 == first[2][0] * 64 // inner * hidden
    assert "BLOCKS" not in first[-1]


@pytest.mark.gpu
def test_a_cuda_graph_holds_the_layer(device):
    layer = random_layer(16, 256, 128)
    made = operands(layer.to(device))
    tokens = 32
    x, index, weights = (t.to(device) for t in batch(tokens, 256, 4, 16))

    def step():
        return torch.ops.moefold.experts(x, index, weights, *made, "silu", 0.0, 0.0, torch.float32)

    torch.use_deterministic_algorithms(False)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in (5, 6):
        fresh = batch(tokens, 256, 4, 16, skew=3.0 * (seed - 5), seed=seed)
        for held, new in zip((x, index, weights), fresh, strict=True):
            held.copy_(new)
        graph.replay()
        assert_near(out, expected(layer, *fresh))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_that_is_not_current():
    layer = random_layer(8, 64, 32)
    arguments, other = batch(9, 64, 2, 8), torch.device("cuda:1")
    found = torch.ops.moefold.experts(
        *(t.to(other) for t in arguments), *operands(layer.to(other)), "silu", 0.0, 0.0, torch.float32
    )
    assert found.device == other
    assert_near(found, expected(layer, *arguments))
