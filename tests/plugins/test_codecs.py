"""The codec `exponent`: fit, encode, decode, and packing a layer with it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from moefold import Activity, Codec, Context, DualMask, Experts, Groups, MergedPair, Packed, PairMerge
from moefold.codec import pack
from moefold.errors import FormatError
from moefold_kernels import layout, reference
from moefold_kernels.packing import PackedMatrices
from moefold_plugins import codecs
from moefold_plugins.codecs import Exponent, moefold_codecs
from moefold_plugins.puzzlemoe import puzzlemoe


def pair_of(weights: torch.Tensor, keep: torch.Tensor | None = None) -> MergedPair:
    """A pair whose magnitude is the first expert's."""
    keep = torch.ones_like(weights, dtype=torch.bool) if keep is None else keep
    return MergedPair(weights[0].float().abs(), weights < 0, keep)


def test_fit_is_the_exponent_of_the_largest_weight():
    codec = Exponent()
    assert codec.fit("gate_proj", torch.tensor([[[0.5, -1.0]], [[0.1, 0.9]]])) == 127
    assert codec.fit("gate_proj", torch.tensor([[[0.5, 0.25]]])) == 126
    assert codec.fit("gate_proj", torch.tensor([[[1.9999]]])) == 128  # rounds up to 2 in bf16
    assert codec.fit("gate_proj", torch.zeros(1, 2, 2)) == 1
    assert Exponent(window=130).fit("gate_proj", torch.ones(1, 1, 1)) == 130


def test_fit_takes_no_second_copy_of_the_layer():
    weights = torch.randn(8, 64, 64).bfloat16()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Exponent().fit("up_proj", weights)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 0 < allocated < weights.numel()  # half the layer's bytes


def test_fit_refuses_what_bf16_cannot_hold():
    for bad in (torch.inf, torch.nan, 3.4e38):
        with pytest.raises(FormatError, match="down_proj: weights lie in"):
            Exponent().fit("down_proj", torch.tensor([[[1.0, bad]]]))


def test_decode_gives_sign_keep_and_magnitude():
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(2, 16, 24, generator=generator) * 0.02).bfloat16()
    keep = torch.rand(2, 16, 24, generator=generator) < 0.7
    codec = Exponent()
    top = codec.fit("gate_proj", weights)
    coded = codec.encode(pair_of(weights, keep), top)
    assert coded.words.shape == (16, 24)
    assert coded.counts == {"clipped": 0, "flushed": 0}
    for slot in (0, 1):
        signed = torch.where(weights[slot] < 0, -weights[0].abs(), weights[0].abs())
        assert torch.equal(codec.decode(coded.words, top, slot), torch.where(keep[slot], signed, 0))


def test_a_user_window_clips_and_flushes_and_counts():
    codec = Exponent(window=120)
    pair = pair_of(torch.tensor([[[1.0, 2.0**-7, 1e-30, 0.0]]]).expand(2, 1, 4))
    coded = codec.encode(pair, codec.fit("up_proj", torch.ones(1, 1, 1)))
    assert coded.counts == {"clipped": 1, "flushed": 1}
    assert codec.decode(coded.words, 120, 0)[0].tolist() == [2.0**-7 * (2 - 2.0**-7), 2.0**-7, 0.0, 0.0]


def test_options_and_errors():
    for bad in ({"window": 0}, {"window": 255}, {"bits": 4}):
        with pytest.raises(ValidationError):
            Exponent(**bad)
    with pytest.raises(FormatError, match="must be finite and not negative"):
        Exponent().encode(pair_of(torch.full((2, 1, 1), torch.nan)), 120)
    with pytest.raises(FormatError, match="slots 0 and 1"):
        Exponent().decode(torch.zeros(1, 1, dtype=torch.int16), 120, 5)
    assert Exponent().size(3, 5) == 30
    assert [codec.name for codec in moefold_codecs()] == ["exponent"]


def test_packing_a_layer_counts_and_halves():
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(5, 12, 8, generator=generator).bfloat16()
    down = torch.randn(5, 8, 6, generator=generator).bfloat16()
    experts = Experts(gate_up, down)
    matrices = experts.matrices()
    pairs = [[3, 0], [1, 4]]
    merge = PairMerge(experts, pairs, [2], lambda name, index: pair_of(matrices[name][pairs[index]]))
    packed = pack(Exponent(), merge)
    assert packed.counts["weights"] == packed.counts["shared"] == 2 * 3 * 6 * 8
    assert packed.counts["clipped"] == packed.counts["flushed"] == 0
    assert packed.bytes() == 3 * 3 * 6 * 8 * 2
    for name, weights in matrices.items():
        first = Exponent().decode(packed.words[name][0], packed.settings[name], 0)
        assert torch.equal(first, torch.where(weights[3] < 0, -weights[3].abs(), weights[3].abs()))
        assert torch.equal(packed.experts[name][0], weights[2])


def test_each_pair_is_counted_by_itself():
    packed = pack(Exponent(window=120), merge_of())
    assert set(packed.pair_counts) == set(packed.counts)
    assert packed.pair_counts["weights"] == [3 * 6 * 8] * 2
    assert {name: sum(counts) for name, counts in packed.pair_counts.items()} == packed.counts
    first, second = packed.pair_counts["flushed"]
    assert first < second, "the second pair has tiny rows"


def merge_of(dtype: torch.dtype = torch.bfloat16, device: str = "cpu", bad: float = 0.0) -> PairMerge:
    """A dual-mask recipe for five experts of which one stays alone."""
    generator = torch.Generator().manual_seed(2)
    gate_up, down = (torch.randn(5, *shape, generator=generator) for shape in ((12, 8), (8, 6)))
    down[4, 2, 3] += bad
    down[[1, 4], 0] *= 2.0**-40
    experts = Experts(gate_up.to(dtype).to(device), down.to(dtype).to(device))
    activity = Activity(torch.arange(5), torch.rand(5, 8, generator=generator), torch.rand(5, 6, generator=generator))
    context = Context(torch.device(device), torch.Generator())
    return puzzlemoe(experts, Groups([[3, 0], [1, 4]], [2]), activity, context, threshold=0.4)


def at_once(matrices, pairs, norms, threshold, window=None) -> PackedMatrices:
    """What the fused pass does, by its definition."""
    words, tops, counts = {}, {}, {}
    for name, weights in matrices.items():
        used = weights[[expert for pair in pairs for expert in pair]]
        tops[name] = window or int(used.abs().max().bfloat16().view(torch.int16)) >> layout.FRACTION_BITS
        finite = torch.where(used.isfinite().all(), weights, 1)
        words[name], held = reference.pack_pairs(finite, pairs, norms[name], threshold, min(tops[name], 254))
        counts[name] = [*held.tolist()[:-1], int((~used.isfinite()).sum())]
    return PackedMatrices(words, tops, counts)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "can_pack", lambda *_: (True, "one pass"))
    monkeypatch.setattr(codecs, "pack_matrices", at_once)


def same(one: Packed, other: Packed) -> bool:
    told, others = ({k: v for k, v in packed.facts().items() if k != "pair_counts"} for packed in (one, other))
    return told == others and all(torch.equal(one.words[n], other.words[n]) for n in one.words)


@pytest.mark.parametrize("window", [None, 120])
def test_a_layer_at_once_is_what_pair_by_pair_gives(window, request, caplog):
    codec, merge = Exponent(window=window), merge_of()
    with caplog.at_level(logging.DEBUG, "moefold.pack"):
        expected = pack(codec, merge)
        request.getfixturevalue("fused")
        found = pack(codec, merge)
    assert same(found, expected)
    assert list(found.counts) == list(expected.counts)
    assert found.counts["flushed"] > 0
    assert (found.counts["clipped"] > 0) == (window == 120)
    slow = "pack.exponent: pair by pair in plain torch (the fused pass is for CUDA devices)"
    assert caplog.messages == [slow, "pack.exponent: one pass"]


@pytest.mark.usefixtures("fused")
def test_recipes_of_another_kind_go_pair_by_pair(monkeypatch):
    monkeypatch.setattr(codecs, "pack_matrices", None)
    merge = merge_of()
    norms = {name: values.double() for name, values in merge.rule.norms.items()}
    for other in (None, DualMask(norms, 0.4)):
        assert pack(Exponent(), replace(merge, rule=other)).counts["weights"] == 2 * 3 * 6 * 8


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(("bad", "window"), [(torch.inf, None), (torch.nan, None), (torch.inf, 254)])
def test_what_cannot_be_packed_at_once_is_refused_in_the_same_words(bad, window):
    codec, merge = Exponent(window=window), merge_of(bad=bad)
    with pytest.raises(FormatError) as at_once:
        pack(codec, merge)
    with pytest.raises(FormatError) as by_pair:
        pack(codec, replace(merge, rule=None))
    assert str(at_once.value) == str(by_pair.value)


def test_the_packer_says_why_it_is_slow():
    assert Exponent.packer(torch.device("cpu")).startswith("pair by pair in plain torch (the fused pass is for CUDA")
    assert Codec.packer(torch.device("cpu")) == "pair by pair, in plain torch"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 120])
def test_the_gpu_packs_what_the_cpu_packs(dtype, window, caplog):
    codec = Exponent(window=window)
    with caplog.at_level(logging.DEBUG, "moefold.pack"):
        assert same(pack(codec, merge_of(dtype, "cuda")), pack(codec, merge_of(dtype)))
    assert (
        caplog.messages[0]
        == "pack.exponent: one fused Triton pass"
        == f"pack.exponent: {codec.packer(torch.device('cuda'))}"
    )
    for bad in (torch.inf, torch.nan):
        with pytest.raises(FormatError, match="down_proj: weights lie in" if window is None else "."):
            pack(codec, merge_of(dtype, "cuda", bad))


@pytest.mark.gpu
def test_a_gpu_that_cannot_is_said_aloud(monkeypatch, caplog):
    monkeypatch.setattr(codecs, "can_pack", lambda *_: (False, "triton cannot be imported: no"))
    assert same(pack(Exponent(), merge_of(device="cuda")), pack(Exponent(), merge_of()))
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "triton cannot be imported" in caplog.text


def test_unpack_puts_decoded_experts_in_their_places(tmp_path):
    """Paired experts read as the codec decodes them; the one left alone, and biases, as in the model."""
    from models import tiny
    from moefold import Checkpoint, Context, Groups, PairMerge
    from moefold.codec import pack, unpack_stage
    from moefold_plugins.puzzlemoe import merge_pair

    layer = Checkpoint.open(str(tiny("gpt_oss", tmp_path / "model"))).layers()[0]
    own = layer.experts()
    groups = Groups([[0, 3], [2, 1]], [4, 5, 6, 7])
    norms = torch.ones(2, 1)

    def merge(matrix, pair):
        return merge_pair(own.matrices()[matrix][groups.members[pair]], norms, 0.4)

    packed = pack(Exponent(), PairMerge(own, groups.members, groups.alone, merge))
    context = Context(torch.device("cpu"), torch.Generator())
    read = unpack_stage(Exponent)(packed, layer, context)
    for matrix, weights in read.matrices().items():
        for index, pair in enumerate(groups.members):
            for slot, expert in enumerate(pair):
                merged = merge(matrix, index)
                sign = torch.where(merged.negative[slot], -1.0, 1.0)
                assert torch.equal(
                    weights[expert].float(), sign * merged.keep[slot] * merged.magnitude.bfloat16().float()
                )
        assert torch.equal(weights[groups.alone], own.matrices()[matrix][groups.alone])
    assert torch.equal(read.down_bias, own.down_bias)
