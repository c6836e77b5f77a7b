"""What each operation means, in plain torch, on any device; kernels are tested against this file.

On meta tensors the shapes come out and values cannot be checked, so counts are empty there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moefold_kernels import layout
from moefold_kernels.errors import FormatError


def encode(magnitude: Tensor, negative: Tensor, keep: Tensor, top: int) -> tuple[Tensor, dict[str, int]]:
    """The words of a merged matrix, and what its positions hold.

    `magnitude` [...] is float and not negative, `negative` and `keep` [2, ...] are bool. It is rounded to bf16 once, to
    nearest even. A magnitude that a slot keeps is flushed when it is positive and below the window (both keep bits are
    cleared), and clipped when it rounds above the window, carries included. Rounding is monotone: when `top` is the
    exponent of the largest magnitude *after* rounding, nothing is clipped. Counts: weights = shared + own + other +
    zero as coded, and beside them flushed (a part of zero) and clipped.
    """
    _check_merged(magnitude, negative, keep)
    smallest, largest = layout.smallest(top), layout.largest(top)
    bits = magnitude.to(torch.bfloat16).view(torch.int16)  # the sign bit is clear
    wanted = keep[0] | keep[1]
    below = bits < smallest
    clipped = wanted & (bits > largest)
    flushed = wanted & below & (magnitude > 0)
    kept = keep & ~below
    words = torch.where(kept[0] | kept[1], bits.clamp(smallest, largest) - smallest, 0)
    for slot in range(layout.SLOTS):
        words = words | _flag(kept[slot], layout.KEEP_SHIFT[slot])
        words = words | _flag(kept[slot] & negative[slot], layout.SIGN_SHIFT[slot])
    return words, _count(kept, clipped, flushed)


def merge_pair(weights: Tensor, norms: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """PuzzleMoE's dual-mask merge (arXiv 2511.04805, section 3), element by element: magnitude, negative, keep.

    `weights` is `[2, rows, columns]`, `norms` `[2, columns]` the L2 norm of each input column over the tokens routed
    to each expert. Entries whose magnitudes differ by at most `threshold`, relative to their sum, are shared as their
    mean; of the others the more salient expert's is kept, saliency being |weight| times norm, and the first expert's
    where both are equal. What is not a number in either makes the magnitude none, so that `encode` refuses it. Expert s
    reads `(-1) ** negative[s] * keep[s] * magnitude`.
    """
    first, second = weights.abs().float()
    total = first + second
    similar = ~((first - second).abs() > threshold * total)  # NaN is shared, and neither expert's value hides it
    own = first * norms[0] >= second * norms[1]
    merged = torch.where(similar, total / 2, torch.where(own, first, second))
    return merged, weights < 0, torch.stack((similar | own, similar | ~own))


PACK_COUNTS = ("own", "other", "emptied_own", "emptied_other", "emptied", "flushed", "clipped", "broken")
"""What `pack_pairs` counts, in this order: positions that one slot alone keeps as merged; how many of these, and of
all, are below the window and coded as zero; how many of the latter were not zero before; clipped ones; magnitudes that
are not finite (the reference raises instead)."""


def pack_pairs(
    weights: Tensor, pairs: Sequence[Sequence[int]], norms: Tensor, threshold: float, top: int
) -> tuple[Tensor, Tensor]:
    """Merge and encode many pairs of one matrix: words [pair, rows, columns] and PACK_COUNTS [8] int64.

    `weights` is [expert, rows, columns], `norms` [expert, columns]; `pairs` are two experts each.
    """
    words = torch.empty(len(pairs), *weights.shape[1:], dtype=torch.int16, device=weights.device)
    counts = torch.zeros(len(PACK_COUNTS), dtype=torch.int64, device=weights.device)
    for out, members in zip(words, pairs, strict=True):
        index = _index(members, weights)
        magnitude, negative, keep = merge_pair(
            weights[index], norms[_index(members, norms)].to(weights.device), threshold
        )
        coded, held = encode(magnitude, negative, keep, top)
        out.copy_(coded)
        emptied, own, other = coded == 0, keep[0] & ~keep[1], keep[1] & ~keep[0]
        sums = [x.sum() for x in (own, other, own & emptied, other & emptied, emptied)]
        counts += torch.tensor([*sums, held["flushed"], held["clipped"], 0]).to(counts)
    return words, counts


def counts_as_merged(counts: Sequence[int], weights: int) -> dict[str, int]:
    """PACK_COUNTS of so many positions by what the merge decided; `clipped` and `flushed` beside them."""
    own, other, *_, flushed, clipped, _ = counts
    found = {"weights": weights, "shared": weights - own - other, "own": own, "other": other, "zero": 0}
    return found | {"clipped": clipped, "flushed": flushed}


def counts_as_coded(counts: Sequence[int], weights: int) -> dict[str, int]:
    """PACK_COUNTS of so many positions by what their words hold, as `encode` counts."""
    own, other, emptied_own, emptied_other, emptied, *_ = counts
    found = counts_as_merged(counts, weights) | {"own": own - emptied_own, "other": other - emptied_other}
    return found | {"zero": emptied, "shared": weights - emptied - found["own"] - found["other"]}


def masks(keep: Tensor) -> dict[str, int]:
    """Positions of `keep` [2, ...] by who keeps them."""
    first, second = keep
    shared = int((first & second).sum())
    own, other = int(first.sum()) - shared, int(second.sum()) - shared
    total = first.numel()
    return {"weights": total, "shared": shared, "own": own, "other": other, "zero": total - shared - own - other}


def decode(words: Tensor, top: int, slot: int) -> Tensor:
    """One slot's bf16 values: `(-1) ** sign * 2 ** (exponent - 127) * 1.fraction` where it is kept, +0 elsewhere."""
    if slot not in range(layout.SLOTS):
        raise FormatError(f"slot {slot!r}: a pair has slots 0 and 1")
    if words.dtype != torch.int16:
        raise FormatError(f"words of format {layout.EXPONENT} are int16, not {words.dtype}")
    sign = (words << slot) & -0x8000
    magnitude = (words & layout.MAGNITUDE_BITS) + layout.smallest(top)
    kept = (words >> layout.KEEP_SHIFT[slot]) & 1
    return ((sign | magnitude) * kept).view(torch.bfloat16)


def decode_pairs(words: Tensor, top: int) -> Tensor:
    """Both slots of `words` [pair, ...] as bf16 [pair, 2, ...]."""
    return torch.stack([decode(words, top, slot) for slot in range(layout.SLOTS)], dim=1)


@dataclass(frozen=True)
class PackedExperts:
    """One layer's experts in format `exponent`, in the canonical layout, with the experts that were left alone."""

    words: Mapping[str, Tensor]  # "gate_proj" (where gated), "up_proj", "down_proj" -> [pair, rows, columns] int16
    dense: Mapping[str, Tensor]  # the same names -> [len(alone), rows, columns]; empty where none is alone
    window: Mapping[str, int]
    """The window's top per matrix."""
    pairs: Sequence[Sequence[int]]
    alone: Sequence[int]

    def unpack(self, matrix: str, out: Tensor) -> None:
        """Write one matrix of every expert into `out` [expert, rows, columns], in its dtype (it may be a view)."""
        for slot in range(layout.SLOTS):
            members = _index([pair[slot] for pair in self.pairs], out)
            out[members] = self.decoded(matrix, slot).to(out.dtype)
        if self.alone:
            out[_index(self.alone, out)] = self.dense[matrix].to(out.dtype)

    def unpacked(self, matrix: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """One matrix of every expert: [expert, rows, columns]."""
        count = layout.SLOTS * len(self.pairs) + len(self.alone)
        out = self.words[matrix].new_empty(count, *self.shape(matrix), dtype=dtype)
        self.unpack(matrix, out)
        return out

    def decoded(self, matrix: str, slot: int) -> Tensor:
        """What one slot of every pair reads: bf16 [pair, rows, columns]."""
        return decode(self.words[matrix], self.window[matrix], slot)

    def shape(self, matrix: str) -> tuple[int, int]:
        """Rows and columns of a matrix."""
        rows, columns = self.words[matrix].shape[1:]
        return rows, columns


def experts(
    packed: PackedExperts,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    activate: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The routed experts' output [token, hidden] in float32: decode, then one matmul per expert.

    `hidden` [token, hidden], `top_k_index` and `top_k_weights` [token, top_k]; `activate(gate, up)` gives the hidden
    activations. Decoded weights, inputs and activations have the dtype of `hidden`; products are summed in float32,
    and activations are rounded to that dtype once, before the down projection.
    """
    gate, up, down = (packed.unpacked(name, hidden.dtype).float() for name in ("gate_proj", "up_proj", "down_proj"))
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in range(down.shape[0]):
        token, position = torch.where(top_k_index == expert)
        x = hidden[token].float()
        inner = activate(x @ gate[expert].T, x @ up[expert].T).to(hidden.dtype).float()
        scale = top_k_weights[token, position].float()[:, None]
        out.index_add_(0, token, inner @ down[expert].T * scale)
    return out


def _check_merged(magnitude: Tensor, negative: Tensor, keep: Tensor) -> None:
    expected = (layout.SLOTS, *magnitude.shape)
    if not magnitude.is_floating_point():
        raise FormatError(f"magnitudes are floating point, not {magnitude.dtype}")
    for name, flags in (("negative", negative), ("keep", keep)):
        if flags.dtype != torch.bool or tuple(flags.shape) != expected:
            raise FormatError(f"{name} is {tuple(flags.shape)} {flags.dtype}; write bool of shape {expected}")
    if magnitude.is_meta or not magnitude.numel():
        return
    least, most = torch.aminmax(magnitude)  # NaN propagates through both
    if not (least >= 0 and most < torch.inf):
        raise FormatError(f"magnitudes lie in {least.item()} .. {most.item()}: they must be finite and not negative")


def _flag(flags: Tensor, shift: int) -> Tensor:
    return flags.to(torch.int16) << shift


def _count(kept: Tensor, clipped: Tensor, flushed: Tensor) -> dict[str, int]:
    if kept.is_meta:
        return {}
    both, either = kept[0] & kept[1], kept[0] | kept[1]
    sums = torch.stack([x.sum() for x in (both, kept[0], kept[1], either, clipped, flushed)]).tolist()  # one transfer
    shared, first, second, held, high, lost = sums
    total = kept[0].numel()
    return {
        "weights": total,
        "shared": shared,
        "own": first - shared,
        "other": second - shared,
        "zero": total - held,
        "clipped": high,
        "flushed": lost,
    }


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=like.device)
