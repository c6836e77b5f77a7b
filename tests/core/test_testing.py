"""`moefold.testing` names the defect: deliberately broken codecs."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from moefold import Codec, Coded, CodedLayer, Json, MergedPair, PairMerge
from moefold.codec import pack
from moefold.errors import InputError
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


BROKEN = {
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


def test_the_codec_they_are_made_of_is_not_broken() -> None:
    check_codec(Good, examples=30)


def test_a_codec_of_several_planes_is_read_by_its_parts() -> None:
    from moefold.testing.codecs import parts

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
