"""The codecs of the few-bit pair formats, and the stage that learns their levels once for a model.

The bits are laid out in moefold_kernels.layout_pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from moefold import (
    Checkpoint,
    Codec,
    Coded,
    CodedLayer,
    Json,
    LeveledPair,
    Levels,
    LevelTable,
    MergedPair,
    MergedPairs,
    Stage,
    hookimpl,
    stage,
)
from moefold.errors import FormatError, InputError
from moefold_kernels import FormatError as KernelsFormatError
from moefold_kernels import layout_pairs, reference, reference_pairs
from moefold_kernels.layout_pairs import GROUP

SAMPLE = 1 << 20
"""About so many magnitudes are levels learnt from."""


class FewBits(Codec):
    """A pair in few bits a position: a state of 3 and a level of b, with a bf16 scale for 64 columns of a row."""

    version: ClassVar[int] = 5  # words have columns in layout_pairs.ORDER

    takes_levels: ClassVar[bool] = True
    levels: Annotated[
        list[float] | None,
        Field(description="the magnitudes in units of their scale; by default learnt for each matrix of a layer"),
    ] = None

    @property
    def bits(self) -> int:
        """Of a level's number."""
        return layout_pairs.magnitude_bits(self.name)

    def with_levels(self, table: LevelTable) -> Self:
        """The same with a model's levels, unless the options say others."""
        if self.levels is not None:
            return self
        return self.model_copy(update={"levels": list(table.levels(self.bits).values)})

    def fit(self, matrix: str, weights: Tensor) -> Json:
        """The levels, as learnt from pairs of the experts as they come, and the columns of a row."""
        if self.levels is not None:
            return self._settings(self.levels, weights.shape[-1])
        try:
            return self._settings(Levels.learn(sample(weights), self.bits).values, weights.shape[-1])
        except FormatError as error:
            raise FormatError(f"{matrix}: {error}") from error

    def encode(self, pair: MergedPair, settings: Json) -> Coded:
        """Each magnitude rounded to the nearest level; there is no zero, and what neither slot keeps is slot 0's.

        Counts `filled`: positions that neither kept, and that slot 0 reads as the smallest magnitude; `flushed`: those
        whose level times scale is too small for bfloat16, and reads as zero.
        """
        _check(pair.magnitude)
        neither = ~(pair.keep[0] | pair.keep[1])
        magnitude = torch.where(neither, 0, pair.magnitude.float())
        grid = self._levels(settings).on(magnitude.device)
        scale = grid.scales(magnitude)
        level, value = grid.round(magnitude, _spread(scale, magnitude.shape[-1]))
        coded = self.lay(_kept(LeveledPair(level, scale, pair.negative, pair.keep), neither), settings)
        if neither.is_meta:  # there is nothing to count
            return Coded(coded.words, {})
        flushed = ~neither & (value == 0) & (magnitude.bfloat16() != 0)
        return Coded(coded.words, coded.counts | {"flushed": int(flushed.sum()), "filled": int(neither.sum())})

    def lay(self, pair: LeveledPair, settings: Json) -> Coded:
        """The words of a pair that is in levels already, exactly."""
        try:
            planes = reference_pairs.encode(self.name, pair.level, pair.scale, pair.negative, pair.keep)
        except KernelsFormatError as error:
            raise FormatError(str(error)) from error
        if pair.level.shape[-1] != settings["columns"]:
            raise FormatError(f"{pair.level.shape[-1]} columns came, and settings are for {settings['columns']}")
        return Coded(reference_pairs.to_record(planes), {"clipped": 0, "flushed": 0})

    def decode(self, words: Tensor, settings: Json, slot: int) -> Tensor:
        """What expert `slot` reads."""
        columns = settings["columns"]
        try:
            planes = reference_pairs.from_record(self.name, words, columns)
            return reference_pairs.decode(self.name, planes, settings["levels"], columns, slot)
        except KernelsFormatError as error:
            raise FormatError(str(error)) from error

    def lay_out(self, merge: MergedPairs) -> CodedLayer:
        """Pairs whose magnitudes are levels times scales already; raises FormatError where one is not."""
        settings = {
            name: self._settings(merge.settings[name]["levels"], magnitude.shape[-1])
            for name, magnitude in merge.magnitude.items()
        }
        words: dict[str, Tensor] = {}
        pair_counts: dict[str, list[int]] = {}
        for name, each in settings.items():
            rows: list[Tensor] = []
            for index, pair in enumerate(merge.merged(name)):
                leveled = self._exactly(f"{name} of pair {index}", pair, merge.scale[name][index], each)
                coded = self.lay(leveled, each)
                rows.append(coded.words.cpu())
                for key, value in (reference.masks(pair.keep) | coded.counts).items():
                    pair_counts.setdefault(key, [0] * len(merge.pairs))[index] += value
            words[name] = torch.stack(rows)
        counts: dict[str, Json] = {key: sum(each) for key, each in pair_counts.items()}
        return CodedLayer(words, settings, counts, pair_counts)

    def size(self, rows: int, columns: int) -> int:
        """Bytes of the planes, columns padded to a multiple of 64, and of the scales."""
        return layout_pairs.size(self.name, rows, columns)

    def _exactly(self, where: str, pair: MergedPair, scale: Tensor, settings: Json) -> LeveledPair:
        """The levels' numbers of what are levels times scales; only a magnitude of zero may be kept by neither."""
        grid = self._levels(settings).on(pair.magnitude.device)
        level, values = grid.round(pair.magnitude, _spread(scale, pair.magnitude.shape[-1]))
        neither = ~(pair.keep[0] | pair.keep[1])
        if not torch.equal(values, pair.magnitude.float()):
            wrong = int((values != pair.magnitude).sum())
            raise FormatError(f"{where}: {wrong} magnitudes are no level of {self.name} times their scale")
        if bool((neither & (values > 0)).any()):
            raise FormatError(f"{where}: positions that no expert keeps; {self.name} has no zero")
        return _kept(LeveledPair(level, scale, pair.negative, pair.keep), neither)

    def _settings(self, levels: Iterable[float], columns: int) -> Json:
        try:
            return {"levels": list(layout_pairs.check_levels(self.name, list(levels))), "columns": columns}
        except KernelsFormatError as error:
            raise FormatError(str(error)) from error

    def _levels(self, settings: Json) -> Levels:
        return Levels(self.bits, tuple(settings["levels"]))


class Pair4(FewBits):
    """A pair in 4 bits a position, 2 bits a weight: 2 magnitudes, with a bf16 scale for 64 columns of a row."""

    name: ClassVar[str] = "pair4"


class Pair5(FewBits):
    """A pair in 5 bits a position, 2.5 bits a weight: 4 magnitudes, with a bf16 scale for 64 columns of a row."""

    name: ClassVar[str] = "pair5"


class Pair6(FewBits):
    """A pair in 6 bits a position, 3 bits a weight: 8 magnitudes, with a bf16 scale for 64 columns of a row."""

    name: ClassVar[str] = "pair6"


class Pair8(FewBits):
    """A pair in 8 bits a position, 4 bits a weight: 32 magnitudes, with a bf16 scale for 64 columns of a row."""

    name: ClassVar[str] = "pair8"


def sample(weights: Tensor, count: int = SAMPLE, members: Tensor | None = None) -> Tensor:
    """Magnitudes in units of their group's root mean square, of experts [expert, rows, columns] merged two by two.

    Those are `members` [expert], in their order, or all as they lie; nothing of them is copied but the rows looked at.
    Each is what costs least of sharing the mean, or keeping either; about `count`, from rows spread over all experts.
    Levels of single weights instead leave 10 % more error of merged magnitudes in pair4 to pair6, and 26 % in pair8
    (shipped model).
    """
    order = torch.arange(len(weights)) if members is None else members.cpu()
    pairs, rows, columns = len(order) // 2, *weights.shape[1:]
    step = max(1, pairs * rows * columns // count)
    at = torch.arange(0, pairs * rows, step)
    experts = order[: 2 * pairs].view(pairs, 2).T[:, at // rows]  # [2, row]
    some = weights[experts.to(weights.device), (at % rows).to(weights.device)].float().abs()
    mean, (first, second) = some.mean(dim=0), some
    shared, larger = (first - second).square() / 2, some.amax(dim=0)
    merged = torch.where(shared <= some.amin(dim=0).square(), mean, larger)
    found = []
    for part in merged.split(GROUP, dim=-1):
        scale = part.square().mean(dim=-1, keepdim=True).sqrt()
        found.append((part / scale)[(scale > 0).expand_as(part)])
    return torch.cat(found)


@stage("levels", version=2)
def levels(
    checkpoint: Checkpoint,
    *,
    layers: Annotated[int, Field(ge=1, description="from how many layers, spread over the model")] = 4,
) -> LevelTable:
    """Learn the magnitudes of the few-bit pair formats from the model's experts, merged two by two."""
    every = checkpoint.layers()
    if not every:
        raise InputError(f"{checkpoint.path} has no layer with routed experts")
    step = (len(every) - 1) / max(layers - 1, 1)
    chosen = [every[index] for index in sorted({round(i * step) for i in range(layers)})]
    found = []
    for layer in chosen:
        matrices = layer.experts().matrices()
        found += [sample(weights, SAMPLE // (len(chosen) * len(matrices))) for weights in matrices.values()]
    magnitudes = torch.cat(found)
    if not len(magnitudes):
        raise InputError(f"{checkpoint.path} has no layer with two experts, of which a pair could be made")
    values = {str(bits): list(Levels.learn(magnitudes, bits).values) for bits in layout_pairs.MAGNITUDE_BITS.values()}
    return LevelTable(values, {"layers": [layer.number for layer in chosen], "magnitudes": len(magnitudes)})


def _spread(scale: Tensor, columns: int) -> Tensor:
    return scale.repeat_interleave(GROUP, dim=-1)[..., :columns]


def _kept(pair: LeveledPair, neither: Tensor) -> LeveledPair:
    """With slot 0 reading, as positive, what neither keeps."""
    flags = torch.stack([neither, torch.zeros_like(neither)])
    return pair._replace(negative=pair.negative & ~neither, keep=pair.keep | flags)


def _check(magnitude: Tensor) -> None:
    if magnitude.numel() and not magnitude.is_meta:
        least, most = torch.aminmax(magnitude)
        if not (least >= 0 and most < torch.inf):
            raise FormatError(
                f"magnitudes lie in {least.item()} .. {most.item()}: they must be finite and not negative"
            )


@hookimpl
def moefold_codecs() -> list[type[Codec]]:
    return [Pair4, Pair5, Pair6, Pair8]


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [levels]
