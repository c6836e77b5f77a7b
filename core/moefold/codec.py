"""The codec protocol: pure tensors in, tensors out; each codec is also the stages `pack.<name>` and `unpack.<name>`.

A codec is a frozen pydantic model: its fields are the options of its stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moefold.artifact import Json
from moefold.artifacts import Experts, MergedPair, Paired, PairMerge, as_index
from moefold.errors import FormatError, InputError
from moefold.layer import Layer
from moefold.magnitudes import LevelTable
from moefold.merged_pairs import MergedPairs
from moefold.replacements import Aligned, Packed, Unpacked
from moefold.stage import Context, Port, Stage, stage
from moefold_kernels import reference

_COUNTS = ("weights", "shared", "own", "other", "zero", "clipped", "flushed")


class Coded(NamedTuple):
    """One merged matrix in a packed format, and how many positions were `clipped` or `flushed` on the way."""

    words: Tensor  # [rows, columns] int16 (few-bit formats: each row's planes and scales)
    counts: dict[str, int]


class CodedLayer(NamedTuple):
    """All pairs of a layer in a packed format."""

    words: dict[str, Tensor]  # matrix -> [pair, rows, columns] int16, on the CPU
    settings: dict[str, Json]
    counts: dict[str, Json]
    pair_counts: dict[str, list[int]] | None = None
    """The same of each pair by itself, where they were counted one by one."""


class PairCounts:
    """Adds up what the positions of each pair hold, over the matrices of a layer."""

    def __init__(self, pairs: int) -> None:
        self.of_pairs: dict[str, list[int]] = {name: [0] * pairs for name in _COUNTS}

    def add(self, pair: int, counts: Mapping[str, int]) -> None:
        """Of one matrix of a pair."""
        for name, count in counts.items():
            self.of_pairs.setdefault(name, [0] * len(self.of_pairs["weights"]))[pair] += count

    def layer(self) -> dict[str, Json]:
        """Over all pairs."""
        return {name: sum(counts) for name, counts in self.of_pairs.items()}


class Codec(BaseModel):
    """Turns merged pairs into words and back; the bits themselves are defined in moefold_kernels.layout."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    version: ClassVar[int] = 1
    takes_levels: ClassVar[bool] = False
    """Whether `pack.<name>` has an input for the levels of a model's magnitudes."""

    def fit(self, matrix: str, weights: Tensor) -> Json:
        """Settings for one matrix of a layer, learnt from its paired experts `[expert, rows, columns]`."""
        raise NotImplementedError

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        """The words of one merged matrix; exact where the format can hold the value, counted where it cannot."""
        raise NotImplementedError

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        """What expert `slot` (0 or 1) reads: `[rows, columns]` bfloat16."""
        raise NotImplementedError

    def pack_layer(self, merge: PairMerge) -> CodedLayer | None:  # noqa: ARG002  (the default takes nothing)
        """All pairs at once, equal in every bit and count to `fit` and `encode`; None to have those called instead."""
        return None

    def with_levels(self, table: LevelTable) -> Self:  # noqa: ARG002  (as above)
        """The codec with the levels of a model's magnitudes, where it takes them."""
        return self

    def lay_out(self, merge: MergedPairs) -> CodedLayer | None:  # noqa: ARG002  (as above)
        """Pairs that were merged for this format; None to have `fit` and `encode` called instead."""
        return None

    def packed(self, merge: Paired) -> Packed:
        """Every pair of a layer in this format: what the stage `pack.<name>` makes."""
        return pack(self, merge)

    def unpacked(self, packed: Packed, layer: Layer, device: torch.device) -> Unpacked:
        """A layer's experts as they read once packed: what the stage `unpack.<name>` makes."""
        return unpack(self, packed, layer, device)

    @classmethod
    def packer(cls, device: torch.device) -> str:  # noqa: ARG003  (for codecs whose answer depends on it)
        """Who packs what lies on this device, for `moefold doctor`."""
        return "pair by pair, in plain torch"

    def size(self, rows: int, columns: int) -> int:
        """Bytes of one pair's words for a matrix of this shape."""
        raise NotImplementedError


def pack(codec: Codec, merge: Paired) -> Packed:
    """Encode every pair of a layer: all at once where the codec can, else one matrix of one pair at a time."""
    if isinstance(merge, MergedPairs):
        return _pack_merged(codec, merge)
    if not isinstance(merge, PairMerge):
        raise InputError(f"pack.{codec.name} takes PairMerge or MergedPairs, not {type(merge).__name__}")
    coded = codec.pack_layer(merge) if merge.pairs else CodedLayer({}, {}, dict.fromkeys(_COUNTS, 0))
    coded = _pair_by_pair(codec, merge) if coded is None else coded
    return Packed(
        format=codec.name,
        pairs=merge.pairs,
        dense=merge.alone,
        words=coded.words,
        experts=_alone(merge.experts, merge.alone),
        settings=coded.settings,
        counts=coded.counts,
        pair_counts=coded.pair_counts or {},
        route=None if merge.experts.route is None else merge.experts.route.tolist(),
        biases=_biases(merge.experts),
    )


def _pair_by_pair(codec: Codec, merge: PairMerge) -> CodedLayer:
    paired = as_index([expert for pair in merge.pairs for expert in pair])
    matrices = merge.experts.matrices()
    if len(paired) != merge.experts.count:
        matrices = {name: weights[paired] for name, weights in matrices.items()}
    return _encode(codec, len(merge.pairs), matrices, merge.merged)


def _pack_merged(codec: Codec, merge: MergedPairs) -> Packed:
    """Lay out what is merged already: settings are fitted to the magnitudes themselves."""
    if merge.format != codec.name:
        raise InputError(f"these pairs were merged for the format {merge.format}; use pack.{merge.format}")
    coded = codec.lay_out(merge) if merge.pairs else CodedLayer({}, {}, dict.fromkeys(_COUNTS, 0))
    if coded is None:
        coded = _encode(codec, len(merge.pairs), merge.magnitude, merge.merged)
    return Packed(
        format=codec.name,
        pairs=merge.pairs,
        dense=merge.alone,
        words=coded.words,
        experts=merge.experts,
        settings=coded.settings,
        counts=coded.counts,
        pair_counts=coded.pair_counts or {},
        route=merge.route,
        biases=merge.biases,
    )


def _encode(
    codec: Codec, pairs: int, matrices: Mapping[str, Tensor], merged: Callable[[str], Iterable[MergedPair]]
) -> CodedLayer:
    """Pair by pair; `matrices` [any, rows, columns] are what settings are fitted to."""
    words: dict[str, Tensor] = {}
    settings: dict[str, Json] = {}
    counts = PairCounts(pairs)
    for matrix, weights in matrices.items():
        settings[matrix] = codec.fit(matrix, weights)
        out = torch.empty(0, dtype=torch.int16)
        for index, pair in enumerate(merged(matrix)):
            coded = codec.encode(pair, settings[matrix])
            if coded.words.dtype != torch.int16:
                raise FormatError(f"codec {codec.name} gave {coded.words.dtype} words; a codec gives int16")
            if not index:
                out = torch.empty(pairs, *coded.words.shape, dtype=torch.int16)  # on the CPU: it is on its way out
            out[index] = coded.words.cpu()
            counts.add(index, reference.masks(pair.keep) | coded.counts)
        words[matrix] = out
    return CodedLayer(words, settings, counts.layer(), counts.of_pairs)


def _biases(experts: Experts) -> dict[str, Tensor]:
    """Those that are not the source's own."""
    if experts.route is None and not isinstance(experts, Aligned):
        return {}
    found = {"gate_up_bias": experts.gate_up_bias, "down_bias": experts.down_bias}
    return {name: bias.cpu() for name, bias in found.items() if bias is not None}


def _alone(experts: Experts, alone: list[int]) -> dict[str, Tensor]:
    if not alone:
        return {}
    return {name: weights[as_index(alone)].cpu() for name, weights in experts.matrices().items()}


def pack_stage(codec: type[Codec]) -> Stage[Any, Packed]:
    """The stage `pack.<name>` of a codec: its options are the codec's fields."""
    ports = {"merge": Port("merge", Paired, "one")}
    if codec.takes_levels:
        ports["table"] = Port("table", LevelTable, "optional")  # `levels` is an option

    def run(
        merge: Paired, table: LevelTable | None = None, *, context: Context | None = None, **options: Json
    ) -> Packed:
        merge = merge if context is None else merge.to(context.device)  # in another process they came from the store
        return pack(codec(**options) if table is None else codec(**options).with_levels(table), merge)

    run.__doc__ = codec.__doc__
    return Stage(
        name=f"pack.{codec.name}",
        function=run,
        ports=ports,
        injected={"context": Context},
        options=codec,
        produces=Packed,
        keep="until read",  # half of a model's experts: what `save` wrote need not lie in the store as well
        version=codec.version,
    )


def unpack(codec: Codec, packed: Packed, layer: Layer, device: torch.device) -> Unpacked:
    """A layer's experts as they read once packed: those left alone as they were, every paired one decoded."""
    if packed.route is not None:
        return _unpack_merged(codec, packed, device)
    own = layer.experts(device)
    _decode(codec, packed, own.matrices(), device)
    biases = {"gate_up_bias": own.gate_up_bias, "down_bias": own.down_bias}
    biases |= {name: bias.to(device) for name, bias in packed.biases.items()}
    return Unpacked(own.gate_up, own.down, gated=own.gated, **biases)


def _decode(codec: Codec, packed: Packed, matrices: dict[str, Tensor], device: torch.device) -> None:
    for matrix, weights in matrices.items():
        for index, pair in enumerate(packed.pairs):
            words = packed.words[matrix][index].to(device)
            for slot, expert in enumerate(pair):
                weights[expert] = codec.decode(words, packed.settings[matrix], slot).to(weights.dtype)


def _unpack_merged(codec: Codec, packed: Packed, device: torch.device) -> Unpacked:
    """The same of experts that were merged before they were packed: nothing of them is in the model's files."""
    dtype = next((part.dtype for part in packed.experts.values()), torch.bfloat16)
    inner, hidden = (packed.words[name].shape[1] for name in ("up_proj", "down_proj"))  # rows, whatever the format
    count, gated = 2 * len(packed.pairs) + len(packed.dense), "gate_proj" in packed.words
    gate_up = torch.empty(count, inner * (1 + gated), hidden, dtype=dtype, device=device)
    down = torch.empty(count, hidden, inner, dtype=dtype, device=device)
    biases = {name: bias.to(device) for name, bias in packed.biases.items()}
    out = Unpacked(gate_up, down, gated=gated, route=as_index(packed.route or []), **biases)
    for name, weights in out.matrices().items():
        for row, expert in enumerate(packed.dense):
            weights[expert] = packed.experts[name][row].to(device)
    _decode(codec, packed, out.matrices(), device)
    return out


def unpack_stage(codec: type[Codec]) -> Stage[Any, Unpacked]:
    """The stage `unpack.<name>`: what the next layer's calibration reads to go through already compressed layers."""

    @stage(f"unpack.{codec.name}", keep="never", version=codec.version)
    def run(packed: Packed, layer: Layer, context: Context) -> Unpacked:
        """Decode a packed layer, to calibrate the next ones through it: `needs: {experts: unpack.NAME}` of forward."""
        if packed.pairs and packed.format != codec.name:
            raise FormatError(f"unpack.{codec.name} was given the format {packed.format}; use unpack.{packed.format}")
        return unpack(codec(), packed, layer, context.device)

    return run
