"""`check_codec`: what packing, the store and readers rely on, tried on pairs that hypothesis makes up."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from moefold.artifact import Json
from moefold.artifacts import Experts, MergedPair, PairMerge, tensor_bytes
from moefold.codec import Codec, Coded, pack
from moefold.errors import MoefoldError
from moefold.testing import merges, unread
from moefold.testing.comparing import difference, snapshot
from moefold.testing.failures import CheckError, failing, require
from moefold.testing.words import parts

ODD = ((1, 1), (1, 7), (3, 5), (5, 64), (2, 65), (7, 130), (2, 515))
"""Sizes [rows, columns] that a layout in words or groups has to cope with."""


def check_codec(
    codec: Codec | type[Codec], *, tolerance: float = 0.0, neither: bool = True, examples: int = 100
) -> None:
    """Encode and decode many pairs and raise CheckError for what is lost in silence, or is not as declared.

    Checked: settings are JSON; what an expert does not keep reads as zero, and signs are right; every other value comes
    back as bfloat16 has it, but for as many as are counted as clipped or flushed, and no more are counted; zeros,
    subnormal numbers, halves that round to even, the largest bfloat16, sizes from 1 by 1; NaN and infinity are refused;
    `fit`, `encode` and `decode` leave what they are given as it was, and give the same twice; `size` is what the words
    take; meta tensors give the same shapes; a whole layer packs and is stored; every option is read.

    `tolerance`: for a codec that rounds further, ||decoded - wanted|| / ||wanted|| allowed on normal weights (then
    single values are not compared, but what becomes zero has to be counted). `neither`: False for a format without a
    zero, where one of the two experts keeps every position. `examples`: how many pairs. Needs hypothesis, else
    InputError.
    """
    merges.strategies()
    codec = codec() if isinstance(codec, type) else codec
    _Check(codec, tolerance, neither).run(examples)


class _Check:
    def __init__(self, codec: Codec, tolerance: float, neither: bool) -> None:
        self.codec, self.options_read = unread.watched(codec)
        self.tolerance, self.neither = tolerance, neither
        self.what = f"codec {codec.name}"

    def run(self, examples: int) -> None:
        self._declared()
        for rows, columns in ODD:
            self._sizes(merges.normal(rows, columns, neither=self.neither))
        self._zeros()
        self._refuses()
        self._made_up(examples)
        for pair in merges.edges():
            self._round_trip(pair)
        self._strided(merges.normal(3, 70, neither=self.neither))
        self._close()
        self._layer()
        unread.require_read(self.what, type(self.codec).model_fields, self.options_read)

    def _declared(self) -> None:
        require(bool(self.codec.name), self.what, "it has no name")
        require(bool(type(self.codec).__doc__), self.what, "it has no docstring; `moefold list` shows its first line")
        for name, field in type(self.codec).model_fields.items():
            how = f"option {name} has no description; write Annotated[TYPE, Field(description=...)]"
            require(bool(field.description), self.what, how)

    def _made_up(self, examples: int) -> None:
        from hypothesis import HealthCheck, Phase, given, settings

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,  # the same examples in every run
            database=None,
            report_multiple_bugs=False,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
        )
        @given(merges.merges(self.neither))
        def one(pair: MergedPair) -> None:
            self._round_trip(pair)

        one()

    def _settings(self, matrix: str, weights: Tensor) -> Json:
        """What `fit` learns, as it comes back from JSON: readers have it from a file."""
        before = weights.clone()
        found, again = self.codec.fit(matrix, weights), self.codec.fit(matrix, weights)
        if changed := difference(before, weights, "weights"):
            raise CheckError(f"{self.what}: fit changes its input in place ({changed}); work on a copy")
        with failing(self.what, f"fit gave {found!r}, which is no JSON"):
            told = json.loads(json.dumps(found, allow_nan=False))
        require(found == again, self.what, f"fit gave {found!r} and then {again!r} for the same weights")
        return told

    def _encode(self, pair: MergedPair) -> tuple[Coded, Json]:
        """Words and settings, with all that can be told without decoding."""
        before = snapshot(tuple(pair))
        with failing(self.what, f"fit or encode fails on {_described(pair)}"):
            settings = self._settings("up_proj", merges.reads(pair).float())
            coded, again = self.codec.encode(pair, settings), self.codec.encode(pair, settings)
        if changed := difference(before, tuple(pair)):
            raise CheckError(f"{self.what}: encode changes its input in place ({changed}); work on a copy")
        if found := difference(parts(coded.words), parts(again.words)):
            raise CheckError(f"{self.what}: the same pair gave other words the second time ({found})")
        for name, count in coded.counts.items():
            require(type(count) is int and count >= 0, self.what, f"count {name} is {count!r}; counts are int, from 0")
        return coded, settings

    def _decode(self, coded: Coded, settings: Json, pair: MergedPair) -> Tensor:
        """Both slots, [2, rows, columns]."""
        before = snapshot(parts(coded.words))
        with failing(self.what, f"decode fails on {_described(pair)}"):
            slots = [self.codec.decode(coded.words, settings, slot) for slot in (0, 1)]
            again = [self.codec.decode(coded.words, settings, slot) for slot in (0, 1)]
        if changed := difference(before, parts(coded.words)):
            raise CheckError(f"{self.what}: decode changes the words in place ({changed}); work on a copy")
        if apart := difference(slots, again, "slot"):
            raise CheckError(f"{self.what}: the same words read differently the second time ({apart})")
        for slot, found in enumerate(slots):
            said = f"decode of slot {slot} gave {found.dtype} {list(found.shape)}"
            right = found.dtype == torch.bfloat16 and found.shape == pair.magnitude.shape
            require(right, self.what, f"{said}; the pair is {list(pair.magnitude.shape)}, and readers want bfloat16")
        return torch.stack(slots)

    def _round_trip(self, pair: MergedPair) -> None:
        if float(pair.magnitude.max()) >= merges.HUGE:
            return self._huge(pair)
        coded, settings = self._encode(pair)
        found, wanted = self._decode(coded, settings, pair), merges.reads(pair)
        self._say(pair, found, wanted, ~found.isfinite(), "which is not finite")
        self._say(pair, found, wanted, ~pair.keep & (found != 0), "where that expert keeps nothing and should read 0")
        signs = (found != 0) & (torch.signbit(found) != pair.negative)
        self._say(pair, found, wanted, signs, "which has the wrong sign")
        self._nothing_silent(pair, coded, found, wanted)
        return None

    def _say(self, pair: MergedPair, found: Tensor, wanted: Tensor, wrong: Tensor, why: str) -> None:
        if not bool(wrong.any()):
            return
        slot, row, column = wrong.nonzero()[0].tolist()
        magnitude, place = float(pair.magnitude[row, column]), f"row {row}, column {column}"
        got, right = float(found[slot, row, column]), float(wanted[slot, row, column])
        raise CheckError(
            f"{self.what}: slot {slot} reads {got:g} at {place}, {why} (magnitude {magnitude:g}, kept by "
            f"{pair.keep[:, row, column].int().tolist()}, wanted {right:g}); in {_described(pair)}"
        )

    def _nothing_silent(self, pair: MergedPair, coded: Coded, found: Tensor, wanted: Tensor) -> None:
        """Positions lost are positions counted; of a codec that rounds further, those that became zero are."""
        wrong = found != wanted if not self.tolerance else (found == 0) & (wanted != 0)
        lost = int(wrong.any(dim=0).sum())
        names = ("clipped", "flushed") if not self.tolerance else ("flushed",)
        counted = sum(coded.counts.get(name, 0) for name in names)
        if lost > counted:
            what = "not as they were" if not self.tolerance else "zero that were not"
            why = f"and {lost} positions are {what}, of which {counted} are counted as lost"
            self._say(pair, found, wanted, wrong, why)
        rounded = pair.keep & (
            wanted.float().abs() != pair.magnitude
        )  # may be lost to the format and right as bfloat16
        said = f"{counted} positions are counted as lost ({', '.join(names)}), and {lost} are, in {_described(pair)}"
        require(counted <= lost + int(rounded.any(dim=0).sum()), self.what, said)

    def _huge(self, pair: MergedPair) -> None:
        """Clipped or refused, but neither infinite nor in silence."""
        try:
            settings = self._settings("up_proj", merges.reads(pair).float())
            coded = self.codec.encode(pair, settings)
        except (MoefoldError, CheckError) as error:
            refused = isinstance(error, MoefoldError) or isinstance(error.__cause__, MoefoldError)
            return require(refused, self.what, f"fit or encode fails on {_described(pair)}: {error}")
        found, wanted = self._decode(coded, settings, pair), merges.reads(pair)
        self._say(pair, found, wanted, ~found.isfinite(), "which is not finite")
        return None if self.tolerance else self._nothing_silent(pair, coded, found, wanted)

    def _sizes(self, pair: MergedPair) -> None:
        coded, settings = self._encode(pair)
        rows, columns = pair.magnitude.shape
        taken, declared = sum(map(tensor_bytes, parts(coded.words).values())), self.codec.size(rows, columns)
        require(taken == declared, self.what, f"size({rows}, {columns}) says {declared} bytes; its words take {taken}")
        require(type(declared) is int, self.what, f"size({rows}, {columns}) says {declared!r}; bytes are int")
        self._decode(coded, settings, pair)
        for name, part in parts(coded.words).items():
            require(not part.is_complex(), self.what, f"{name} are {part.dtype}")
        self._meta(pair, coded, settings)

    def _strided(self, pair: MergedPair) -> None:
        """A recipe may give views of larger tensors."""
        coded, settings = self._encode(pair)
        apart = MergedPair(*(part.transpose(-1, -2).contiguous().transpose(-1, -2) for part in pair))
        with failing(self.what, "encode fails on tensors that are not contiguous"):
            other = self.codec.encode(apart, settings)
        found = difference(parts(coded.words), parts(other.words))
        require(found is None, self.what, f"tensors that are not contiguous give other words ({found})")

    def _meta(self, pair: MergedPair, coded: Coded, settings: Json) -> None:
        with failing(self.what, "meta tensors (which tell sizes before any work) do not pass through it"):
            made = self.codec.encode(MergedPair(*(tensor.to("meta") for tensor in pair)), settings)
            read = [self.codec.decode(made.words, settings, slot) for slot in (0, 1)]
        for name, part in parts(coded.words).items():
            other = parts(made.words)[name]
            same = (other.is_meta, other.shape, other.dtype) == (True, part.shape, part.dtype)
            said = f"of meta tensors, {name} are {other.dtype} {list(other.shape)} on {other.device}"
            require(same, self.what, f"{said}, and of real ones {part.dtype} {list(part.shape)}")
        for slot, found in enumerate(read):
            same = (found.is_meta, found.shape, found.dtype) == (True, pair.magnitude.shape, torch.bfloat16)
            said = f"decode of meta words gave {found.dtype} {list(found.shape)} on {found.device} for slot {slot}"
            require(same, self.what, f"{said}; of real ones it gives bfloat16 {list(pair.magnitude.shape)}")

    def _zeros(self) -> None:
        pair = merges.pair_of(torch.zeros(3, 70))
        coded, settings = self._encode(pair)
        found = self._decode(coded, settings, pair)
        self._say(pair, found, merges.reads(pair), found != 0, "of a pair of zeros")

    def _refuses(self) -> None:
        good = merges.normal(3, 70, neither=self.neither)
        settings = self._settings("up_proj", merges.reads(good).float())
        for bad in (torch.nan, torch.inf):
            magnitude = good.magnitude.clone()
            magnitude[1, 1] = bad
            pair = MergedPair(magnitude, good.negative, torch.ones_like(good.keep))
            try:
                self.codec.encode(pair, settings)
            except MoefoldError:
                continue
            except Exception as error:
                said = f"encode raises {type(error).__name__} for a magnitude of {bad}"
                raise CheckError(f"{self.what}: {said}; raise FormatError that says where and what") from error
            raise CheckError(f"{self.what}: encode takes a magnitude of {bad} in silence; raise FormatError")

    def _close(self) -> None:
        """On normal weights of several sizes, as models have them."""
        for exponent in (-12, -6, 0):
            pair = merges.normal(8, 256, 2.0**exponent, seed=3, neither=self.neither)
            found, wanted = self._decode(*self._encode(pair), pair).double(), merges.reads(pair).double()
            error = float((found - wanted).norm() / wanted.norm())
            said = f"normal weights of size 2**{exponent} come back with a relative error of {error:.3g}"
            require(error <= self.tolerance, self.what, f"{said}; {self.tolerance:g} is allowed")

    def _layer(self) -> None:
        """Through `pack`, as a pipeline does it, whichever way the codec takes."""
        experts = Experts(torch.ones(2, 12, 70), torch.ones(2, 70, 6))
        merge = PairMerge(experts, [[0, 1]], [], lambda matrix, _: _whole(experts, matrix))
        with failing(self.what, "a layer cannot be packed with it"):
            packed = pack(self.codec, merge)
        declared = sum(self.codec.size(*weights.shape[1:]) for weights in experts.matrices().values())
        require(packed.bytes() == declared, self.what, f"a layer packs to {packed.bytes()} bytes; {declared} declared")
        at_once = self.codec.pack_layer(merge)
        if at_once is not None:
            for matrix in experts.matrices():
                coded = self.codec.encode(_whole(experts, matrix), at_once.settings[matrix])
                found = difference(parts(coded.words), parts(at_once.words[matrix][0]))
                require(found is None, self.what, f"pack_layer gives other words than encode ({matrix}: {found})")


def _whole(experts: Experts, matrix: str) -> MergedPair:
    return merges.pair_of(experts.matrices()[matrix][0])


def _described(pair: MergedPair) -> str:
    rows, columns = pair.magnitude.shape
    return (
        f"a pair of {rows} x {columns}, magnitudes {float(pair.magnitude.min()):g} .. {float(pair.magnitude.max()):g}"
    )
