"""Routing tables against sorting: every entry once, in order, and every tile that there is work for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moefold_kernels.places import tables as places_of

routing = pytest.importorskip("moefold_kernels.triton.routing", reason="needs triton")
from moefold_kernels.triton import e4m3_launch  # noqa: E402
from moefold_kernels.triton.plans import Plan, Tile, join  # noqa: E402
from moefold_kernels.triton.sorting import FIELDS, READY  # noqa: E402


def tile(entries: int, group: int = 1) -> Tile:
    """A tile of so many entries, of which nothing else matters here."""
    tokens = 1 << entries.bit_length() - 1
    return Tile("pair", tokens, entries - tokens, 32, 32, 4, 2, group=group)


def made(index, experts, alone, first, second, device):
    """The tables, and places and pairs of experts in no order."""
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(3)).tolist()
    rest = order[alone:]
    pairs = [(rest[i], rest[i + 1]) for i in range(0, len(rest), 2)]
    places, _ = places_of(pairs, order[:alone])
    plan = Plan(first, second)
    return routing.route(index.to(device), places.to(device), len(pairs), alone, plan), places, len(pairs)


def check(index, experts, alone, first, second, device):
    found, places, pairs = made(index, experts, alone, first, second, device)
    flat = index.flatten()
    known = (flat >= 0) & (flat < experts)
    place = torch.where(known, places[flat.clamp(0, experts - 1)].long(), experts)  # unknown experts come last
    assert torch.equal(found.order.cpu().long(), place.argsort(stable=True))
    counts = place.bincount(minlength=experts + 1)
    assert found.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    longest = counts[: 2 * pairs].view(-1, 2).amax(1), counts[2 * pairs : experts]
    for tiles, cut in ((found.first, first), (found.second, second)):
        for table, units in zip(tiles, longest, strict=True):
            work = [(u, n) for u, count in enumerate(units.tolist()) for n in range(-(-count // cut.entries))]
            held = [tuple(column) for column in table.T.tolist() if column[0] != -1]
            assert sorted(held) == work
            assert table.shape[1] % max(first.group, second.group) == 0


@pytest.mark.parametrize("few", [routing.FEW, 0], ids=["few", "many"])
@pytest.mark.parametrize(("experts", "alone"), [(8, 0), (9, 3), (4, 4)])
@pytest.mark.parametrize("tokens", [1, 60, 300])
def test_every_entry_and_every_tile(tokens, experts, alone, few, device, monkeypatch):
    monkeypatch.setattr(routing, "FEW", few)
    index = torch.randint(-1, experts + 1, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
    check(index, experts, alone, tile(16), tile(48, group=2), device)


@pytest.mark.parametrize("few", [routing.FEW, 0], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_all_to_one_expert(dtype, few, device, monkeypatch):
    monkeypatch.setattr(routing, "FEW", few)
    for expert in (0, 6, 7, -5):
        check(torch.full((90, 2), expert, dtype=dtype), 7, 1, tile(16), tile(16), device)


def test_many_experts(device):
    check(
        torch.randint(0, 384, (40, 8), generator=torch.Generator().manual_seed(0)), 384, 0, tile(16), tile(32), device
    )


@pytest.mark.parametrize("few", [routing.FEW, 0], ids=["few", "many"])
def test_one_launch_for_both_projections_counts_from_zero(few, device, monkeypatch):
    monkeypatch.setattr(routing, "FEW", few)
    index, places = torch.arange(90, device=device).view(30, 3) % 7, torch.arange(7, dtype=torch.int32, device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody writes holds the largest integer
    try:
        assert not routing.route(index, places, 3, 1, Plan(tile(16), tile(16))).ready.numel()
        found = routing.route(index, places, 3, 1, join(tile(16)))
        assert found.ready.numel() == READY.value + 2 * sum(table.shape[1] for table in found.first)
        assert found.ready[0] == sum((table[0] >= 0).sum() for table in found.first)
        assert not found.ready[1:].any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("few", [routing.FEW, 0], ids=["few", "many"])
@pytest.mark.parametrize(("tokens", "top_k", "alone"), [(30, 3, 1), (200, 2, 0), (1, 1, 2)])
def test_records_of_pairs(tokens, top_k, alone, few, device, monkeypatch):
    """What a stream reads says the same as tiles and offsets: unit, where slots' entries begin and end, tile."""
    monkeypatch.setattr(routing, "FEW", few)
    index = torch.randint(-1, 9, (tokens, top_k), generator=torch.Generator().manual_seed(tokens), device="cpu")
    index[: tokens // 2] = 2  # more tiles than one
    places, index = torch.arange(8, dtype=torch.int32, device=device), index.to(device)
    plan = join(Tile("streamed", 16, 0, 64, 64, 8, 4))
    assert not routing.route(index, places, (8 - alone) // 2, alone + alone % 2, join(tile(16))).items.numel()
    found = routing.route(index, places, (8 - alone) // 2, alone + alone % 2, plan)
    units, numbers = (row.tolist() for row in found.first.packed)
    offsets, records = found.offsets.tolist(), found.items.view(-1, FIELDS.value).tolist()
    there = [(unit, number) for unit, number in zip(units, numbers, strict=True) if unit >= 0]
    assert len(there) > 0
    for tile_number, (unit, number) in enumerate(there):
        begin, middle, end = offsets[2 * unit : 2 * unit + 3]
        wanted = [unit, begin + 16 * number, middle, middle + 16 * number, end, tile_number]
        assert records[tile_number][2:] == wanted


def test_no_entry(device):
    found, *_ = made(torch.zeros(0, 2, dtype=torch.int64), 6, 2, tile(16), tile(32), device)
    assert found.order.numel() == 0
    assert found.offsets.tolist() == [0] * 8
    assert all(table.numel() == 0 for tiles in (found.first, found.second) for table in tiles)


@pytest.mark.parametrize("few", [routing.FEW, 0], ids=["few", "many"])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1024), (150, 1152), (40, 2880)])
def test_tokens_are_rewritten_on_the_way(tokens, columns, few, device, monkeypatch):
    """As by a kernel of its own, of rows that do not lie behind one another; tables stay as they were."""
    monkeypatch.setattr(routing, "FEW", few)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns + 24, generator=generator).bfloat16().to(device)[:, 8 : 8 + columns]
    x *= torch.logspace(-3, 3, tokens, device=device)[:, None].bfloat16()
    values, factors = e4m3_launch.empty(tokens, columns, x, 1)
    rows = routing.Rows(x, values, factors.fill_(7))
    values.view(torch.uint8).fill_(0xAA)
    index = torch.randint(-1, 9, (tokens, 3), generator=generator).to(device)
    places = torch.arange(8, dtype=torch.int32, device=device)
    plan = Plan(tile(16), tile(48, group=2))
    found, plain = (routing.route(index, places, 4, 0, plan, rows=given) for given in (rows, None))
    assert found.rows is rows
    wanted = e4m3_launch.prepared(x)
    assert torch.equal(rows.values.view(torch.uint8), wanted.values.view(torch.uint8))
    assert torch.equal(rows.factors, wanted.factors)
    tables = [(one.order, one.offsets, one.first.packed[0], one.second.packed[0]) for one in (found, plain)]
    assert all(torch.equal(own, other) for own, other in zip(*tables, strict=True))


@pytest.mark.parametrize("tokens", [33, 700])
def test_chunks_of_any_size(tokens, device, monkeypatch):
    """The last one not whole."""
    monkeypatch.setattr(routing, "FEW", 0)
    index = torch.randint(-1, 10, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
    for size in (256, 512, 1024, 2048):
        monkeypatch.setattr(routing, "CHUNK", size)
        check(index, 9, 3, tile(16), tile(48, group=2), device)


def test_chunks_grow_with_entries():
    assert [routing._chunk(entries) for entries in (1, 8192, 16384, 32768, 131072, 10**7)] == [
        256, 256, 512, 512, 1024, 2048,
    ]  # fmt: skip


@pytest.mark.parametrize("few", [routing.FEW, 0], ids=["few", "many"])
def test_units_with_most_work_come_first_where_programs_last_long(few, device, monkeypatch):
    """Where they do several blocks of rows in turn; the work of a pair is that of both its experts."""
    monkeypatch.setattr(routing, "FEW", few)
    counts = [3, 20, 0, 0, 17, 18, 40, 1, 5, 30, 33]  # of four pairs, then of three experts alone
    index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))][:, None]
    places = torch.arange(len(counts), dtype=torch.int32, device=device)
    monkeypatch.setattr(routing, "LONG", 16)
    plan = Plan(tile(16), replace(tile(16), mode="overlapped_pair", blocks=2))
    found = routing.route(index.to(device), places, 4, 3, plan)
    tables = [[column for column in table.T.tolist() if column[0] != -1] for table in found.first]
    assert tables[0] == [[3, 0], [3, 1], [3, 2], [2, 0], [2, 1], [0, 0], [0, 1]]
    assert tables[1] == [[2, 0], [2, 1], [2, 2], [1, 0], [1, 1], [0, 0]]
    plain = routing.route(index.to(device), places, 4, 3, Plan(tile(16), tile(16)))
    assert torch.equal(plain.order, found.order)
    units = [table[0][table[0] >= 0].tolist() for table in plain.first]
    assert units == [sorted(unit for unit, _ in table) for table in tables]


@pytest.mark.gpu
def test_many_entries(device):
    index = torch.randint(0, 128, (16384, 8), generator=torch.Generator().manual_seed(0))
    check(index, 128, 0, tile(128), tile(256, group=8), device)
