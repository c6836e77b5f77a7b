"""The format's definition, against bf16 itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold_kernels import FormatError, PackedExperts, decode, decode_pairs, encode, experts, layout

EVERY_FINITE = torch.arange(0, 255 << 7, dtype=torch.int16).view(torch.bfloat16)  # every finite bf16 >= 0
STATES = [(n0, n1, k0, k1) for n0 in (0, 1) for n1 in (0, 1) for k0 in (0, 1) for k1 in (0, 1)]


def flags(state, shape) -> tuple[torch.Tensor, torch.Tensor]:
    """negative and keep [2, ...] of one of the 16 states everywhere."""
    n0, n1, k0, k1 = (torch.full(shape, bool(value)) for value in state)
    return torch.stack([n0, n1]), torch.stack([k0, k1])


def exponents(values: torch.Tensor) -> torch.Tensor:
    """The biased exponents of bf16 values."""
    return values.view(torch.int16).long() >> 7


@pytest.mark.parametrize("top", [1, 2, 31, 32, 33, 100, 127, 143, 200, 253, 254])
def test_every_magnitude_and_state(top):
    low, high = layout.low(top), layout.high(top)
    inside = (exponents(EVERY_FINITE) >= low) & (exponents(EVERY_FINITE) <= high)
    largest = torch.tensor(layout.largest(top), dtype=torch.int16).view(torch.bfloat16)
    for state in STATES:
        negative, keep = flags(state, EVERY_FINITE.shape)
        words, counts = encode(EVERY_FINITE.float(), negative, keep, top)
        below, above = exponents(EVERY_FINITE) < low, exponents(EVERY_FINITE) > high
        kept_any = bool(state[2] or state[3])
        assert counts["flushed"] == int((below & (EVERY_FINITE > 0)).sum()) * kept_any
        assert counts["clipped"] == int(above.sum()) * kept_any
        for slot in (0, 1):
            value = torch.where(inside, EVERY_FINITE, torch.where(above, largest, 0.0))
            expected = torch.where(negative[slot] & (value > 0), -value, value) if state[2 + slot] else value * 0
            got = decode(words, top, slot)
            assert torch.equal(got.view(torch.int16), expected.to(torch.bfloat16).view(torch.int16))
        assert torch.equal(words == 0, ~(keep.any(0)) | below)


@pytest.mark.parametrize("top", range(1, 255))
def test_every_window_is_exact_inside(top):
    inside = (exponents(EVERY_FINITE) >= layout.low(top)) & (exponents(EVERY_FINITE) <= layout.high(top))
    values = EVERY_FINITE[inside]
    assert len(values) == 32 * 128
    negative = torch.stack([torch.ones_like(values, dtype=torch.bool), torch.zeros_like(values, dtype=torch.bool)])
    words, counts = encode(values.float(), negative, torch.ones_like(negative), top)
    assert torch.equal(decode_pairs(words[None], top)[0], torch.stack([-values, values]))
    assert counts == {"weights": 4096, "shared": 4096, "own": 0, "other": 0, "zero": 0, "clipped": 0, "flushed": 0}


def test_bit_positions_are_the_papers():
    magnitude = torch.tensor([1.5])  # exponent 127, fraction 1000000
    for (n0, n1, k0, k1), expected in {
        (1, 0, 1, 1): 0b1011_11111_1000000,
        (0, 1, 1, 1): 0b0111_11111_1000000,
        (0, 0, 1, 0): 0b0010_11111_1000000,
        (0, 1, 0, 1): 0b0101_11111_1000000,
        (1, 1, 0, 0): 0,
        (1, 1, 1, 0): 0b1010_11111_1000000,  # the slot that is not kept has no sign
    }.items():
        words, _ = encode(magnitude, *flags((n0, n1, k0, k1), (1,)), top=127)
        assert words.item() & 0xFFFF == expected


def test_the_keep_bit_restores_the_exponent():
    top = 131
    words, _ = encode(EVERY_FINITE.float(), *flags((0, 0, 1, 1), EVERY_FINITE.shape), top)
    kept = words[words != 0]
    value = ((kept & layout.MAGNITUDE_BITS) | 1 << layout.KEEP_SHIFT[0]).view(torch.bfloat16).float()
    assert torch.equal(value * 2.0 ** (layout.low(top) - 64), decode(kept, top, 0).float())


def test_rounding_is_to_nearest_even_and_once():
    one, step = 1.0, 2.0**-7
    magnitude = torch.tensor([one + step / 2, one + 1.5 * step, one + step / 2 + 2.0**-20, one + step / 2 - 2.0**-20])
    words, _ = encode(magnitude, *flags((0, 0, 1, 1), (4,)), top=130)
    assert decode(words, 130, 1).tolist() == [one, one + 2 * step, one + step, one]


def test_a_carry_above_the_window_is_clipped_and_counted():
    just_below_two = torch.tensor([2.0 - 2.0**-12, 1.0])  # rounds to 2.0: exponent 128
    words, counts = encode(just_below_two, *flags((1, 0, 1, 1), (2,)), top=127)
    assert decode(words, 127, 0).tolist() == [-(2.0 - 2.0**-7), -1.0]
    assert (counts["clipped"], counts["flushed"]) == (1, 0)


def test_a_window_from_the_largest_rounded_magnitude_clips_nothing():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-37, 1e-20, 1.0, 1e30):
        weights = (torch.randn(2, 64, 64, generator=generator) * scale).bfloat16()
        top = max(int(exponents(weights.abs()).max()), 1)
        mean = weights.float().abs().mean(0)
        _, counts = encode(mean, weights < 0, torch.ones(2, 64, 64, dtype=torch.bool), top)
        assert counts["clipped"] == 0


def test_the_largest_float32_is_clipped_not_infinite():
    top = layout.LARGEST_EXPONENT
    words, counts = encode(torch.tensor([3.4028234e38]), *flags((0, 0, 1, 1), (1,)), top)
    assert decode(words, top, 0).item() == torch.finfo(torch.bfloat16).max
    assert counts["clipped"] == 1


@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 33),
    top=st.integers(32, 254),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_odd_shapes_round_trip(rows, columns, top, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(layout.smallest(top), layout.largest(top) + 1, (rows, columns), generator=generator)
    magnitude = bits.to(torch.int16).view(torch.bfloat16)
    negative, keep = torch.randint(2, (2, 2, rows, columns), generator=generator).bool()
    words, counts = encode(magnitude.to(dtype), negative, keep, top)
    assert words.shape == (rows, columns)
    for slot in (0, 1):
        signed = torch.where(negative[slot], -magnitude, magnitude)
        assert torch.equal(decode(words, top, slot), torch.where(keep[slot], signed, torch.zeros_like(signed)))
    assert counts["shared"] + counts["own"] + counts["other"] + counts["zero"] == counts["weights"] == rows * columns
    assert counts["own"] == int((keep[0] & ~keep[1]).sum())


def test_views_decode_as_copies_do():
    words = torch.randint(-(2**15), 2**15, (3, 10, 7)).to(torch.int16)
    part = words[:, 2:9:3].transpose(1, 2)
    assert torch.equal(decode(part, 140, 1), decode(part.contiguous(), 140, 1))


def test_meta_tensors_give_shapes():
    magnitude = torch.empty(5, 6, device="meta")
    both = torch.empty(2, 5, 6, device="meta", dtype=torch.bool)
    words, counts = encode(magnitude, both, both, 130)
    assert (words.shape, words.dtype, words.device.type, counts) == ((5, 6), torch.int16, "meta", {})
    assert decode(words, 130, 0).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_magnitudes_that_are_none(bad):
    with pytest.raises(FormatError, match="must be finite and not negative"):
        encode(torch.tensor([1.0, bad]), *flags((0, 0, 1, 1), (2,)), top=130)


@pytest.mark.parametrize("top", [0, 255, -3, 1.5, True, None])
def test_tops_that_are_none(top):
    with pytest.raises(FormatError, match="from 1 to 254"):
        layout.low(top)


def test_wrong_flags_dtypes_and_slots():
    with pytest.raises(FormatError, match=r"keep is \(2, 3\) torch.uint8; write bool of shape \(2, 3\)"):
        encode(torch.ones(3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.uint8), 130)
    with pytest.raises(FormatError, match="floating point"):
        encode(torch.ones(3, dtype=torch.int64), *flags((0, 0, 1, 1), (3,)), 130)
    with pytest.raises(FormatError, match="slots 0 and 1"):
        decode(torch.zeros(3, dtype=torch.int16), 130, 2)
    with pytest.raises(FormatError, match=r"int16, not torch\.int32"):
        decode(torch.zeros(3, dtype=torch.int32), 130, 0)


def test_the_layer_is_decode_then_matmul():
    generator = torch.Generator().manual_seed(3)
    hidden, inner, pairs, alone = 12, 10, [(3, 0), (1, 4)], [2]
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    words = {n: torch.randint(-(2**15), 2**15, (2, *s), generator=generator).to(torch.int16) for n, s in shapes.items()}
    dense = {n: torch.randn(1, *s, generator=generator).bfloat16() for n, s in shapes.items()}
    packed = PackedExperts(words, dense, {"gate_proj": 126, "up_proj": 127, "down_proj": 125}, pairs, alone)
    x = torch.randn(6, hidden, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(6)])
    weights = torch.rand(6, 2, generator=generator)

    def activate(gate, up):
        return torch.nn.functional.silu(gate) * up

    where = {3: (0, 0), 0: (0, 1), 1: (1, 0), 4: (1, 1)}
    expected = torch.zeros(6, hidden)
    for token in range(6):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            own = {
                name: dense[name][0] if expert == 2 else decode(words[name][where[expert][0]], top, where[expert][1])
                for name, top in packed.window.items()
            }
            h = activate(own["gate_proj"].float() @ x[token].float(), own["up_proj"].float() @ x[token].float())
            expected[token] += weight * (own["down_proj"].float() @ h.bfloat16().float())
    torch.testing.assert_close(experts(packed, x, index, weights, activate), expected, rtol=2e-2, atol=1e-3)
