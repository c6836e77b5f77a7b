"""The fused merge and pack pass against its definition, bit by bit and count by count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold_kernels import FormatError, encode, layout, packing, reference

pack = pytest.importorskip("moefold_kernels.triton.pack", reason="needs triton")

SMALL = pack.Block(rows=4, columns=32, steps=3, warps=1, stages=1)
LARGE = pack.Block(rows=16, columns=128, steps=4, warps=4, stages=1)  # the interpreter pays by the step
PAIRS = [[3, 0], [1, 4]]
POISON = 0x5A5A


def packed(weights, pairs, norms, threshold, top, device, block=SMALL):
    """Words and counts of the kernel, over poisoned words."""
    words = torch.full((len(pairs), *weights.shape[1:]), POISON, dtype=torch.int16, device=device)
    index = torch.tensor(pairs, dtype=torch.int32, device=device).view(-1, 2)
    tops = torch.tensor([top], device=device)
    found, counts = pack.pack_pairs(weights.to(device), index, norms.to(device), threshold, tops, words, block=block)
    assert found is words
    return words.cpu(), counts.cpu()


def assert_equal(weights, norms, threshold, top, device, pairs=PAIRS, block=SMALL) -> torch.Tensor:
    """The kernel gives what the definition gives; its counts."""
    words, counts = packed(weights, pairs, norms, threshold, top, device, block)
    expected, held = reference.pack_pairs(weights, pairs, norms, threshold, top)
    assert torch.equal(words, expected)
    assert dict(zip(reference.PACK_COUNTS, counts.tolist(), strict=True)) == dict(
        zip(reference.PACK_COUNTS, held.tolist(), strict=True)
    )
    return counts


def random(*shape: int, dtype=torch.bfloat16, scale=0.02, seed=0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def norms_of(experts: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(experts, columns, generator=torch.Generator().manual_seed(seed))


def top_of(weights: torch.Tensor) -> int:
    return max(int(weights.abs().max().to(torch.bfloat16).view(torch.int16)) >> layout.FRACTION_BITS, 1)


@pytest.mark.parametrize("dtype", pack.SOURCES)
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_random_weights(dtype, threshold, device):
    weights = random(5, 24, 64, dtype=dtype)
    counts = assert_equal(weights, norms_of(5, 64), threshold, top_of(weights), device)
    assert (counts[:2] > 0).all() == (threshold < 1)
    assert not counts[4:].any()


@pytest.mark.parametrize("dtype", pack.SOURCES)
@pytest.mark.parametrize("window", [1, 30, 100, 121, 150, 254])
def test_windows_that_flush_and_clip(dtype, window, device):
    weights = random(5, 9, 40, dtype=dtype)
    weights[:, 6] = 0
    counts = dict(zip(reference.PACK_COUNTS, assert_equal(weights, norms_of(5, 40), 0.4, window, device), strict=True))
    assert counts["emptied"] >= 2 * 40  # the zeros
    assert (counts["clipped"] > 0) == (window <= 121)
    assert (counts["flushed"] > 0) == (window >= 150)


def test_the_edges_of_the_window_and_of_rounding(device):
    """Magnitudes around the window's ends, halves of a bf16 step, subnormals, signed zeros, the largest float32."""
    top = 127
    ends = torch.tensor([layout.smallest(top), layout.largest(top)], dtype=torch.int32)[:, None] << 16
    around = (ends + torch.arange(-0x18000, 0x18000, 0x1FFF)).view(torch.float32).flatten()
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 2.0**-126, 3.4028234e38, 1.0, 1.00390625, 1.01171875, 1.0039063]
    values = torch.cat([around, -around, torch.tensor(special)])
    first, second = torch.meshgrid(values, values, indexing="ij")
    weights = torch.stack([first, second])
    for threshold in (0.0, 0.4, 1.0):
        norms = torch.tensor([[1.0], [0.5]]).expand(2, len(values)).contiguous()
        assert_equal(weights / 4, norms, threshold, top, device, pairs=[[0, 1]], block=LARGE)


@pytest.mark.parametrize(
    ("value", "top", "counted"),
    [
        (4.0, 127, "clipped"),
        (1.9999, 127, "clipped"),  # rounds up
        (3.4028234e38, 254, "clipped"),
        (2.0**-32, 127, "flushed"),
        (0.0, 127, "emptied"),
        (torch.inf, 127, "broken"),
        (torch.nan, 127, "broken"),
    ],
)
def test_one_odd_value_in_a_full_block_is_noticed(value, top, counted, device):
    """Nothing but this value makes the program look twice."""
    weights = torch.full((2, SMALL.rows * SMALL.steps, SMALL.columns), 2.0 ** (top - 154))
    weights[: 1 if counted == "clipped" else 2, 7, 9] = value
    _, counts = packed(weights, [[0, 1]], torch.ones(2, SMALL.columns), 0.4, top, device)
    assert dict(zip(reference.PACK_COUNTS, counts.tolist(), strict=True))[counted] == 1
    if counted != "broken":
        assert_equal(weights, torch.ones(2, SMALL.columns), 0.4, top, device, pairs=[[0, 1]])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_what_is_not_finite_is_never_the_other_slots_value(threshold, slot, bad, device):
    """Whatever the norms say, and where the window is the user's; zero norms make NaN of infinities."""
    weights = torch.full((2, SMALL.rows, SMALL.columns), 2.0**-3)
    weights[slot, 3, 5] = bad
    for norms in (torch.ones(2, SMALL.columns), torch.zeros(2, SMALL.columns)):
        merged, *_ = reference.merge_pair(weights, norms, threshold)
        assert int((~merged.isfinite()).sum()) == 1
        _, counts = packed(weights, [[0, 1]], norms, threshold, 127, device)
        assert dict(zip(reference.PACK_COUNTS, counts.tolist(), strict=True))["broken"] == 1


def test_ties_are_decided_as_defined(device):
    """Small integers: equal saliencies, relative differences that are the threshold exactly, equal magnitudes."""
    values = torch.arange(-7.0, 8.0)
    weights = torch.stack(torch.meshgrid(values, values, indexing="ij")).bfloat16()
    norms = torch.arange(1.0, 31.0).view(2, 15) % 4
    for threshold in (0.0, 0.2, 0.25, 0.4, 0.5, 0.6, 1.0):
        assert_equal(weights, norms, threshold, 129, device, pairs=[[0, 1], [1, 0]])


def test_products_are_not_fused_with_sums(device):
    """Random float32 near the threshold: one rounding more or less decides otherwise."""
    weights = random(2, 64, 96, dtype=torch.float32, seed=3)
    sign = torch.where(weights[1] < 0, -1.0, 1.0)
    weights[1] = weights[0].abs() * (0.6 / 1.4) * sign * (1 + torch.arange(-48, 48) * 2.0**-24)
    counts = assert_equal(weights, norms_of(2, 96), 0.4, top_of(weights), device, pairs=[[0, 1]])
    assert 0 < counts[:2].sum() < weights[0].numel()


def test_experts_without_tokens(device):
    weights = random(3, 8, 32)
    norms = torch.zeros(3, 32)
    assert_equal(weights, norms, 0.4, top_of(weights), device, pairs=[[0, 1]])
    norms[1] = 1.0
    assert_equal(weights, norms, 0.4, top_of(weights), device, pairs=[[0, 1], [1, 2]])


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (37, 1), (13, 31), (12, 32), (25, 97)])
def test_odd_sizes_leave_what_is_beside_them(shape, device):
    weights = random(5, *shape)
    around = torch.full((4, *shape), POISON, dtype=torch.int16, device=device)
    counts = torch.zeros(len(reference.PACK_COUNTS), dtype=torch.int64, device=device)
    index, top = torch.tensor(PAIRS, device=device), torch.tensor([top_of(weights)], device=device)
    norms = norms_of(5, shape[1])
    for _ in range(2):  # counts add up
        pack.pack_pairs(weights.to(device), index, norms.to(device), 0.4, top, around[1:3], counts, SMALL)
    expected, held = reference.pack_pairs(weights, PAIRS, norms, 0.4, int(top))
    assert torch.equal(around[1:3].cpu(), expected)
    assert (around[[0, 3]] == POISON).all()
    assert torch.equal(counts.cpu(), 2 * held)


def test_views(device):
    """Gate rows of a fused tensor, transposed experts, interleaved rows, every other column."""
    fused = random(5, 24, 36).to(device)
    for view in (fused[:, :12], fused[:, 12:], fused.transpose(1, 2), fused[:, 1::2], fused[:, :, ::2], fused.flip(0)):
        norms, here = norms_of(5, view.shape[2]), view.cpu()
        top = pack.largest_exponent(view, torch.arange(5, device=device), block=SMALL)
        assert top.item() == top_of(here)
        index = torch.tensor(PAIRS, device=device)
        words, counts = pack.pack_pairs(view, index, norms.to(device), 0.4, top, block=SMALL)
        expected, held = reference.pack_pairs(here, PAIRS, norms, 0.4, int(top))
        assert torch.equal(words.cpu(), expected)
        assert torch.equal(counts.cpu(), held)


@pytest.mark.parametrize("block", [*pack.PACK_BLOCKS, *pack.LARGEST_BLOCKS])
def test_every_block_that_is_offered(block, device):
    weights = random(2, 140, 136)
    weights[0, 20, 30] = 0.9
    assert_equal(weights, norms_of(2, 136), 0.4, top_of(weights), device, pairs=[[1, 0]], block=block)
    top = pack.largest_exponent(weights.to(device), torch.arange(2, device=device), block=block)
    assert top.item() == top_of(weights) == 126


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 140),
    exponents=st.tuples(st.integers(-140, 127), st.integers(0, 60)),
    threshold=st.floats(0, 1), top=st.integers(1, 254), dtype=st.sampled_from(pack.SOURCES), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_anything(rows, columns, exponents, threshold, top, dtype, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    low, span = exponents
    powers = torch.randint(low, low + span + 1, (2, rows, columns), generator=generator).clamp(max=126)
    weights = torch.randn(2, rows, columns, generator=generator).clamp(-1.9, 1.9) * torch.exp2(powers.double())
    weights = weights.float().clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else weights.to(dtype)
    weights[torch.rand(weights.shape, generator=generator) < 0.1] = 0
    norms = torch.rand(2, columns, generator=generator) * (torch.rand(2, columns, generator=generator) < 0.8)
    assert_equal(weights, norms, threshold, top, device, pairs=[[0, 1], [1, 1]], block=LARGE)


def test_counts_are_those_of_the_merge_and_of_the_coder(device):
    weights = random(2, 16, 32)
    weights[:, 3] *= 2.0**-30
    weights[0, 5] = 0
    norms = norms_of(2, 32)
    _, counts = packed(weights, [[0, 1]], norms, 0.4, 125, device)
    _, _, keep = merged = reference.merge_pair(weights, norms, 0.4)
    _, coded = encode(*merged, 125)
    assert reference.counts_as_coded(counts.tolist(), 512) == coded
    assert coded["zero"] > 0
    as_merged = reference.counts_as_merged(counts.tolist(), 512)
    assert as_merged["own"] == int((keep[0] & ~keep[1]).sum())
    assert as_merged["shared"] == int((keep[0] & keep[1]).sum())
    assert {name: as_merged[name] for name in ("clipped", "flushed")} == {n: coded[n] for n in ("clipped", "flushed")}


@pytest.mark.parametrize("dtype", pack.SOURCES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_told(bad, dtype, device):
    weights = random(2, 6, 32, dtype=dtype)
    weights[1, 4, 7] = bad
    assert pack.largest_exponent(weights.to(device), torch.arange(2, device=device), block=SMALL).item() == 255
    _, counts = packed(weights, [[0, 1]], torch.ones(2, 32), 0.4, 254, device)
    with pytest.raises(FormatError, match="must be finite"):
        reference.pack_pairs(weights, [[0, 1]], torch.ones(2, 32), 0.4, 254)
    assert counts[-1] == 1


def test_the_largest_exponent(device):
    for value, expected in ((0.0, 1), (1e-45, 1), (1.0, 127), (-1.9999, 128), (3.38e38, 254), (3.4e38, 255)):
        weights = torch.zeros(3, 5, 7)
        weights[2, 4, 6] = value
        assert pack.largest_exponent(weights.to(device), torch.tensor([0, 2], device=device)).item() == expected
        assert pack.largest_exponent(weights.to(device), torch.tensor([0, 1], device=device)).item() == 1
    top = torch.tensor([126], device=device)
    assert pack.largest_exponent(torch.ones(1, 2, 2, device=device), torch.tensor([0], device=device), top) is top
    assert top.item() == 127


def test_wrong_arguments_are_refused_before_anything_is_read(device):
    weights, norms = random(3, 8, 16).to(device), norms_of(3, 16).to(device)
    pairs, top = torch.tensor([[0, 1]], device=device), torch.tensor([127], device=device)
    for wrong, said in (
        ((weights.double(), pairs, norms, 0.4, top), "packs torch.bfloat16"),
        ((weights, pairs, norms.double(), 0.4, top), r"norms is \(3, 16\) torch.float64"),
        ((weights, pairs, norms[:, :8], 0.4, top), r"norms is \(3, 8\).*write \(3, 16\)"),
        ((weights, pairs.flatten(), norms, 0.4, top), "pairs is"),
        ((weights, pairs, norms, 0.4, top.int()), "top is"),
        ((weights, pairs, norms.T.contiguous().T, 0.4, top), "norms is not contiguous"),
        ((weights, pairs, norms, 0.4, top, torch.empty(1, 8, 16, device=device)), "words is"),
        ((weights, pairs, norms, 0.4, top, None, torch.zeros(3, device=device)), "counts is"),
    ):
        with pytest.raises(FormatError, match=said):
            pack.pack_pairs(*wrong)
    with pytest.raises(ValueError, match="take fewer steps"):
        pack.Block(rows=8, columns=128, steps=64, warps=4, stages=1)


def test_no_pairs_and_no_columns(device):
    top = torch.tensor([127], device=device)
    for shape, pairs in (((3, 4, 5), 0), ((3, 4, 0), 1)):
        norms = torch.ones(3, shape[2], device=device)
        index = torch.zeros(pairs, 2, dtype=torch.int32, device=device)
        words, counts = pack.pack_pairs(torch.zeros(shape, device=device), index, norms, 0.4, top)
        assert words.shape == (pairs, *shape[1:])
        assert not counts.any()


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little room on the device that every pair goes alone."""
    monkeypatch.setattr(packing, "DEVICE_WORDS", 100)
    monkeypatch.setattr(pack, "PACK_BLOCKS", (SMALL,))


@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize("window", [None, 119])
def test_a_layer_in_chunks(window, device):
    gate_up, down = random(5, 24, 20).to(device), random(5, 20, 12, scale=0.5).to(device)
    matrices = {"gate_proj": gate_up[:, :12], "up_proj": gate_up[:, 12:], "down_proj": down}
    norms = {name: norms_of(5, matrix.shape[2]) for name, matrix in matrices.items()}
    found = packing.pack_matrices(matrices, PAIRS, norms, 0.4, window)
    for name, matrix in matrices.items():
        used = matrix[[0, 1, 3, 4]].cpu()
        assert found.tops[name] == (window or top_of(used))
        words, counts = reference.pack_pairs(matrix.cpu(), PAIRS, norms[name], 0.4, found.tops[name])
        assert found.words[name].device.type == "cpu"
        assert torch.equal(found.words[name], words)
        assert found.counts[name] == counts.tolist()


def test_experts_that_do_not_exist_are_refused(device):
    matrices, norms = {"up_proj": torch.ones(3, 4, 4, device=device)}, {"up_proj": torch.ones(3, 4)}
    for pairs in ([[0, 3]], [[-1, 0]], [[0, 1, 2]]):
        with pytest.raises(FormatError, match="two experts of 0 to 2"):
            packing.pack_matrices(matrices, pairs, norms, 0.4)


def test_who_can():
    able, why = packing.can_pack(torch.device("cpu"))
    assert (able, why) == (False, "the fused pass is for CUDA devices")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", pack.SOURCES)
def test_real_sizes_on_the_gpu(dtype):
    """Larger than an interpreter likes: many programs, every block, with a scatter of zeros and of tiny values."""
    generator = torch.Generator("cuda").manual_seed(0)
    weights = (torch.randn(6, 1408, 2048, device="cuda", generator=generator) * 0.02).to(dtype)
    weights[2:] *= (torch.rand(4, 1408, 2048, device="cuda", generator=generator) < 0.999).to(dtype)
    weights[4:, :64] *= 1e-7
    norms = torch.rand(6, 2048, device="cuda", generator=generator)
    pairs = torch.tensor([[1, 0], [3, 2], [4, 5]], device="cuda")
    for view, own in ((weights, norms), (weights.transpose(1, 2), norms[:, :1408].contiguous())):
        for window in (None, 100, 125):
            for block in pack.PACK_BLOCKS:
                top = pack.largest_exponent(view, pairs.flatten()) if window is None else torch.tensor([window]).cuda()
                words = torch.full((3, *view.shape[1:]), POISON, dtype=torch.int16, device="cuda")
                _, counts = pack.pack_pairs(view, pairs, own, 0.4, top, words, block=block)
                expected, held = reference.pack_pairs(view, pairs.tolist(), own, 0.4, int(top))
                assert torch.equal(words, expected)
                assert torch.equal(counts, held)
