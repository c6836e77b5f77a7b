"""What the few-bit pair formats mean, in plain torch, on any device; kernels are tested against this file.

`fields` are 8-bit integers that torch has masks and shifts for; a plane is made and read nibble by nibble.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moefold_kernels import layout, layout_pairs
from moefold_kernels.errors import FormatError
from moefold_kernels.layout_pairs import ALONE, GROUP, NIBBLE, ORDER, STATE_BITS
from moefold_kernels.reference import PackedExperts

Planes = Mapping[str, Tensor]
"""`words` [..., words] int32, `low` alike where the format has it, `scale` [..., groups] int16: bits of bf16."""


def states(negative: Tensor, keep: Tensor) -> Tensor:
    """The states of positions: uint8 [...] of two bool [2, ...]. Raises FormatError where neither slot keeps one."""
    if negative.dtype != torch.bool or keep.dtype != torch.bool or negative.shape != keep.shape:
        raise FormatError(f"negative {_told(negative)} and keep {_told(keep)}; write bool of one shape [2, ...]")
    if not keep.is_meta and not bool((keep[0] | keep[1]).all()):
        raise FormatError("few-bit pair formats have no zero: every position is kept by a slot, or by both")
    first, second = negative.to(torch.uint8)
    shared = first | second << 1
    alone = torch.where(keep[0], ALONE | first, ALONE | 2 | second)
    return torch.where(keep[0] & keep[1], shared, alone)


def encode(format: str, level: Tensor, scale: Tensor, negative: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """The planes of a matrix: `level` [..., rows, columns] uint8, `scale` [..., rows, groups] bf16, flags [2, ...].

    Exact: nothing is rounded here. Raises FormatError for what the format cannot hold.
    """
    bits = layout_pairs.magnitude_bits(format)
    *outer, columns = level.shape
    if level.dtype != torch.uint8 or negative.shape != (layout.SLOTS, *level.shape):
        raise FormatError(f"levels {_told(level)}, flags {_told(negative)}; write uint8 [...], and bool [2, ...]")
    if scale.dtype != torch.bfloat16 or tuple(scale.shape) != (*outer, layout_pairs.groups(columns)):
        raise FormatError(f"scales are {_told(scale)}; write bfloat16, one for each {GROUP} columns of a row")
    if not level.is_meta and level.numel() and int(level.max()) >> bits:
        raise FormatError(f"level {int(level.max())} of {format}, which has {1 << bits}")
    if not scale.is_meta and not bool(((scale >= 0) & scale.isfinite()).all()):
        raise FormatError("scales are finite and not negative")
    state, low = states(negative, keep), layout_pairs.low_bits(format)
    planes = {"words": _plane(state | level >> low << STATE_BITS, NIBBLE, layout_pairs.places(format, "words"))}
    if low:
        planes["low"] = _plane(level & (1 << low) - 1, low, layout_pairs.places(format, "low"))
    return planes | {"scale": scale.view(torch.int16)}


def stored(format: str, planes: Planes, columns: int) -> dict[str, Tensor]:
    """The planes of a whole matrix [..., rows, width], as they lie in files and on devices (layout_pairs.banded)."""
    _check(format, planes, columns)
    if not layout_pairs.banded(planes["words"].shape[-2], columns):
        return dict(planes)
    return {name: layout_pairs.to_bands(plane, columns) for name, plane in planes.items()}


def by_rows(format: str, planes: Planes, columns: int) -> Planes:
    """The planes [..., rows, width] of a matrix as it is stored, or by rows already; widths tell which."""
    width, words = layout_pairs.planes(format, columns)["words"], planes["words"].shape[-1]
    if words != layout_pairs.BAND * width or columns % layout_pairs.STEP:
        return planes
    return {name: layout_pairs.from_bands(plane, columns) for name, plane in planes.items()}


def fields(format: str, planes: Planes, columns: int) -> tuple[Tensor, Tensor]:
    """The states and the levels' numbers (uint8 [..., columns]) that the planes, by rows, hold."""
    _check(format, planes, columns)
    low = layout_pairs.low_bits(format)
    nibbles = _positions(planes["words"], NIBBLE, layout_pairs.places(format, "words"), columns)
    level = nibbles >> STATE_BITS << low
    if low:
        level |= _positions(planes["low"], low, layout_pairs.places(format, "low"), columns)
    return nibbles & (1 << STATE_BITS) - 1, level


def decode(format: str, planes: Planes, levels: Sequence[float], columns: int, slot: int) -> Tensor:
    """One slot's bf16 values [..., columns]: `(-1) ** sign * bf16(levels[number] * scale)` where it reads, else +0.

    The product of two bf16 numbers is rounded once, as a bf16 multiplication does it. Planes may be as they are stored.
    """
    if slot not in range(layout.SLOTS):
        raise FormatError(f"slot {slot!r}: a pair has slots 0 and 1")
    planes = by_rows(format, planes, columns)
    state, number = fields(format, planes, columns)
    table = torch.tensor(levels, dtype=torch.bfloat16, device=state.device)
    scale = planes["scale"].view(torch.bfloat16).repeat_interleave(GROUP, dim=-1)[..., :columns]
    return table[number.long()] * scale * _factor(slot, state)


def to_record(planes: Planes) -> Tensor:
    """The planes of a matrix as one row of 16-bit integers for each of its rows: int16 [..., record]."""
    parts = [planes[name].contiguous() for name in ("words", "low", "scale") if name in planes]
    return torch.cat([part.view(torch.int16) for part in parts], dim=-1)


def from_record(format: str, record: Tensor, columns: int) -> dict[str, Tensor]:
    """The planes of `to_record`, each with a memory of its own."""
    if record.dtype != torch.int16 or record.shape[-1] != layout_pairs.record(format, columns):
        raise FormatError(
            f"rows of {format} are {layout_pairs.record(format, columns)} int16 for {columns} columns, and these are "
            f"{_told(record)}"
        )
    widths = layout_pairs.planes(format, columns)
    sizes = [width if name == "scale" else 2 * width for name, width in widths.items()]
    parts = dict(zip(widths, record.split(sizes, dim=-1), strict=True))
    whole = {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
    return {name: part if name == "scale" else part.view(torch.int32) for name, part in whole.items()}


@dataclass(frozen=True)
class LeveledExperts(PackedExperts):
    """One layer's experts in a few-bit pair format; `words` is the nibble plane, and `window` is empty.

    Planes are as they are stored: [pair, rows, width], or in bands.
    """

    format: str
    low: Mapping[str, Tensor]  # as words, empty for pair4
    scale: Mapping[str, Tensor]  # as words -> [pair, rows, groups] int16
    levels: Mapping[str, Sequence[float]]
    columns: Mapping[str, int]

    def planes(self, matrix: str) -> dict[str, Tensor]:
        """Of one matrix of every pair."""
        low = {"low": self.low[matrix]} if self.low else {}
        return {"words": self.words[matrix], **low, "scale": self.scale[matrix]}

    def decoded(self, matrix: str, slot: int) -> Tensor:
        """What one slot of every pair reads."""
        return decode(self.format, self.planes(matrix), self.levels[matrix], self.columns[matrix], slot)

    def shape(self, matrix: str) -> tuple[int, int]:
        """Rows and columns."""
        plane, columns = self.words[matrix], self.columns[matrix]
        width = layout_pairs.planes(self.format, columns)["words"]
        return plane.shape[1] * (plane.shape[2] // width), columns


def _factor(slot: int, state: Tensor) -> Tensor:
    """+1, -1 or 0, by the state: bf16."""
    signed = [(1 - 2 * (state >> slot & 1), 0) for state in range(ALONE)]
    signed += [(1 - 2 * (state & 1), (state - ALONE) >> 1 ^ slot) for state in range(ALONE, 2 * ALONE)]
    table = torch.tensor([0 if other else sign for sign, other in signed], dtype=torch.bfloat16, device=state.device)
    factor: Tensor = table[state.long()]
    return factor


def _plane(values: Tensor, bits: int, places: Sequence[int]) -> Tensor:
    """32-bit words of `bits` a position: int32 [..., words], rows padded to whole groups with clear bits."""
    columns = values.shape[-1]
    padded = F.pad(values, (0, layout_pairs.groups(columns) * GROUP - columns))
    padded = padded.unflatten(-1, (-1, GROUP))[..., _order(values)].flatten(-2).to(torch.int32)
    spread = padded.unflatten(-1, (-1, NIBBLE // bits, len(places)))  # [..., word, place in a nibble, one of eight]
    words: Tensor = (spread << _shifts(values, bits, places)).sum(dim=(-2, -1), dtype=torch.int32)  # disjoint bits: OR
    return words


def _positions(words: Tensor, bits: int, places: Sequence[int], columns: int) -> Tensor:
    """What `_plane` was given: uint8 [..., columns]."""
    spread: Tensor = words[..., None, None] >> _shifts(words, bits, places) & (1 << bits) - 1
    positions = spread.flatten(-3).to(torch.uint8).unflatten(-1, (-1, GROUP))
    values: Tensor = positions[..., _order(words).argsort()].flatten(-2)[..., :columns]
    return values


def _order(like: Tensor) -> Tensor:
    return torch.tensor(ORDER, device=like.device)


def _shifts(like: Tensor, bits: int, places: Sequence[int]) -> Tensor:
    within = torch.arange(0, NIBBLE, bits, dtype=torch.int32, device=like.device)[:, None]
    return within + torch.tensor(places, dtype=torch.int32, device=like.device)


def _check(format: str, planes: Planes, columns: int) -> None:
    widths = layout_pairs.planes(format, columns)
    found = {name: plane.shape[-1] for name, plane in planes.items()}
    if found != widths:
        raise FormatError(f"{format} with {columns} columns has planes of {widths}, and these are {found}")
    kinds = {name: torch.int16 if name == "scale" else torch.int32 for name in widths}
    if wrong := [name for name, kind in kinds.items() if planes[name].dtype != kind]:
        raise FormatError(f"{wrong[0]} of {format} is {kinds[wrong[0]]}, not {planes[wrong[0]].dtype}")


def _told(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
