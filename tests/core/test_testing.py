"""`moefold.testing` names the defect: deliberately broken codecs."""

from __future__ import annotations

import itertools
import sys
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from moefold import Codec, Coded, CodedLayer, Json, MergedPair, PairMerge
from moefold.codec import pack
from moefold.errors import FormatError, InputError
from moefold.hooks import Registry
from moefold.magnitudes import Levels
from moefold.testing import CheckError, check_codec
from moefold_kernels import layout_pairs
from moefold_plugins.codecs import Exponent

FEW_BITS = {"pair4": 0.40, "pair5": 0.21, "pair6": 0.10, "pair8": 0.028}
"""Relative error allowed on normal weights, about 1.2 times what it is."""


def test_exponent_passes() -> None:
    check_codec(Exponent)
    check_codec(Exponent(window=130))


@pytest.mark.parametrize("name", layout_pairs.MAGNITUDE_BITS)
def test_few_bits_pass(name: str) -> None:
    weights = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).abs()
    codec = Registry.installed().codecs[name]
    levels = Levels.learn(weights / weights.square().mean().sqrt(), layout_pairs.MAGNITUDE_BITS[name])
    check_codec(codec(levels=list(levels.values)), tolerance=FEW_BITS[name], neither=False, examples=40)
    with pytest.raises(CheckError, match=f"codec {name}: normal weights .* come back with a relative error"):
        check_codec(codec(levels=list(levels.values)), tolerance=FEW_BITS[name] / 1.6, neither=False, examples=5)


def test_every_codec_is_checked() -> None:
    """Or a new one would go in unseen."""
    assert set(Registry.installed().codecs) == {"exponent", *FEW_BITS}


class Good(Exponent):
    """The codec that the broken ones are made of."""

    name: ClassVar[str] = "broken"


class SwapsSlots(Good):
    """Reads the other expert."""

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        return super().decode(words, settings, 1 - slot)


class ForgetsSigns(Good):
    """Every weight is positive."""

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        return super().decode(words, settings, slot).abs()


class KeepsAll(Good):
    """An expert reads what it should not keep."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        return super().encode(pair._replace(keep=torch.ones_like(pair.keep)), settings)


class Truncates(Good):
    """Rounds to six bits of fraction and says nothing."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        coded = super().encode(pair, settings)
        return Coded(coded.words & ~1, coded.counts)


class CountsNothing(Good):
    """Flushes in silence."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        return Coded(super().encode(pair, settings).words, {"clipped": 0, "flushed": 0})


class TakesNaN(Good):
    """NaN becomes zero."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        clean = pair.magnitude if pair.magnitude.is_meta else pair.magnitude.nan_to_num(0.0)
        return super().encode(pair._replace(magnitude=clean), settings)


class TakesInfinity(Good):
    """Infinity is the largest."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        return super().encode(pair._replace(magnitude=pair.magnitude.clamp(max=1e38)), settings)


class LiesAboutSize(Good):
    """Says that it halves."""

    def size(self, rows: int, columns: int) -> int:
        return rows * columns


class WritesIntoItsInput(Good):
    """Clears what nobody keeps, in place."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        pair.magnitude.mul_(pair.keep[0] | pair.keep[1])
        return super().encode(pair, settings)


class ByChance(Good):
    """Dithers."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        noise = torch.rand_like(pair.magnitude) * 0.02 + 0.99
        return super().encode(pair._replace(magnitude=pair.magnitude * noise), settings)


class NoMeta(Good):
    """Looks at values to know a shape."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        float(pair.magnitude.sum())
        return super().encode(pair, settings)


class OtherMeta(Good):
    """Has another shape when there are no values."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        coded = super().encode(pair, settings)
        return Coded(coded.words[:1], coded.counts) if pair.magnitude.is_meta else coded


class WrongDtype(Good):
    """Decodes to float32."""

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        return super().decode(words, settings, slot).float()


class EvenColumns(Good):
    """Takes columns two by two."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        return super().encode(MergedPair(*(part.unflatten(-1, (-1, 2)).flatten(-2) for part in pair)), settings)


class TensorSettings(Good):
    """Learns something that no file can hold."""

    def fit(self, matrix: str, weights: Tensor) -> Json:
        return torch.tensor(super().fit(matrix, weights))


class NoZero(Good):
    """A zero becomes the smallest number there is."""

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        return super().decode(words, settings, slot) + 2.0**-100


class Nameless(Good):
    """Has an option that nobody explains."""

    strength: int = 1


class PacksOtherwise(Good):
    """All pairs at once are not what one by one are."""

    def pack_layer(self, merge: PairMerge) -> CodedLayer | None:
        one_by_one = pack(Good(), merge)
        words = {name: words ^ 1 for name, words in one_by_one.words.items()}
        return CodedLayer(words, one_by_one.settings, one_by_one.counts)


class DecodesInPlace(Good):
    """Leaves the words changed."""

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        found = super().decode(words, settings, slot)
        words.zero_()
        return found


class FitsInPlace(Good):
    """Leaves the weights changed."""

    def fit(self, matrix: str, weights: Tensor) -> Json:
        found = super().fit(matrix, weights)
        weights.zero_()
        return found


class FitsByChance(Good):
    """Another window each time."""

    def fit(self, matrix: str, weights: Tensor) -> Json:
        return super().fit(matrix, weights) + next(COUNT)


class DecodesByChance(Good):
    """Reads something else the second time."""

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        return super().decode(words, settings, slot) * (1 + next(COUNT) % 4 // 2)


COUNT = itertools.count()


class IgnoresAnOption(Good):
    """Promises and does nothing."""

    strength: Annotated[int, Field(description="how strong")] = 1


class CountsTooMuch(Good):
    """Loses two bits and calls everything lost."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        coded = super().encode(pair, settings)
        return Coded(coded.words & ~3, {} if pair.magnitude.is_meta else {"flushed": pair.magnitude.numel()})


class HalfUp(Good):
    """Rounds halves up and not to even."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        if pair.magnitude.is_meta:
            return super().encode(pair, settings)
        up = ((pair.magnitude.view(torch.int32) + 0x8000) & ~0xFFFF).view(torch.float32)
        return super().encode(pair._replace(magnitude=torch.where(up.isfinite(), up, pair.magnitude)), settings)


class OtherMetaRead(Good):
    """Another type when there are no values."""

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        found = super().decode(words, settings, slot)
        return found.float() if words.is_meta and slot else found


class ContiguousOnly(Good):
    """Views what may be strided."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        pair.magnitude.view(-1)
        return super().encode(pair, settings)


class WideRows(Good):
    """Right about the size of small matrices."""

    def size(self, rows: int, columns: int) -> int:
        return 2 * rows * (columns if columns < 200 else -(-columns // 512) * 512)


class Plain(Codec):
    """Loses nothing: the magnitude's own bits, and beside them what there is of signs and keep bits."""

    name: ClassVar[str] = "broken"

    def fit(self, matrix: str, weights: Tensor) -> Json:
        return {"columns": weights.shape[-1]}

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        if not pair.magnitude.is_meta and not bool(pair.magnitude.isfinite().all()):
            raise FormatError("magnitudes must be finite")
        rounded = pair.magnitude.bfloat16()
        if not rounded.is_meta:
            rounded = torch.where(rounded.isfinite(), rounded, torch.finfo(torch.bfloat16).max)
        flags = sum(part.to(torch.int16) << at for at, part in enumerate((*pair.negative, *pair.keep)))
        return Coded(torch.cat([rounded.view(torch.int16), flags], dim=-1), {"clipped": 0, "flushed": 0})

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        bits, flags = words.split(settings["columns"], dim=-1)
        magnitude = bits.contiguous().view(torch.bfloat16)
        signed = torch.where((flags >> slot & 1).bool(), -magnitude, magnitude)
        return torch.where((flags >> (2 + slot) & 1).bool(), signed, 0)

    def size(self, rows: int, columns: int) -> int:
        return 4 * rows * columns


class SubnormalsVanish(Plain):
    """As arithmetic that flushes them does."""

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        found = super().decode(words, settings, slot)
        return torch.where(found.float().abs() < 2.0**-126, 0, found)


class SubnormalsGrow(Plain):
    """To the smallest normal number."""

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        found = super().decode(words, settings, slot)
        least = torch.full_like(found, 2.0**-126).copysign(found)
        return torch.where((found != 0) & (found.float().abs() < 2.0**-126), least, found)


BROKEN = {
    DecodesInPlace: "decode changes the words in place",
    FitsInPlace: "fit changes its input in place",
    FitsByChance: r"fit gave \d+ and then \d+ for the same weights",
    DecodesByChance: "the same words read differently the second time",
    IgnoresAnOption: "option strength is accepted and never read, so it changes nothing",
    CountsTooMuch: r"\d+ positions are counted as lost \(clipped, flushed\), and \d+ are",
    HalfUp: r"positions are not as they were, of which 0 are counted as lost \(magnitude 1.00391",
    OtherMetaRead: r"decode of meta words gave torch.float32 \[1, 1\] on meta for slot 1",
    ContiguousOnly: "encode fails on tensors that are not contiguous",
    WideRows: r"size\(2, 515\) says 4096 bytes; its words take 2060",
    SubnormalsVanish: r"slot \d reads -?0 at .* positions are not as they were, of which 0 are counted as lost",
    SubnormalsGrow: r"slot \d reads -?1.17549e-38 at .* positions are not as they were",
    SwapsSlots: r"slot 0 reads .* (where that expert keeps nothing|which has the wrong sign)",
    ForgetsSigns: "which has the wrong sign",
    KeepsAll: "where that expert keeps nothing and should read 0",
    Truncates: r"\d+ positions are not as they were, of which 0 are counted as lost",
    CountsNothing: "are not as they were, of which 0 are counted as lost",
    TakesNaN: "takes a magnitude of nan in silence; raise FormatError",
    TakesInfinity: "takes a magnitude of inf in silence; raise FormatError",
    LiesAboutSize: r"size\(1, 1\) says 1 bytes; its words take 2",
    WritesIntoItsInput: r"encode changes its input in place \(0 differs",
    ByChance: "the same pair gave other words the second time",
    NoMeta: "meta tensors .* do not pass through it",
    OtherMeta: r"of meta tensors, words are torch.int16 \[1, 5\] on meta, and of real ones torch.int16 \[3, 5\]",
    WrongDtype: "decode of slot 0 gave torch.float32 .* readers want bfloat16",
    EvenColumns: "fit or encode fails on a pair of 1 x 1",
    TensorSettings: "which is no JSON",
    NoZero: "(of a pair of zeros|should read 0)",
    Nameless: "option strength has no description",
    PacksOtherwise: "pack_layer gives other words than encode",
}


@pytest.mark.parametrize(("codec", "message"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_codec_is_told_what_is_wrong(codec: type[Codec], message: str) -> None:
    with pytest.raises(CheckError, match=f"^codec broken: .*{message}"):
        check_codec(codec)


def test_the_codecs_they_are_made_of_are_not_broken() -> None:
    check_codec(Good, examples=30)
    check_codec(Plain, examples=30)


class DropsSmallOnes(Good):
    """A format that rounds, and hides what became zero behind its tolerance."""

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        if pair.magnitude.is_meta:
            return super().encode(pair, settings)
        small = pair.magnitude < pair.magnitude.max() * 2.0**-9
        return super().encode(pair._replace(magnitude=torch.where(small, 0, pair.magnitude)), settings)


def test_zeros_are_counted_whatever_the_tolerance() -> None:
    with pytest.raises(CheckError, match="positions are zero that were not, of which 0 are counted as lost"):
        check_codec(DropsSmallOnes, tolerance=0.01)


def test_a_codec_of_several_planes_is_read_by_its_parts() -> None:
    from moefold.testing.words import parts

    one, two = torch.zeros(2), torch.ones(3)
    assert parts(one) == {"words": one}
    assert list(parts({"words": one, "low": two})) == ["words", "low"]
    assert list(parts(Coded(one, {}).words[None])) == ["words"]
    assert list(parts((one, two))) == ["words 0", "words 1"]


def test_without_hypothesis_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.setitem(sys.modules, "hypothesis.strategies", None)
    with pytest.raises(InputError, match=r"needs hypothesis: pip install 'moefold\[testing\]'"):
        check_codec(Exponent)


def test_the_message_shows_a_small_example(capsys: Any) -> None:
    with pytest.raises(CheckError, match="in a pair of 1 x 1, magnitudes"):
        check_codec(ForgetsSigns)
