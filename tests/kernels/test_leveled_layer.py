"""The whole layer in the few-bit formats against the definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import assert_near, batch, clamped_gate, expected, leveled_layer, operands
from leveled import FORMATS

from moefold_kernels import FormatError, reference
from moefold_kernels.activation import silu
from moefold_kernels.bench.correctness import poisoned
from moefold_kernels.levels import INTEGERS

pytest.importorskip("triton", reason="needs triton")
from moefold_kernels.triton import layer as kernels
from moefold_kernels.triton import ops  # noqa: F401  (registers the operations)
from moefold_kernels.triton.backend import Triton
from moefold_kernels.triton.operands import weights as weights_of
from moefold_kernels.triton.plans import Plan, Tile

SMALL = {"rows": 32, "columns": 32, "warps": 4, "stages": 2}
PLAIN = {
    "pair": Plan(Tile("pair", 16, 0, **SMALL), Tile("pair", 16, 0, **SMALL)),
    "slot": Plan(Tile("slot", 16, 16, **SMALL, group=2), Tile("slot", 16, 0, **SMALL)),
    "splits": Plan(Tile("pair", 16, 0, **SMALL), Tile("slot", 32, 0, 32, 16, 4, 2, group=2, splits=3)),
    "eights": Plan(Tile("overlapped_pair", 8, 0, 32, 64, 4, 4), Tile("overlapped", 8, 0, 64, 64, 4, 4)),
    "fours": Plan(*(Tile("overlapped", 4, 0, 64, 128, 4, 4, terms=2),) * 2),
}


ENTRY = Plan(Tile("entry", 1, 0, 32, 128, 4, 1), Tile("entry", 1, 0, 32, 128, 4, 2))
"""Of by_entry.py."""


def fast(
    mode: str,
    tokens: int,
    warps: int = 4,
    stages: int = 4,
    splits: int = 1,
    group: int = 1,
    extra: int = 0,
    blocks: int = 1,
    above: int = 1,
) -> Plan:
    """A plan for leveled.py, or with warps apart, with blocks of down, and of gate and up (`above`), in turn."""
    sizes = (8 * warps, 64, warps, stages), (16 * warps, 64, warps, stages)
    first, second = (Tile(mode, tokens, extra, *size, group=group) for size in sizes)
    first, second = replace(first, blocks=above), replace(second, blocks=blocks)
    return Plan(first, second if splits == 1 else replace(second, splits=splits, group=1))


FAST = {
    "pair 16": fast("overlapped_pair", 16),
    "pair 64, splits": fast("overlapped_pair", 64, stages=3, splits=3),
    "pair 32, 8 warps": fast("overlapped_pair", 32, warps=8, group=2),
    "slot 16, splits": fast("overlapped", 16, stages=5, splits=2),
    "slot 128": fast("overlapped", 128, group=4),
}
FAST |= {"pair 8": fast("overlapped_pair", 8), "slot 8, splits": fast("overlapped", 8, splits=2)}
FAST |= {
    "pair 16 and 16, splits": fast("overlapped_pair", 16, extra=16, stages=2, splits=2),
    "slot 64 and 32": fast("overlapped", 64, extra=32, stages=2),
    "slot 64, 16 warps": fast("overlapped", 64, warps=16, stages=3),
    "slot 128 and 32, splits": fast("overlapped", 128, warps=8, stages=2, extra=32, splits=2),
    "slot 256 and 32, warps apart, splits": fast("overlapped", 256, warps=8, stages=2, extra=32, splits=2),
    "slot 256, warps apart": fast("overlapped", 256, warps=8, stages=2, group=2),
    "pair 64 and 16, blocks in turn": fast("overlapped_pair", 64, stages=2, extra=16, blocks=2),
    "pair 32, blocks in turn, splits": fast("overlapped_pair", 32, stages=3, blocks=5, splits=2),
    "slot 64, blocks in turn": fast("overlapped", 64, stages=2, blocks=2, group=2),
    "slot 256 and 32, warps apart, blocks in turn": fast("overlapped", 256, warps=8, stages=2, extra=32, blocks=5),
    "slot 256, warps apart, blocks in turn, splits": fast("overlapped", 256, warps=8, stages=2, blocks=2, splits=2),
    "slot 256, warps apart, blocks in turn": fast("overlapped", 256, warps=8, stages=2, blocks=2, group=2),
    "slot 256, warps apart, no whole blocks": fast("overlapped", 256, warps=8, stages=2, blocks=3, above=5),
    "slot 256 and 32, warps apart, all blocks in turn": fast(
        "overlapped", 256, warps=8, stages=2, extra=32, blocks=5, above=3
    ),
    "slot 256 and 32, warps apart, all blocks in turn, splits": fast(
        "overlapped", 256, warps=8, stages=2, extra=32, blocks=2, above=4, splits=2
    ),
    "slot 256, warps apart, all blocks in turn": fast("overlapped", 256, warps=8, stages=2, above=2, group=2),
    "pair 64 and 16, all blocks in turn": fast("overlapped_pair", 64, warps=8, stages=2, extra=16, blocks=2, above=3),
    "pair 64 and 32, all blocks in turn": fast("overlapped_pair", 64, stages=2, extra=32, blocks=5, above=6),
    "pair 64 and 32": fast("overlapped_pair", 64, warps=8, stages=2, extra=32),
    "pair 32, all blocks in turn of five stages": fast("overlapped_pair", 32, stages=5, above=2),
    "slot 64, all blocks in turn, splits": fast("overlapped", 64, stages=2, blocks=2, above=4, splits=2),
    "slot 256, warps apart, no whole steps": fast("overlapped", 256, warps=8, stages=2, blocks=2, above=2),
}


def e4m3(
    mode: str, tokens: int, warps: int = 4, stages: int = 3, splits: int = 1, columns: int = 256, extra: int = 0
) -> Plan:
    """A plan for e4m3.py."""
    first, second = ((rows, columns, warps, stages) for rows in (64, 16 * warps))
    return Plan(Tile(mode, tokens, extra, *first, terms=2), Tile(mode, tokens, extra, *second, splits=splits, terms=2))


E4M3 = {
    "pair-8": e4m3("overlapped_pair", 8, warps=8, stages=2, splits=2),
    "pair-4": e4m3("overlapped_pair", 4, columns=128, stages=4),
    "slot-4": e4m3("overlapped", 4, splits=2),
    "pair-16": e4m3("overlapped_pair", 16, warps=8, stages=2),
    "pair-32": e4m3("overlapped_pair", 32, warps=8, columns=128, stages=2),
    "slot-64": e4m3("overlapped", 64, columns=128),
    "slot-16-and-16": e4m3("overlapped", 16, extra=16, stages=2),
    "pair-32-thinly": e4m3("overlapped_pair", 32, warps=8, stages=2, splits=2),
    "slot-64-and-16-thinly": e4m3("overlapped", 64, extra=16, stages=2),
}


def run(layer, x, index, weights, device, plan, activation=kernels.SILU, interleaved=False):
    """The layer on the device, fresh memory poisoned."""
    made = weights_of(operands(layer, interleaved=interleaved))
    with poisoned():
        return kernels.forward(made, *(t.to(device) for t in (x, index, weights)), activation, torch.float32, plan)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("plan", PLAIN)
@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "alone", "top_k"), [(7, 72, 40, 1, 3), (4, 64, 128, 0, 2), (4, 128, 128, 2, 2)]
)
def test_shapes(experts, hidden, inner, alone, top_k, plan, format, device):
    layer = leveled_layer(format, experts, hidden, inner, alone, device=device)
    arguments = batch(9, hidden, top_k, experts)
    assert_near(run(layer, *arguments, device, PLAIN[plan]), expected(layer, *arguments))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "alone", "top_k"), [(7, 72, 40, 1, 3), (4, 64, 128, 0, 2), (4, 128, 128, 2, 2)]
)
def test_each_entry_by_itself(experts, hidden, inner, alone, top_k, format, device, monkeypatch):
    """By rows, down in bands, and all; pairs, and both kinds. Nothing is sorted."""
    monkeypatch.delattr(kernels, "route_for")
    layer = leveled_layer(format, experts, hidden, inner, alone, biased=alone > 0, device=device, coded=True)
    arguments = batch(2, hidden, top_k, experts)
    activation = kernels.Activation("clamped", 1.5, 1.702) if alone else kernels.SILU
    found = run(layer, *arguments, device, ENTRY, activation)
    assert_near(found, expected(layer, *arguments, clamped_gate if alone else silu))


def test_levels_of_pair8_that_are_no_fp8_numbers_are_sorted(device):
    """Assembly takes numbers for levels, as leveled.py does."""
    layer = leveled_layer("pair8", 4, 64, 64, device=device)
    assert not kernels.by_entry_launch.takes(weights_of(operands(layer)), ENTRY, 1, 2)
    arguments = batch(3, 64, 2, 4)
    assert_near(run(layer, *arguments, device, ENTRY), expected(layer, *arguments))


@pytest.mark.parametrize("format", ["pair4", "pair8"])
@pytest.mark.parametrize(("tokens", "skew"), [(0, 0.0), (1, 0.0), (40, 9.0)])
def test_batches_by_the_plan_that_is_looked_up(tokens, skew, format, device):
    layer = leveled_layer(format, 7, 128, 256, 1, biased=True, device=device)
    arguments = batch(tokens, 128, 2, 7, skew=skew, seed=tokens)
    found = run(layer, *arguments, device, None, kernels.Activation("clamped", 1.5, 1.702), interleaved=True)
    assert_near(found, expected(layer, *arguments, clamped_gate))


@pytest.mark.parametrize("gated", [True, False])
def test_activations_that_are_not_fused(gated, device):
    layer = leveled_layer("pair6", 7, 72, 40, 1, gated=gated, biased=True, device=device)
    arguments = batch(7, 72, 3, 7)
    gate = (lambda gate, up: torch.nn.functional.gelu(gate) * up) if gated else (lambda up: up.relu() ** 2)
    function = lambda rows: gate(*rows.float().chunk(2 if gated else 1, dim=-1))  # noqa: E731
    found = run(layer, *arguments, device, PLAIN["pair"], kernels.Activation("other", function=function))
    assert_near(found, expected(layer, *arguments, gate), fused=False)


@pytest.mark.parametrize(("hidden", "inner"), [(64, 192), (64, 128), (128, 64), (128, 256)])
@pytest.mark.parametrize("format", FORMATS)
def test_operation_and_backend(format, hidden, inner, device):
    """By rows, down in bands, gate and up in bands, and all."""
    layer = leveled_layer(format, 6, hidden, inner, device=device)
    arguments = [t.to(device) for t in batch(5, hidden, 2, 6)]
    right = reference.experts(layer.packed, *arguments, silu)
    found = torch.ops.moefold.experts(*arguments, *operands(layer), "silu", 0.0, 0.0, torch.float32)
    assert_near(found, right)
    assert torch.equal(Triton().experts(layer.packed, *arguments, silu), found)


def test_operands_that_do_not_fit():
    layer = leveled_layer("pair6", 4, 64, 64)
    good, arguments = operands(layer), batch(3, 64, 2, 4)
    for change, said in (
        ({"down_low": None}, "pair6 needs down_low"),
        ({"levels": good.levels[:, 1:].contiguous()}, rf"levels is \[3, {INTEGERS - 1}\]"),
        ({"gate_up_scale": good.gate_up_scale.float()}, "scales int16"),
        ({"down_packed": good.down_packed[:, :, 1:]}, r"down_packed is \[2, 64, 7\] .*no nibble planes of one layer"),
    ):
        with pytest.raises(FormatError, match=said):
            torch.ops.moefold.experts(*arguments, *good._replace(**change), "silu", 0.0, 0.0, torch.float32)


def test_operands_of_which_some_lie_in_rows():
    layer = leveled_layer("pair6", 4, 128, 128)
    good, arguments = operands(layer), batch(3, 128, 2, 4)
    for change, said in (
        ({"down_low": good.down_low.view(2, 128, 8)}, r"down_low is \[2, 128, 8\] .* want \[2, 8, 128\]"),
        (
            {"gate_up_scale": good.gate_up_scale.view(2, 256, 2)},
            r"gate_up_scale is \[2, 256, 2\] .* want \[2, 16, 32\]",
        ),
        ({"down_packed": good.down_packed.view(2, 128, 16)}, "no nibble planes of one layer"),
    ):
        with pytest.raises(FormatError, match=said):
            torch.ops.moefold.experts(*arguments, *good._replace(**change), "silu", 0.0, 0.0, torch.float32)


HOPPERS = [(plan, format) for plan in ("pair 16", "slot 16, splits") for format in FORMATS]
HOPPERS += [(plan, format) for plan in FAST if plan not in dict(HOPPERS) for format in ("pair4", "pair8")]


@pytest.mark.gpu
@pytest.mark.parametrize(("plan", "format"), HOPPERS)
def test_hoppers_kernels(plan, format, device, monkeypatch):
    """No other kernels run; sizes are no multiples of the blocks of rows."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for compute capability 9.0")
    from moefold_kernels.triton import leveled, leveled_apart

    for module in (kernels.project, leveled if "apart" in plan else leveled_apart):
        monkeypatch.delattr(module, "project_in")
        monkeypatch.delattr(module, "project_out")
    biased, apart, first, second = "splits" in plan, "apart" in plan, FAST[plan].first, FAST[plan].second
    inner = 1536 if "in turn" in plan else 384  # steps of all stages, in each split
    hidden = 1280 if (apart and "blocks" in plan) or "all blocks" in plan else 640  # more than one program's
    in_turn = kernels.leveled_launch.in_turn(second, hidden, inner, inner // second.splits)
    assert in_turn == (second.blocks if "in turn" in plan else 1)
    in_turn = kernels.leveled_launch.in_turn(first, inner, hidden, hidden)
    assert in_turn == (first.blocks if "all blocks" in plan else 1)
    layer = leveled_layer(format, 6, hidden, inner, biased=biased, device=device, coded=format == "pair8")
    activation = kernels.Activation("clamped", 1.5, 1.702) if biased else kernels.SILU
    batches = [(1, 0.0), (3, 0.0), (150, 0.0), (150, 9.0), *[(300, 0.0), (500, 9.0)] * apart]
    batches += [(850, 0.0)] * (apart and "blocks" in plan)
    batches += [(220, 0.0), (270, 0.0)] * ("pair 64 and 32" in plan)  # 73 and 90 entries of an expert
    for tokens, skew in batches:
        arguments = batch(tokens, hidden, 2, 6, skew=skew)
        found = run(layer, *arguments, device, FAST[plan], activation)
        assert_near(found, expected(layer, *arguments, clamped_gate if biased else silu))


@pytest.mark.parametrize(
    ("tokens", "warps", "paired", "rows", "answer"),
    [
        (256, 8, False, 2**20, True), (512, 8, False, 1, True), (128, 8, False, 1, False), (256, 4, False, 1, False),
        (256, 8, True, 1, False), (256, 8, False, 2**20 + 1, False),
    ],
)  # fmt: skip
def test_where_warps_apart_copy(tokens, warps, paired, rows, answer):
    """One slot's many tokens by eight warps, and rows within 32 bits."""
    x = torch.empty(rows, 2048, device="meta", dtype=torch.bfloat16)
    assert kernels.leveled_launch.apart(tokens, warps, paired, x) is answer


@pytest.mark.parametrize(
    ("sizes", "part", "change", "answer"),
    [
        ((640, 768), 768, {}, 5), ((640, 768), 384, {}, 5), ((640, 768), 256, {}, 1), ((704, 768), 768, {}, 1),
        ((640, 896), 512, {}, 1), ((640, 768), 768, {"tokens": 256, "warps": 8}, 5),
        ((640, 768), 768, {"blocks": 1}, 1), ((640, 768), 768, {"stages": 4}, 1),
    ],
)  # fmt: skip
def test_where_a_program_does_blocks_in_turn(sizes, part, change, answer):
    """Whole blocks, whole splits, and as many steps as a number of stages."""
    tile = replace(Tile("overlapped", 64, 0, 64, 64, 4, 3, blocks=5), **change)
    assert kernels.leveled_launch.in_turn(tile, *sizes, part) == answer


@pytest.mark.parametrize(
    ("hidden", "inner", "above", "blocks"),
    [(640, 768, 1, 5), (1280, 768, 3, 5), (640, 640, 1, 1), (768, 768, 3, 1), (768, 640, 1, 1)],
)
@pytest.mark.parametrize("extra", [0, 32])
def test_what_is_launched_for_blocks_in_turn_by_warps_apart(extra, hidden, inner, above, blocks, launched):
    """Whole blocks, and as many steps as a number of stages, for either projection."""
    plan = fast("overlapped", 256, warps=8, stages=2, extra=extra, blocks=5, above=3)
    made = weights_of(operands(leveled_layer("pair4", 6, hidden, inner)))
    kernels.forward(made, *batch(20, hidden, 2, 6), plan=plan)
    first, second = (one for one in launched if one[0] in ("project_in", "project_out"))
    assert [file.rpartition(".")[2] for _, file, *_ in (first, second)] == ["leveled_apart"] * 2
    assert (first[-1]["BLOCKS"], second[-1]["BLOCKS"]) == (above, blocks)
    assert first[2][0] % (2 * inner // (64 * above)) == 0
    assert second[2][0] % (2 * hidden // (128 * blocks)) == 0
    assert second[2][0] * blocks * 128 * inner == first[2][0] * above * 64 * hidden
    assert first[-1]["REGISTERS"] == second[-1]["REGISTERS"] == kernels.leveled_launch.COPY_REGISTERS


@pytest.mark.parametrize(("hidden", "above"), [(1280, 3), (640, 1)])
@pytest.mark.parametrize("mode", ["overlapped", "overlapped_pair"])
def test_what_is_launched_where_no_warps_are_apart(mode, hidden, above, launched):
    """Blocks in turn of either projection, where its steps are a number of stages."""
    made = weights_of(operands(leveled_layer("pair4", 6, hidden, 768)))
    kernels.forward(made, *batch(20, hidden, 2, 6), plan=fast(mode, 64, warps=8, stages=2, blocks=5, above=3))
    first, second = (one for one in launched if one[0] in ("project_in", "project_out"))
    assert [file.rpartition(".")[2] for _, file, *_ in (first, second)] == ["leveled"] * 2
    assert (first[-1]["BLOCKS"], second[-1]["BLOCKS"]) == (above, 5)
    assert second[2][0] * 5 * 128 * 768 == first[2][0] * above * 64 * hidden
    assert first[2][0] % (768 // (64 * above)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(640, 384), (512, 768)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("plan", E4M3)
def test_hoppers_kernels_with_e4m3_operands(plan, format, sizes, device, monkeypatch):
    """Neither the plain kernels nor those with bf16 operands run; steps are of 128 columns, or of 256."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for compute capability 9.0")
    from moefold_kernels.triton import leveled

    for module in (kernels.project, leveled):
        monkeypatch.delattr(module, "project_in")
        monkeypatch.delattr(module, "project_out")
    biased, (hidden, inner) = "8" in plan or "and" in plan, sizes
    layer = leveled_layer(format, 6, hidden, inner, biased=biased, device=device, coded=True)
    activation = kernels.Activation("clamped", 1.5, 1.702) if biased else kernels.SILU
    for tokens, skew in ((1, 0.0), (3, 0.0), (150, 9.0)):
        arguments = batch(tokens, hidden, 2, 6, skew=skew)
        found = run(layer, *arguments, device, E4M3[plan], activation)
        assert_near(found, expected(layer, *arguments, clamped_gate if biased else silu))


@pytest.mark.parametrize(("plan", "whole"), [("pair-4", False), ("pair-8", True), ("pair-32-thinly", True)])
def test_what_goes_between_projections_with_e4m3_operands(plan, whole, launched):
    """Terms of few tokens are the first projection's; of more a kernel makes them, which lets down begin early."""
    made = weights_of(operands(leveled_layer("pair8", 6, 512, 768, coded=True)))
    kernels.forward(made, *batch(20, 512, 2, 6), plan=E4M3[plan])
    order = ["prepare", "project_in", *["prepare"] * whole, "project_out"]
    projections = [one for one in launched if one[0] in order]
    assert [name for name, *_ in projections] == order
    (_, _, _, given, _), (_, _, (_, splits), rows, down) = projections[1], projections[-1]
    assert given[6].dtype == (torch.bfloat16 if whole else torch.float8_e4m3fn)  # what the first one writes
    assert down["WHOLE"] is whole
    assert rows[1].numel() == 40 * (splits if whole else 768 // 64)
    assert [options["EARLY"] for name, *_, options in projections if name == "prepare"] == [True, False][: 1 + whole]


@pytest.mark.parametrize("hidden", [512, 1024])
def test_tokens_of_long_rows_are_rewritten_by_routing(hidden, launched):
    """And given to the first projection; those of short rows by a kernel of their own."""
    made = weights_of(operands(leveled_layer("pair8", 6, hidden, 768, coded=True)))
    kernels.forward(made, *batch(20, hidden, 2, 6), plan=E4M3["pair-8"])
    names = [name for name, *_ in launched]
    (routed,) = (one for one in launched if one[0] == "route_few")
    (first,) = (one for one in launched if one[0] == "project_in")
    long = hidden >= 1024
    assert names[: names.index("project_in")] == (["route_few"] if long else ["route_few", "prepare"])
    _, _, grid, given, options = routed
    assert grid == (1 + 3 + 20 * long,)
    assert options["COLUMNS"] == (1024 if long else 0)
    assert (first[3][0] is given[6]) == (first[3][1] is given[7]) == long


@pytest.mark.parametrize("where", ["aligned", "begins elsewhere", "rows of odd lengths"])
def test_bf16_operands_take_tokens_as_they_are(where, launched):
    """No kernel is between routing and the first projection; tokens that 16 bytes do not fit are copied."""
    made = weights_of(operands(leveled_layer("pair8", 6, 512, 768, coded=True)))
    index, weights = batch(20, 512, 2, 6)[1:]
    x = torch.randn(20, 512 + 12).bfloat16()
    x = {"aligned": x[:, :512].contiguous(), "begins elsewhere": x.flatten()[4 : 4 + 20 * 512].view(20, 512)}.get(
        where, x[:, 8:520]
    )
    kernels.forward(made, x, index, weights, plan=Plan(*[Tile("overlapped_pair", 16, 0, 64, 64, 4, 2)] * 2))
    names = [name for name, *_ in launched]
    assert names[:2] == ["route_few", "project_in"]
    given, stride = launched[1][3][0], launched[1][-1]["x_row"]
    assert torch.equal(given, x)
    assert (given is x) == (where == "aligned")
    assert given.stride(0) == stride == 512


@pytest.mark.gpu
def test_rows_of_tokens_an_odd_multiple_of_16_bytes_apart(device):
    """Triton knows a length as a multiple of 16, or as nothing."""
    made = weights_of(operands(leveled_layer("pair8", 6, 512, 768, device=device, coded=True)))
    x, index, weights = (part.to(device) for part in batch(150, 512, 2, 6))
    wide = torch.zeros(150, 520, dtype=x.dtype, device=device)
    wide[:, :512] = x
    plan = fast("overlapped_pair", 64, warps=8, stages=2, blocks=1)
    found, wanted = (kernels.forward(made, one, index, weights, plan=plan) for one in (wide[:, :512], x))
    assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["pair-8", "pair-4", "pair-32-thinly"])
def test_e4m3_operands_beside_experts_left_alone(plan, device):
    """Rows of both kinds of experts, and rows that nobody writes, of entries whose expert does not exist."""
    layer = leveled_layer("pair6", 7, 512, 768, 1, device=device, coded=True)
    x, index, weights = batch(90, 512, 3, 7, skew=2.0)
    index[::4, 1] = 99
    found = run(layer, x, index, weights, device, E4M3[plan])
    assert_near(found, expected(layer, x, index, weights))


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "tokens"), [(512, 60), (1024, 60), (1024, 1100)], ids=["short", "long", "many"])
@pytest.mark.parametrize("plan", ["pair-8", "pair-4", "pair-32-thinly"])
def test_a_graph_of_two_layers_with_e4m3_operands(plan, hidden, tokens, device):
    """Kernels of which each begins before the one in front has ended, with other routing at each replay.

    Of long rows routing's kernels rewrite the tokens, of more than 1024 entries the one that places chunks.
    """
    layer = leveled_layer("pair8", 6, hidden, 768, device=device, coded=True)
    made = weights_of(operands(layer))
    x, index, weights = (t.to(device) for t in batch(tokens, hidden, 2, 6))

    def step():
        first = kernels.forward(made, x, index, weights, kernels.SILU, torch.bfloat16, E4M3[plan])
        return first, kernels.forward(made, first, index, weights, kernels.SILU, torch.float32, E4M3[plan])

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, second = step()
    for seed in (5, 6, 7):
        fresh = batch(tokens, hidden, 2, 6, skew=3.0 * (seed - 5), seed=seed)
        for held, new in zip((x, index, weights), fresh, strict=True):
            held.copy_(new)
        for _ in range(3):
            graph.replay()
        assert_near(first, expected(layer, *fresh))
        assert_near(second, expected(layer, first.cpu(), *fresh[1:]))


def test_levels_of_other_numbers_get_bf16_operands(device):
    """A plan for e4m3 operands, where levels are none."""
    layer = leveled_layer("pair4", 6, 256, 256, device=device)
    arguments = batch(5, 256, 2, 6)
    assert not weights_of(operands(layer)).packed.coded
    assert_near(run(layer, *arguments, device, E4M3["slot-4"]), expected(layer, *arguments))


@pytest.mark.parametrize("plan", ["pair 16", "slot 128"])
def test_levels_of_pair8_that_are_no_numbers(plan, device, monkeypatch):
    """Those that kernels do not know by their numbers take the plain ones, on every device."""
    monkeypatch.setattr(kernels.leveled_launch, "gate_up", None)
    layer = leveled_layer("pair8", 6, 256, 128, device=device)
    arguments = batch(5, 256, 2, 6)
    assert not weights_of(operands(layer)).packed.coded
    assert_near(run(layer, *arguments, device, FAST[plan]), expected(layer, *arguments))


@pytest.mark.parametrize("sizes", [(256, 128), (320, 128)])
@pytest.mark.parametrize("kind", ["e4m3", "bf16", "plain"])
def test_tiles_that_plain_kernels_can_hold(kind, sizes, device, monkeypatch):
    """On Hopper project.py gets narrow ones of overlapped modes, whichever kernel they were made for."""
    layer = leveled_layer("pair8", 6, *sizes, device=device)  # levels that are no fp8 numbers
    held = weights_of(operands(layer))
    plan = {"e4m3": E4M3["pair-8"], "bf16": FAST["slot 128"], "plain": PLAIN["pair"]}[kind]
    found = kernels.able(held, plan, True)
    if kind == "plain":
        assert found == plan
    else:
        assert all(tile.columns <= 32 and tile.stages <= 3 and not tile.terms for tile in found.tiles)
        assert [tile.rows for tile in found.tiles] == [tile.rows for tile in plan.tiles]
    monkeypatch.setattr(kernels, "plan_for", lambda *_, by_entry=True: ENTRY if by_entry else plan)
    assert kernels.apart(held, 5, 2) == found
    arguments = batch(5, sizes[0], 2, 6)
    assert_near(run(layer, *arguments, device, plan), expected(layer, *arguments))


@pytest.mark.parametrize(
    ("change", "fused", "said"),
    [
        ({}, False, "pair8 by plain kernels, not by the fast ones: the activation is none that they compute"),
        ({}, True, "the levels are no fp8 numbers"),
        ({"gated": False}, True, "the experts have no gate"),
        ({"hidden": 320}, True, "hidden and inner size, 320 and 128, are to be multiples of 128"),
    ],
)
def test_slow_kernels_where_faster_ones_are_say_why_once(change, fused, said, caplog, monkeypatch):
    """As on Hopper, whose kernels this does not start."""
    target = kernels.Target(assembly=False, upcast=True, overlap=True, chain=False)
    monkeypatch.setattr(kernels.Target, "of", lambda tensor: target)
    kernels._say.cache_clear()
    size = change.get("hidden", 256)
    held = weights_of(operands(leveled_layer("pair8", 6, size, 128, gated=change.get("gated", True))))
    for _ in range(2):
        kernels.able(held, FAST["slot 128"], fused)
    assert [said in record.getMessage() for record in caplog.records] == [True]
    coded = weights_of(operands(leveled_layer("pair8", 6, 256, 128, coded=True)))
    assert kernels.able(coded, FAST["slot 128"], True) == FAST["slot 128"]
    assert len(caplog.records) == 1
