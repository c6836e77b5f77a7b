"""The codec `exponent`: fit, encode, decode, and packing a layer with it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from moefold import Experts, MergedPair, PairMerge
from moefold.codec import pack
from moefold.errors import FormatError
from moefold_plugins.codecs import Exponent, moefold_codecs


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
