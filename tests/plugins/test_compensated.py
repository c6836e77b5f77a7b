"""Compensated merging against METHODS' own form of it: column by column, in float64, with the inverse's factor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models import tiny
from moefold import Checkpoint, Context, Experts, Groups, LevelTable, MergedPairs, Routed
from moefold.codec import pack, unpack
from moefold.errors import InputError, StageError
from moefold_kernels import layout_pairs
from moefold_plugins import compensated as stage
from moefold_plugins.codecs import Exponent
from moefold_plugins.compensated import compensated
from moefold_plugins.compensation import Walk, factor
from moefold_plugins.moments import Calibration
from moefold_plugins.pair_codecs import Pair4, Pair6
from moefold_plugins.pair_coding import PairCoder, Window
from moefold_plugins.pair_merging import Merge, Rules

ANY = Window(0.0, 3e38)


def correlated(columns: int, seed: int, rank: int = 6) -> Tensor:
    """A second moment matrix of inputs that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    inputs += 0.5 * torch.randn(400, columns, generator=generator)
    return inputs.T @ inputs / 400


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Weights [1, 2, columns, rows] and moments [1, 2, columns, columns]."""
    weights = torch.randn(1, 2, 48, 20, generator=torch.Generator().manual_seed(1))
    return weights, torch.stack([correlated(48, 2), 0.3 * correlated(48, 3)])[None]


def walked(weights: Tensor, moments: Tensor, block: int = 16, sweeps: int = 0) -> tuple[Walk, list[Tensor]]:
    walk = Walk(weights, PairCoder(ANY, torch.ones(*weights.shape[:2], weights.shape[3])), block, torch.bfloat16)
    damages = [walk.first(factor(moments.clone(), 1e-9))]
    return walk, damages + [walk.again(moments) for _ in range(sweeps)]


def best(first: float, second: float, ci: float, cj: float) -> tuple[float, float]:
    """What a position of both experts reads: the cheapest of three candidates, rounded to bf16."""
    a, b = abs(first), abs(second)
    shared, one, two = torch.tensor([(ci * a + cj * b) / (ci + cj), a, b]).bfloat16().tolist()
    costs = [
        (ci * (a - shared) ** 2 + cj * (b - shared) ** 2, shared, shared),
        (ci * (a - one) ** 2 + cj * b**2, one, 0.0),
        (ci * a**2 + cj * (b - two) ** 2, 0.0, two),
    ]
    _, x, y = min(costs)
    return (x if first >= 0 else -x), (y if second >= 0 else -y)


def by_hand(weights: Tensor, moments: Tensor) -> Tensor:
    """METHODS 2: W_e[:, k+1:] -= ((W_e[:, k] - Q_e[:, k]) / U_e[k, k]) U_e[k, k+1:], with H_e^-1 = U_e^T U_e."""
    work = weights[0].double().mT.clone()  # [2, rows, columns]
    upper = [torch.linalg.cholesky(torch.linalg.inv(h.double()), upper=True) for h in moments[0]]
    out = torch.zeros_like(work)
    for k in range(work.shape[2]):
        ci, cj = (float(1 / u[k, k] ** 2) for u in upper)
        for row in range(work.shape[1]):
            out[0, row, k], out[1, row, k] = best(float(work[0, row, k]), float(work[1, row, k]), ci, cj)
        for e, u in enumerate(upper):
            error = (work[e, :, k] - out[e, :, k]) / u[k, k]
            work[e, :, k + 1 :] -= error[:, None] * u[k, k + 1 :]
    return out.mT[None]


def cost(weights: Tensor, read: Tensor, moments: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T) by expert: [1, 2]."""
    off = weights.double() - read.double()
    return ((moments.double() @ off) * off).sum(dim=(2, 3))


def test_the_first_walk_is_gptqs_for_two_experts(pair):
    expected = by_hand(*pair)
    walk, damage = walked(*pair)
    same = (walk.read.double() == expected).all(dim=1).float().mean()
    assert same > 0.97  # ties that float32 breaks otherwise, and what follows from them in that row
    torch.testing.assert_close(cost(pair[0], walk.read, pair[1]), cost(pair[0], expected, pair[1]), rtol=0.02, atol=0)
    torch.testing.assert_close(damage[0].double(), cost(pair[0], walk.read, pair[1]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("block", [1, 7, 48, 128])
def test_blocks_change_nothing_but_rounding(pair, block):
    one, other = walked(*pair, block=16)[0].read, walked(*pair, block=block)[0].read
    assert (one == other).float().mean() > 0.97
    torch.testing.assert_close(cost(pair[0], one, pair[1]), cost(pair[0], other, pair[1]), rtol=0.02, atol=0)


def test_compensation_loses_less_than_choosing_alone_and_sweeps_less_still(pair):
    weights, moments = pair
    alone = walked(weights, torch.diag_embed(moments.diagonal(dim1=-2, dim2=-1)))[0].read
    walk, damages = walked(weights, moments, sweeps=3)
    totals = [float(damage.sum()) for damage in damages]
    assert totals[0] < 0.6 * float(cost(weights, alone, moments).sum())
    assert totals[1] < 0.95 * totals[0]
    assert totals == sorted(totals, reverse=True)
    torch.testing.assert_close(damages[-1].double(), cost(weights, walk.read, moments), rtol=1e-3, atol=0)


def test_equal_experts_are_merged_without_loss(pair):
    weights = pair[0][:, :1].bfloat16().expand(-1, 2, -1, -1) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    walk, damages = walked(weights.float(), pair[1], sweeps=1)
    assert torch.equal(walk.read.float(), weights.float())
    assert float(damages[-1].sum()) == 0


def test_a_moment_without_a_factor_has_its_damping_raised_and_counted():
    broken = torch.diag(torch.tensor([1.0, -0.05, 1.0, 1.0]))
    good = torch.eye(4)
    factors = factor(torch.stack([good, broken]), 0.01)
    assert factors.raised == [0, 1]
    root = factors.unit[1] * factors.cost[1].sqrt()
    torch.testing.assert_close(root @ root.T, broken + torch.eye(4) * 0.1 * float(broken.diagonal().mean()))
    with pytest.raises(StageError, match="no Cholesky factor"):
        factor(torch.diag(torch.tensor([1.0, -1e9, 1e9, 1.0]))[None], 1e-9)
    with pytest.raises(StageError, match="not finite"):
        factor(torch.full((1, 2, 2), torch.nan), 0.01)


def test_the_factor_is_that_of_the_moments():
    moment = correlated(30, 5)
    factors = factor(moment.clone()[None], 0.01)
    root = factors.unit[0] * factors.cost[0].sqrt()
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root @ root.T, moment + 0.01 * moment.diagonal().mean() * torch.eye(30))
    assert factor(torch.zeros(1, 3, 3), 0.01).cost.tolist() == [[1.0] * 3]  # nothing seen, nothing known


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory):
    return Checkpoint.open(str(tiny("qwen3_moe", tmp_path_factory.mktemp("tiny") / "m", num_hidden_layers=2))).layers()[
        0
    ]


@pytest.fixture
def routed(layer) -> Routed:
    """Tokens that reach experts 0 to 5 of 8: the last two are starved."""
    generator = torch.Generator().manual_seed(4)
    hidden = layer.experts().gate_up.shape[2]
    tokens = torch.randn(300, hidden, generator=generator) @ torch.randn(hidden, hidden, generator=generator)
    tokens = tokens.bfloat16()
    index = torch.rand(300, 6, generator=generator).argsort(dim=1)[:, :2]
    return Routed(tokens[None], tokens, index, torch.rand(300, 2, generator=generator))


CONTEXT = Context(torch.device("cpu"), torch.Generator())
PAIRS = Groups([[0, 6], [1, 7], [2, 5]], [3, 4])


def test_what_is_merged_packs_exactly(layer, routed):
    merged = compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT)
    packed = pack(Exponent(), merged)
    assert packed.counts["clipped"] == packed.counts["flushed"] == 0
    for matrix, weights in unpack(Exponent(), packed, layer, CONTEXT.device).matrices().items():
        for index, members in enumerate(PAIRS.members):
            for slot, expert in enumerate(members):
                assert torch.equal(weights[expert].bfloat16(), merged.read(matrix, index, slot))
        assert torch.equal(weights[PAIRS.alone], layer.experts().matrices()[matrix][PAIRS.alone])


@pytest.mark.parametrize("codec", [Pair4, Pair6])
@pytest.mark.parametrize("table", [False, True])
def test_few_bits_are_laid_out_exactly(layer, routed, codec, table):
    values = [0.3, 0.55, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0]
    bits = layout_pairs.magnitude_bits(codec.name)
    spread = torch.tensor(values if bits == 3 else [0.5, 1.5]).bfloat16().tolist()
    levels, experts = LevelTable({str(bits): spread}) if table else None, layer.experts()
    if not table:  # enough weights to learn levels from
        wide = torch.randn(4, 2 * 64, 64).bfloat16(), torch.randn(4, 64, 64).bfloat16()
        merge = Merge(Experts(*wide), Groups([[0, 1], [2, 3]], []), Rules(format=codec.name))
        index = routed.top_k_index % 4
        merge.add([[0, 1], [2, 3]], Calibration(layer, replace(routed, top_k_index=index), Experts(*wide), 256.0))
        packed = pack(codec(), merge.done())
        assert packed.counts["clipped"] == 0
        return
    merged = compensated(layer, routed, experts, PAIRS, levels, CONTEXT, format=codec.name)
    packed = pack(codec(), merged)
    for matrix in experts.matrices():
        for index in range(len(PAIRS.members)):
            for slot in (0, 1):
                got = codec().decode(packed.words[matrix][index], packed.settings[matrix], slot)
                assert torch.equal(got, merged.read(matrix, index, slot))


def test_starved_experts_survive_and_are_named(layer, routed):
    merged = compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT, weigh="usage")
    assert merged.figures["unseen"] == [6, 7]
    assert all(bool(values.isfinite().all()) for values in merged.magnitude.values())
    assert sum(merged.figures["tokens"].values()) < 2 * len(routed.tokens)
    no_blend = compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT, blend=0.0)
    assert all(bool(values.isfinite().all()) for values in no_blend.magnitude.values())


@pytest.mark.parametrize("together", [False, True])
def test_chunks_change_no_result_but_down_coded_once_more(layer, routed, monkeypatch, together):
    """Which then makes up for what is coded so far."""
    at_once = compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT, together=together)
    monkeypatch.setattr(stage, "BUDGET", 1)
    assert [len(part) for part in stage.chunks(PAIRS.members, layer.experts())] == [1, 1, 1]
    one_by_one = compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT, together=together)
    assert at_once.figures["tokens"] == one_by_one.figures["tokens"]
    for matrix, values in at_once.magnitude.items():
        same = (values == one_by_one.magnitude[matrix]).float().mean()
        assert (same > 0.99) == (matrix != "down_proj" or not together)


def test_usage_gives_the_busy_expert_its_way(layer, routed):
    def damage(weigh: str) -> Tensor:
        merged = compensated(
            layer, routed, layer.experts(), Groups([[0, 6]], [1, 2, 3, 4, 5, 7]), None, CONTEXT, weigh=weigh
        )
        return torch.tensor(merged.figures["damage"]["down"][0])

    assert damage("usage")[0] < damage("equal")[0]
    assert damage("usage")[1] > damage("equal")[1]


def test_order_by_activation_merges_the_same_positions(layer, routed):
    natural, other = (
        compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT, order=order, neurons="natural")
        for order in ("natural", "activation")
    )
    for matrix, weights in layer.experts().matrices().items():
        for merged in (natural, other):
            off = merged.read(matrix, 0, 0).float() - weights[0].float()
            assert off.square().mean() < weights[0].float().square().mean()
    with pytest.raises(InputError, match="write order: natural"):
        compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT, order="activation", format="pair6")


def test_it_can_be_stored(layer, routed, tmp_path):
    merged = compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT)
    merged.save(tmp_path / "a")
    again = MergedPairs.load(tmp_path / "a")
    assert pack(Exponent(), again).facts() == pack(Exponent(), merged).facts()
    none = compensated(layer, routed, layer.experts(), Groups([], list(range(8))), None, CONTEXT)
    assert pack(Exponent(), none).pairs == []


def test_what_is_no_pair_or_another_format_is_refused(layer, routed):
    with pytest.raises(InputError, match="merges pairs"):
        compensated(layer, routed, layer.experts(), Groups([[0, 1, 2]], [3, 4, 5, 6, 7]), None, CONTEXT)
    merged = compensated(layer, routed, layer.experts(), PAIRS, None, CONTEXT)
    with pytest.raises(InputError, match=r"use pack\.exponent"):
        pack(Pair4(), merged)
