"""The few-bit pair formats: every code comes back, the bits are where the picture has them, and what is refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leveled import FORMATS, levels_of, matrix

from moefold_kernels import FormatError, layout_pairs
from moefold_kernels.backend import Need, builtin, choose
from moefold_kernels.reference_pairs import by_rows, decode, encode, fields, from_record, states, stored, to_record
from moefold_kernels.triton import portability
from moefold_kernels.triton.backend import Triton

ALL = [(True, True), (True, False), (False, True)]
"""Who keeps a position."""


def values(format: str, level, scale, negative, keep) -> torch.Tensor:
    """What both slots read [2, rows, columns], by the definition in words, one position at a time."""
    out = torch.zeros(2, *level.shape, dtype=torch.bfloat16)
    for slot, row, column in product(range(2), *map(range, level.shape)):
        if keep[slot, row, column]:
            exact = levels_of(format)[int(level[row, column])] * float(scale[row, column // 64])
            out[slot, row, column] = -exact if negative[slot, row, column] else exact
    return out


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_comes_back(format):
    """Each state with each level, all in one row."""
    codes = [
        (number, signs, keep)
        for number, keep in product(range(len(levels_of(format))), ALL)
        for signs in product([False, True], repeat=2)
        if all(kept or not sign for sign, kept in zip(signs, keep, strict=True))
    ]
    assert len(codes) == 8 << layout_pairs.magnitude_bits(format)
    level = torch.tensor([[number for number, _, _ in codes]], dtype=torch.uint8)
    negative, keep = (torch.tensor([code[i] for code in codes]).T[:, None] for i in (1, 2))
    scale = torch.full((1, layout_pairs.groups(len(codes))), 0.75).bfloat16()
    planes = encode(format, level, scale, negative, keep)
    state, number = fields(format, planes, len(codes))
    assert len(set(zip(state[0].tolist(), number[0].tolist(), strict=True))) == len(codes)
    assert torch.equal(number, level)
    assert torch.equal(state, states(negative, keep))
    found = torch.stack([decode(format, planes, levels_of(format), len(codes), slot) for slot in (0, 1)])
    assert torch.equal(found, values(format, level, scale, negative, keep))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 3), st.integers(1, 150), st.integers(0, 2**31))
def test_any_shape_comes_back(format, rows, columns, seed):
    level, scale, negative, keep = matrix(format, rows, columns, seed)
    planes = encode(format, level, scale, negative, keep)
    record = to_record(planes)
    assert record.numel() * 2 == layout_pairs.size(format, rows, columns)
    again = from_record(format, record, columns)
    assert {name: plane.shape[-1] for name, plane in again.items()} == layout_pairs.planes(format, columns)
    assert all(torch.equal(again[name], planes[name]) for name in planes)
    found = torch.stack([decode(format, again, levels_of(format), columns, slot) for slot in (0, 1)])
    assert torch.equal(found, values(format, level, scale, negative, keep))
    assert not (found.view(torch.int16) == -0x8000).any()  # no negative zero


def test_bits_are_where_the_picture_has_them():
    """Nibble 5 of the second word, in each format; everything else is level 0, shared, positive."""
    column = 32 * 1 + 16 * 1 + 8 * 1  # word 2 t + s = 1, nibble 4 u + 2 e + h = 5
    for format, (level, low) in {
        "pair4": (1, None),
        "pair5": (0b11, (0, 1 << 20 + 1)),  # 32 positions a word: position 13 is the second of nibble 5
        "pair6": (0b110, (0, 0b10 << 20 + 2)),  # 16 positions a word: the same
        "pair8": (0b11001, (1, 0b1001 << 12)),  # 8 positions a word: position 5 is the upper half of byte 1
    }.items():
        levels, keep = torch.zeros(1, 64, dtype=torch.uint8), torch.ones(2, 1, 64, dtype=torch.bool)
        negative = torch.zeros(2, 1, 64, dtype=torch.bool)
        levels[0, column] = level
        keep[0, 0, column], negative[1, 0, column] = False, True  # slot 1 alone, negative: state 7
        planes = encode(format, levels, torch.ones(1, 1).bfloat16(), negative, keep)
        expected = torch.zeros(1, 8, dtype=torch.int64)
        expected[0, 1] = 0b1111 << 20  # the level's highest bit, then the state
        assert torch.equal(planes["words"].long() & 0xFFFFFFFF, expected), format
        if low is None:
            assert "low" not in planes
        else:
            word, bits = low
            assert planes["low"][0, word] == bits
            assert planes["low"].count_nonzero() == 1
        assert planes["scale"].tolist() == [[0x3F80]]


def test_each_column_has_a_position_of_its_own():
    """As tensor cores take operands: of 16 columns a thread has 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t."""
    assert sorted(layout_pairs.ORDER) == list(range(64))
    for thread in range(4):
        own = {first + 2 * thread + more for first in range(0, 64, 8) for more in (0, 1)}
        assert set(layout_pairs.ORDER[16 * thread : 16 * thread + 16]) == own


@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (48, 256), (192, 256), (128, 640)])
@pytest.mark.parametrize("format", FORMATS)
def test_bands_there_and_back(format, rows, columns):
    parts = matrix(format, rows, columns)
    planes = encode(format, *parts)
    banded = stored(format, planes, columns)
    assert {name: tuple(plane.shape) for name, plane in banded.items()} == layout_pairs.stored(format, rows, columns)
    assert all(plane.is_contiguous() and plane.dtype == planes[name].dtype for name, plane in banded.items())
    again = by_rows(format, banded, columns)
    assert all(torch.equal(again[name], planes[name]) for name in planes)
    for slot in (0, 1):
        found = decode(format, banded, levels_of(format), columns, slot)
        assert torch.equal(found, decode(format, planes, levels_of(format), columns, slot))
    pairs = {name: torch.stack([plane, plane.flip(0)]) for name, plane in planes.items()}  # [pair, ..]
    twice = stored(format, pairs, columns)
    assert all(torch.equal(twice[name][0], banded[name]) for name in banded)
    assert torch.equal(by_rows(format, twice, columns)["words"], pairs["words"])


@pytest.mark.parametrize(("rows", "columns"), [(64, 192), (40, 128), (63, 128), (64, 100), (1, 1)])
@pytest.mark.parametrize("format", FORMATS)
def test_other_sizes_lie_in_rows(format, rows, columns):
    planes = encode(format, *matrix(format, rows, columns))
    assert not layout_pairs.banded(rows, columns)
    kept = stored(format, planes, columns)
    assert all(torch.equal(kept[name], planes[name]) for name in planes)
    widths = layout_pairs.planes(format, columns)
    assert layout_pairs.stored(format, rows, columns) == {name: (rows, width) for name, width in widths.items()}


def test_shapes_of_bands():
    assert layout_pairs.stored("pair4", 128, 256) == {"words": (8, 16 * 32), "scale": (8, 16 * 4)}
    assert layout_pairs.stored("pair5", 64, 128) == {"words": (4, 256), "low": (4, 64), "scale": (4, 32)}
    assert layout_pairs.stored("pair6", 64, 128) == {"words": (4, 256), "low": (4, 128), "scale": (4, 32)}
    assert layout_pairs.stored("pair8", 64, 128) == {"words": (4, 256), "low": (4, 256), "scale": (4, 32)}


def test_where_a_position_lies_in_a_band():
    """Row 70, column 300 of 128 x 384: band 4, row 6 in it, step 2, column 44 in it; nothing else is set.

    Column 44 is 32 + 8 + 2 * 2: word 2 * 2 + 1, nibble 1.
    """
    level, scale = torch.zeros(128, 384, dtype=torch.uint8), torch.zeros(128, 6).bfloat16()
    keep, negative = torch.ones(2, 128, 384, dtype=torch.bool), torch.zeros(2, 128, 384, dtype=torch.bool)
    level[70, 300], negative[0, 70, 300], scale[70, 4] = 0b11111, True, 1.0
    found = stored("pair8", encode("pair8", level, scale, negative, keep), 384)
    # a step has 16 rows of 128 columns: 16 words a row of either plane here, and 2 scales
    place = 2 * 16 * 16 + 6 * 16 + 5
    assert [found[name].count_nonzero().item() for name in ("words", "low", "scale")] == [1, 1, 1]
    assert found["words"][4, place] == 0b1001 << 4 * 1  # the level's highest bit, slot 0 negative
    assert found["low"][4, place] == 0b1111 << 8  # position 1 of eight: the lower half of byte 1
    assert found["scale"][4, 2 * 16 * 2 + 6 * 2] == 0x3F80


@pytest.mark.parametrize("format", FORMATS)
def test_a_part_of_the_bands_is_a_part_of_the_matrix(format):
    """What ranks take: bands of some rows, and of each band's words those of whole steps."""
    level, scale, negative, keep = matrix(format, 192, 384)
    whole = stored(format, encode(format, level, scale, negative, keep), 384)
    right = decode(format, whole, levels_of(format), 384, 0)
    rows = {name: plane[1:] for name, plane in whole.items()}
    assert torch.equal(decode(format, rows, levels_of(format), 384, 0), right[16:])
    columns = {name: plane[:, plane.shape[1] // 3 :] for name, plane in whole.items()}
    assert torch.equal(decode(format, columns, levels_of(format), 256, 0), right[:, 128:])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 24), st.integers(-1, 1), st.integers(1, 24), st.integers(-1, 1))
def test_two_matrices_words_tell_a_layers_sizes(inner, more, hidden, other):
    inner, hidden = 64 * inner + more, 64 * hidden + other
    up, down = (layout_pairs.stored("pair4", *size)["words"] for size in ((inner, hidden), (hidden, inner)))
    assert layout_pairs.layer_sizes(up, down) == (inner, hidden)


def test_no_two_sizes_have_the_same_words():
    sizes = [*range(1, 131), *range(192, 2 * 4096 + 1, 64)]
    seen = set()
    for inner, hidden in product(sizes, repeat=2):
        up, down = (layout_pairs._words(*size) for size in ((inner, hidden), (hidden, inner)))
        seen.add((*up, *down))
    assert len(seen) == len(sizes) ** 2
    with pytest.raises(FormatError, match=r"\[31, 16\] and \[64, 8\] words are no nibble planes"):
        layout_pairs.layer_sizes((31, 16), (64, 8))


def test_sizes_are_what_they_are_called():
    """Bits a position, and two bytes for 64 columns."""
    for format, bits in {"pair4": 4, "pair5": 5, "pair6": 6, "pair8": 8}.items():
        assert layout_pairs.size(format, 3, 128) == 3 * 128 * bits // 8 + 3 * 2 * 2
        assert layout_pairs.size(format, 3, 65) == layout_pairs.size(format, 3, 128)  # padded


@pytest.mark.parametrize("format", FORMATS)
def test_meta_tensors_give_shapes(format):
    parts = [part.to("meta") for part in matrix(format, 3, 70)]
    planes = encode(format, *parts)
    assert all(plane.is_meta for plane in planes.values())
    assert {name: plane.shape[-1] for name, plane in planes.items()} == layout_pairs.planes(format, 70)
    assert decode(format, planes, levels_of(format), 70, 1).shape == (3, 70)


def test_what_a_format_cannot_hold_is_refused():
    level, scale, negative, keep = matrix("pair4", 2, 70)
    for change, message in [
        ({"level": level + 2}, r"level [23] of pair4, which has 2"),
        ({"level": level.long()}, "write uint8"),
        ({"scale": -scale}, "finite and not negative"),
        ({"scale": scale * torch.inf}, "finite and not negative"),
        ({"scale": scale[:, :1]}, "one for each 64 columns"),
        ({"scale": scale.float()}, "write bfloat16"),
        ({"keep": keep & keep.flip(0)}, "have no zero"),
        ({"keep": keep[:1]}, "write bool of one shape"),
        ({"negative": negative.int()}, "write bool of one shape"),
    ]:
        parts = {"level": level, "scale": scale, "negative": negative, "keep": keep} | change
        with pytest.raises(FormatError, match=message):
            encode("pair4", **parts)
    planes = encode("pair4", level, scale, negative, keep)
    for change, message in [
        ({"format": "pair5"}, "pair5 with 70 columns has planes"),
        ({"format": "pair7"}, "'pair7' is none of pair4, pair5"),
        ({"columns": 130}, "has planes of"),
        ({"slot": 2}, "slots 0 and 1"),
        ({"planes": planes | {"words": planes["words"].long()}}, "words of pair4 is torch.int32"),
    ]:
        told = {"format": "pair4", "planes": planes, "levels": (0.5, 1.0), "columns": 70, "slot": 0} | change
        with pytest.raises(FormatError, match=message):
            decode(**told)
    with pytest.raises(FormatError, match=r"rows of pair4 are 34 int16 for 70 columns"):
        from_record("pair4", to_record(planes)[:, :-1], 70)


def test_pieces_are_exact():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        steps = torch.rand(8, generator=generator).mul(0.2).add(0.05).bfloat16().float()
        begins = (torch.arange(8) * 1.1 + 0.1).bfloat16().float()
        levels = (begins[:, None] + steps[:, None] * torch.arange(4)).bfloat16().flatten().tolist()
        first, step = layout_pairs.pieces(levels)
        made = (torch.tensor(first)[:, None] + torch.tensor(step)[:, None] * torch.arange(4)).bfloat16()
        assert made.flatten().tolist() == levels
        assert torch.tensor(step).bfloat16().tolist() == step
    with pytest.raises(FormatError, match="on no straight line"):
        layout_pairs.check_levels("pair8", [float(i + 1) ** 1.5 // 1 for i in range(32)])


@pytest.mark.parametrize("format", FORMATS)
def test_kernels_run_them_and_who_gets_none_is_told_why(format, device, monkeypatch):
    """Compiled for CUDA devices, interpreted for tests; a CPU takes the reference, and is told the reason."""
    assert Triton(interpret=device.type == "cpu").can(Need(format, device))[0]
    need = Need(format, torch.device("cpu"))
    for interprets, reason in [
        ("0", "compiles for CUDA devices, not for cpu"),
        ("1", "TRITON_INTERPRET is set, and interpretation is for tests; unset it, or ask by name"),
    ]:
        monkeypatch.setenv("TRITON_INTERPRET", interprets)
        assert Triton().can(need) == (False, reason)
        assert choose(need, builtin()).name == "reference"


@pytest.mark.parametrize(
    ("capability", "remark"), [((9, 0), ""), ((8, 0), "by plain kernels, not by the fast ones: they are for")]
)
@pytest.mark.parametrize("format", FORMATS)
def test_a_gpu_gets_kernels_and_an_older_one_is_told_which(format, capability, remark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(portability, "_no_gluon", lambda: "")  # whatever Triton is installed
    need = Need(format, torch.device("cuda"))
    assert choose(need, builtin()).name == "triton"
    able, said = Triton().can(need)
    assert able
    known, _, told = said.partition(f"; {format} ")
    assert known == f"Triton kernels for compute capability {capability[0]}.{capability[1]}"
    assert told.startswith(remark)
    assert bool(told) == bool(remark)


def test_selectors_take_no_more_than_the_docstring_says():
    """Shifts and masks of whole words give, in each nibble, what `prmt` is to look up."""
    for format, highest, mask in [("pair4", 3, 0x11111111), ("pair5", 2, 0x22222222), ("pair6", 1, 0x44444444)]:
        level, scale, negative, keep = matrix(format, 2, 64)
        planes, w = encode(format, level, scale, negative, keep), layout_pairs.low_bits(format)
        order = list(layout_pairs.ORDER)
        words = planes["words"].long() & 0xFFFFFFFF
        assert torch.equal(nibbles(words & 0x77777777), states(negative, keep).long()[:, order])
        numbers = words >> highest & mask
        if w:
            j = torch.arange(8) % (4 // w)  # the word's place in the other plane's
            low = (planes["low"].long() & 0xFFFFFFFF).repeat_interleave(4 // w, dim=1)
            numbers = low >> w * j & {1: 0x11111111, 2: 0x33333333}[w] | numbers
        assert torch.equal(nibbles(numbers), level.long()[:, order]), format
    level, scale, negative, keep = matrix("pair8", 2, 64)
    planes = encode("pair8", level, scale, negative, keep)
    low = planes["low"].long() & 0xFFFFFFFF
    halves = torch.stack([low & 0x0F0F0F0F, low >> 4 & 0x0F0F0F0F], dim=-1)
    assert torch.equal((halves[..., None] >> torch.arange(0, 32, 8) & 255).flatten(-3), level.long()[:, order] & 15)


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """The eight nibbles of each word, from the lowest: [rows, 8 * words]."""
    return (words[..., None] >> torch.arange(0, 32, 4) & 15).flatten(-2)
