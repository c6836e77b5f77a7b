"""The codecs pair4 to pair8: levels and scales, exactness, packing a layer, the stages, saving."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merged_layers import GROUPS, PROVENANCE, load, logits
from merged_layers import merged as merged_experts
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from models import samples, tiny
from moefold import (
    Checkpoint,
    Context,
    Experts,
    Layers,
    LeveledPair,
    Levels,
    LevelTable,
    MergedPair,
    MergedPairs,
    Packed,
    PairMerge,
    fused,
)
from moefold.codec import pack, pack_stage, unpack_stage
from moefold.errors import FormatError, InputError
from moefold_kernels import layout_pairs
from moefold_plugins.codecs import Exponent
from moefold_plugins.pair_codecs import FewBits, levels, moefold_codecs, sample
from moefold_plugins.save import save

CODECS = {codec.name: codec for codec in moefold_codecs()}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fitted(codec: FewBits, columns: int):
    """Settings with levels of Gaussian weights."""
    return codec.fit("up_proj", normal(4, 200, 64)) | {"columns": columns}


def merged(rows: int, columns: int, seed: int = 0) -> MergedPair:
    """A merge in which every position is kept by both, the first, or the second."""
    choice = torch.randint(3, (rows, columns), generator=torch.Generator().manual_seed(seed))
    keep = torch.stack([choice != 1, choice != 2])
    return MergedPair(normal(rows, columns, seed=seed).abs(), normal(2, rows, columns, seed=seed + 1) < 0, keep)


def read(codec: FewBits, coded, columns_settings) -> torch.Tensor:
    return torch.stack([codec.decode(coded.words, columns_settings, slot) for slot in (0, 1)])


@pytest.mark.parametrize("name", CODECS)
def test_magnitudes_are_rounded_and_signs_and_masks_kept(name):
    codec, pair = CODECS[name](), merged(20, 130)
    told = fitted(codec, 130)
    coded = codec.encode(pair, told)
    assert coded.words.dtype == torch.int16
    assert coded.words.numel() * 2 == codec.size(20, 130)
    assert coded.counts == {"clipped": 0, "flushed": 0, "filled": 0}
    found = read(codec, coded, told)
    assert torch.equal(found != 0, pair.keep)
    assert torch.equal((found < 0) & pair.keep, pair.negative & pair.keep)
    error = (found.float().abs().amax(0) - pair.magnitude).square().sum() / pair.magnitude.square().sum()
    assert error < {"pair4": 0.14, "pair5": 0.045, "pair6": 0.012, "pair8": 0.002}[name]


@pytest.mark.parametrize("name", CODECS)
def test_what_is_in_levels_is_coded_exactly_and_again_the_same(name):
    codec = CODECS[name]()
    told, (_, negative, keep) = fitted(codec, 70), merged(6, 70)
    level = torch.randint(1 << codec.bits, (6, 70), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    scale = (normal(6, 2).abs() + 0.1).bfloat16()
    coded = codec.lay(LeveledPair(level, scale, negative & keep, keep), told)
    table = torch.tensor(told["levels"]).bfloat16()
    exact = table[level.long()] * scale.repeat_interleave(64, 1)[:, :70]
    expected = torch.where(negative, -exact, exact) * keep
    assert torch.equal(read(codec, coded, told), expected)
    pairs = MergedPairs(name, [[0, 1]], [], {"up_proj": exact[None]},
                        {"up_proj": MergedPairs.flag((negative & keep)[None], keep[None])}, {},
                        {"up_proj": scale[None]}, {"up_proj": {"levels": told["levels"]}})  # fmt: skip
    again = pack(codec, pairs)
    assert torch.equal(again.words["up_proj"][0], coded.words)
    assert {name: sum(counts) for name, counts in again.pair_counts.items()} == again.counts
    assert again.counts["weights"] == again.counts["shared"] + again.counts["own"] + again.counts["other"] == 6 * 70
    off = replace(pairs, magnitude={"up_proj": exact[None] * 1.25})
    with pytest.raises(FormatError, match=rf"up_proj of pair 0: \d+ magnitudes are no level of {name}"):
        pack(codec, off)


def test_pairs_that_came_from_the_store_are_packed_where_the_run_computes():
    """A stage's results in another process, or after a crash, are read to the CPU, where packing takes minutes."""
    moved = []

    class Watched(MergedPairs):
        def to(self, device: torch.device) -> Watched:
            moved.append(device)
            return super().to(device)

    pair = merged(6, 70)
    magnitude, flags = (
        {"up_proj": pair.magnitude[None]},
        {"up_proj": MergedPairs.flag(pair.negative[None], pair.keep[None])},
    )
    pairs = Watched("exponent", [[0, 1]], [], magnitude, flags, {}, {"up_proj": torch.ones(1, 6, 2)})
    away = pairs.to(torch.device("meta"))
    assert {part["up_proj"].device.type for part in (away.magnitude, away.flags, away.scale)} == {"meta"}
    context = Context(torch.device("cpu"), torch.Generator())
    packed = pack_stage(Exponent)(pairs, context=context)
    assert moved == [torch.device("meta"), context.device]
    assert torch.equal(packed.words["up_proj"], pack(Exponent(), pairs).words["up_proj"])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([*CODECS]), st.integers(1, 5), st.integers(1, 140), st.integers(0, 1000), st.floats(-30, 30))
def test_coding_is_idempotent_at_any_size(name, rows, columns, seed, exponent):
    """What was read codes to the same values, as long as the scale is the same."""
    codec, pair = CODECS[name](), merged(rows, columns, seed)
    pair = pair._replace(magnitude=pair.magnitude * 2.0**exponent)
    told = fitted(codec, columns)
    grid = Levels(codec.bits, tuple(told["levels"])).on("cpu")
    scale = grid.scales(pair.magnitude)
    each = scale.repeat_interleave(64, 1)[:, :columns]
    level, values = grid.round(pair.magnitude, each)
    assert torch.equal(grid.round(values, each)[0], level)
    assert torch.equal(read(codec, codec.encode(pair, told), told).float().abs().amax(0), values)


def test_positions_that_nobody_keeps_are_counted():
    codec, pair = CODECS["pair6"](), merged(4, 64)
    pair.keep[:, 0, :5] = False
    told = fitted(codec, 64)
    coded = codec.encode(pair, told)
    assert coded.counts["filled"] == 5
    found = read(codec, coded, told)
    assert (found[0, 0, :5] > 0).all()  # the smallest there is: the format has no zero
    assert (found[1, 0, :5] == 0).all()
    assert found[0, 0, 0] == found[:, 0].abs()[found[:, 0] != 0].min()
    assert (found[0, 0, :5] == found[0, 0, 0]).all()


def test_a_group_of_zeros_reads_zero():
    codec, pair = CODECS["pair4"](), merged(2, 128)
    pair.magnitude[1, :64] = 0
    told = fitted(codec, 128)
    found = read(codec, codec.encode(pair, told), told)
    assert (found[:, 1, :64] == 0).all()
    assert (found[:, 1, 64:] != 0).any()


def test_refusals():
    codec = CODECS["pair6"]()
    told = fitted(codec, 64)
    for bad in (torch.nan, torch.inf, -1.0):
        pair = merged(2, 64)
        pair.magnitude[0, 0] = bad
        with pytest.raises(FormatError, match="must be finite and not negative"):
            codec.encode(pair, told)
    with pytest.raises(FormatError, match="settings are for 64"):
        codec.encode(merged(2, 65), told)
    with pytest.raises(FormatError, match="rows of pair6"):
        codec.decode(torch.zeros(2, 3, dtype=torch.int16), told, 0)
    with pytest.raises(FormatError, match="pair6 has 8 positive levels"):
        CODECS["pair6"](levels=[0.5, 1.0]).fit("up_proj", normal(2, 4, 64))
    with pytest.raises(FormatError, match=r"up_proj: .*too few"):
        codec.fit("up_proj", normal(2, 1, 8))
    with pytest.raises(ValidationError):
        CODECS["pair6"](window=3)


def test_levels_of_a_model_are_learnt_once(tmp_path):
    checkpoint = Checkpoint.open(str(tiny("qwen3_moe", tmp_path / "model")))
    table = levels(checkpoint, layers=2)
    assert table.sampled["layers"] == [0, 2]
    assert levels(checkpoint, layers=99).sampled["layers"] == [0, 1, 2]
    doubled = {bits: [2 * level for level in values] for bits, values in table.values.items()}  # nobody learns those
    LevelTable(doubled).save(tmp_path / "table")
    again = LevelTable.load(tmp_path / "table")
    merge = merge_of(checkpoint.layers()[0].experts())
    for name, codec in CODECS.items():
        packed = pack_stage(codec)(merge, again)
        own = list(again.levels(codec().bits).values)
        assert [told["levels"] for told in packed.settings.values()] == [own] * 3
        assert pack_stage(codec)(merge).settings["up_proj"]["levels"] != own
        mine = [float(i + 1) for i in range(1 << codec().bits)]
        assert pack_stage(codec)(merge, again, levels=mine).settings["up_proj"]["levels"] == mine, name


def test_a_sample_is_of_merged_magnitudes():
    """Their root mean square is that of the scale, and a quarter of two experts' weights is in the sum, at least."""
    found = sample(normal(6, 50, 100))
    assert len(found) == 3 * 50 * 100
    assert found.square().mean() == pytest.approx(1, rel=1e-4)
    assert len(sample(normal(6, 50, 100), 5000)) <= 5000 + 3 * 100
    same = normal(1, 50, 64).expand(2, 50, 64)
    rms = same[0].square().mean(1, keepdim=True).sqrt()
    assert torch.allclose(sample(same).view(50, 64), same[0].abs() / rms)


def merge_of(experts: Experts, pairs=((0, 5), (7, 1), (2, 3))) -> PairMerge:
    """Means where weights agree, else the larger one alone."""
    matrices = experts.matrices()

    def merge(name: str, index: int) -> MergedPair:
        weights = matrices[name][list(pairs[index])]
        first, second = weights.float().abs()
        shared = (first - second).abs() <= 0.4 * (first + second)
        magnitude = torch.where(shared, (first + second) / 2, torch.maximum(first, second))
        return MergedPair(magnitude, weights < 0, torch.stack([shared | (first >= second), shared | (first < second)]))

    alone = sorted(set(range(experts.count)) - {expert for pair in pairs for expert in pair})
    return PairMerge(experts, [list(pair) for pair in pairs], alone, merge)


BANDS = {"hidden_size": 128, "intermediate_size": 128}


@pytest.mark.parametrize(
    ("family", "name", "sizes"),
    [
        ("mixtral", "pair5", {}),
        ("gpt_oss", "pair4", {}),
        ("deepseek_v3", "pair8", {}),
        *(("mixtral", name, BANDS) for name in CODECS),
        ("gpt_oss", "pair6", BANDS),
    ],
)
def test_what_is_saved_loads_as_packed(family, name, sizes, tmp_path):
    """From a codec through the files to transformers and the streaming reader, and back through `unpack`."""
    settings = {"num_hidden_layers": 2} | sizes
    source, codec = Checkpoint.open(str(tiny(family, tmp_path / "source", **settings))), CODECS[name]
    layers: dict[int, Packed] = {layer.number: pack(codec(), merge_of(layer.experts())) for layer in source.layers()}
    saved = save(source, Layers(layers), None, PROVENANCE, to=tmp_path / "out", shard_size="60KB")
    assert saved.figures["format"] == name
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    again, context = Checkpoint.open(str(tmp_path / "out")), Context(torch.device("cpu"), torch.Generator())
    for layer in again.layers():
        packed = layers[layer.number]
        lines, _ = again.header(again.packed_layers[layer.number].packed(0, "down_proj"))[0]
        assert lines == (128 // layout_pairs.BAND if sizes else source.layer(layer.number).experts().down.shape[1])
        if sizes:
            assert (
                again.header(again.packed_layers[layer.number].packed(0, "up_proj"))[0][0] == 128 // layout_pairs.BAND
            )
        shapes = [weights.shape[1:] for weights in layer.experts().matrices().values()]
        held = 3 * sum(layout_pairs.size(name, *shape) for shape in shapes)
        assert packed.bytes() == held + 2 * sum(2 * rows * columns for rows, columns in shapes)  # scales are counted
        unpacked = unpack_stage(codec)(packed, source.layer(layer.number), context).matrices()
        for matrix, weights in layer.experts().matrices().items():
            assert torch.equal(weights, unpacked[matrix])
            assert torch.equal(weights[4], source.layer(layer.number).experts().matrices()[matrix][4])
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize()
    model.set_experts_implementation("eager")
    dense.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(model(samples(2, 9)).logits, dense(samples(2, 9)).logits)


@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "pair6"), ("gpt_oss", "pair8")])
def test_merged_experts_are_packed_with_their_route(family, name, tmp_path):
    """Five experts of eight router outputs: the saved model is the one in which decoded experts are repeated."""
    source, codec = Checkpoint.open(str(tiny(family, tmp_path / "source", num_hidden_layers=2))), CODECS[name]
    context, values = Context(torch.device("cpu"), torch.Generator()), {}
    for layer in source.layers():
        few = merged_experts(layer.experts(), GROUPS)
        values[layer.number] = pack(codec(), merge_of(few, ((3, 0), (1, 4))))
    save(source, Layers(values), None, PROVENANCE, to=tmp_path / "ours")
    model, twin = load(tmp_path / "ours"), load(source.path)
    for number, value in values.items():
        read = unpack_stage(codec)(value, source.layer(number), context)
        assert read.route is not None
        assert torch.equal(Checkpoint.open(str(tmp_path / "ours")).layer(number).experts().down, read.down)
        parts = (getattr(read, part) for part in ("gate_up", "down", "gate_up_bias", "down_bias"))
        every = Experts(*(None if part is None else part[read.route] for part in parts), gated=read.gated)
        (module,) = (m for n, m in twin.named_modules() if f"layers.{number}." in n and hasattr(m, "is_concatenated"))
        for stored, weights in layer_parameters(module, every):
            stored.data.copy_(weights)
    assert torch.equal(logits(model), logits(twin))


def layer_parameters(module, experts: Experts):
    """A stock module's parameters, and experts in its own layout."""
    names = ("gate_up_proj", "down_proj", *(("gate_up_proj_bias", "down_proj_bias") if module.has_bias else ()))
    own = fused.in_own_layout(module, experts)
    return [(getattr(module, name), own[name]) for name in names]


def test_a_model_of_one_expert_a_layer_has_no_pairs(tmp_path):
    path = tiny("mixtral", tmp_path / "m", num_local_experts=1, num_experts_per_tok=1, num_hidden_layers=1)
    with pytest.raises(InputError, match="has no layer with two experts, of which a pair could be made"):
        levels(Checkpoint.open(str(path)))
