"""Two experts into one word, in one pass: merge, round, lay out, count; the definition is `reference.pack_pairs`.

Each weight is read once and each word written once, so on large GPUs the memory sets the time, if the arithmetic stays
below some 30 instructions a position (counted in the machine code for sm_90: 29 with 16-byte loads and stores). To get
there a program first takes every magnitude to lie in the window, and only notes the largest field as an unsigned
number: a value below the window, above it, infinite or NaN makes that one too large, and the program does its block
again with care. Real weights do not get there; with many exact zeros it takes twice as long and the result is the same.

Word and masks stand in the upper half of a 32-bit register, where float32 has the bits that bf16 keeps: nothing has to
be shifted. The lower half counts: it adds up over a thread's values while the upper half overflows into nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefold_kernels import layout
from moefold_kernels.errors import FormatError
from moefold_kernels.reference import PACK_COUNTS


@dataclass(frozen=True)
class Block:
    """What one program does: `steps` times `rows` x `columns` positions, one below the other."""

    rows: int
    columns: int
    steps: int
    warps: int
    stages: int
    """Loads in flight: 1 leaves hiding their latency to other programs, more go through shared memory."""
    registers: int | None = None
    """At most so many a thread, for more programs side by side; None: as many as the compiler takes."""

    def __post_init__(self) -> None:
        if VECTOR * self.steps > 0xFF or self.rows * self.columns * self.steps > 0xFFFF:
            raise ValueError(f"{self}: counts are kept in bytes, then in 16 bits; take fewer steps")

    def grid(self, rows: int, columns: int, matrices: int) -> tuple[int, int, int]:
        """Programs for so many matrices; neighbours read neighbouring columns."""
        return -(-columns // self.columns), -(-rows // (self.rows * self.steps)), matrices


VECTOR = 8
"""Positions that a thread counts together: 16 bytes of words."""

SOURCES = (torch.bfloat16, torch.float16, torch.float32)
"""Weights that can be packed: float32 holds them exactly."""

PACK_BLOCKS = (
    Block(rows=8, columns=128, steps=16, warps=4, stages=3),
    Block(rows=8, columns=128, steps=16, warps=4, stages=1, registers=64),
    Block(rows=8, columns=128, steps=16, warps=4, stages=1),
    Block(rows=4, columns=128, steps=31, warps=2, stages=1),
    Block(rows=16, columns=128, steps=8, warps=8, stages=1),
)
"""Worth trying, the default first: 1.03, 1.13, 1.22, 1.25, 1.28 ms for a Mixtral layer on an H200 (2026-11-22)."""

LARGEST_BLOCKS = (
    Block(rows=16, columns=128, steps=16, warps=4, stages=3),
    Block(rows=32, columns=128, steps=8, warps=4, stages=1),
)
"""The same for the pass over the largest weight: 0.64 and 0.65 ms (torch.aminmax takes 3.0)."""


def _upper(*bits: int) -> int:
    """These bits of a word, in the upper half of a signed 32-bit register."""
    value = sum(1 << bit for bit in bits) << 16
    return value - (1 << 32) if value >> 31 else value


_BOTH = tl.constexpr(_upper(*layout.SIGN_SHIFT, *layout.KEEP_SHIFT))
_FIRST = tl.constexpr(_upper(layout.SIGN_SHIFT[0], layout.KEEP_SHIFT[0]) + 0x1)
_SECOND = tl.constexpr(_upper(layout.SIGN_SHIFT[1], layout.KEEP_SHIFT[1]) + 0x100)
_SIGN = tl.constexpr(_upper(layout.SIGN_SHIFT[0]))
_SECOND_SIGN = tl.constexpr(31 - 16 - layout.SIGN_SHIFT[1])
_REST = tl.constexpr(~_upper(*layout.SIGN_SHIFT))
_MAGNITUDE = tl.constexpr(layout.MAGNITUDE_BITS << 16)
_LAST = tl.constexpr((layout.MAGNITUDE_BITS << 16) + 0xFFFF)
"""The largest field that is in the window."""


@triton.jit
def _float(raw):
    """bf16 comes as int16, which converts exactly in the interpreter, too."""
    if raw.dtype == tl.int16:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def _merge(x, y, norm_x, norm_y, threshold):
    """Magnitude and state: sign and keep masks in bits 31 .. 28, one in byte 0 (x alone) or byte 1 (y alone)."""
    a, b = tl.abs(x), tl.abs(y)
    total = a + b
    similar = ~(tl.abs(a - b) > threshold * total)  # so of NaN, as defined
    own = a * norm_x >= b * norm_y
    magnitude = tl.where(similar, total * 0.5, tl.where(own, a, b))
    return magnitude, tl.where(similar, _BOTH, tl.where(own, _FIRST, _SECOND))


@triton.jit
def _field(magnitude, low):
    """The magnitude as bf16 in bits 31 .. 16, less the window's smallest value; bits 15 .. 0 are noise."""
    bits = magnitude.to(tl.int32, bitcast=True)
    return bits + ((bits >> 16) & 1) + (0x7FFF - (low << 23))  # to nearest even


@triton.jit
def _word(x, y, state, field):
    """The word in bits 31 .. 16, the state's counts in bits 15 .. 0."""
    sign_x = (x + 0.0).to(tl.int32, bitcast=True)  # -0 is not negative, and becomes +0
    sign_y = (y + 0.0).to(tl.int32, bitcast=True) >> _SECOND_SIGN
    signs = (sign_x & _SIGN) | (sign_y & ~_SIGN) | _REST
    return (state & signs) | (field & _MAGNITUDE)


@triton.jit
def _by_vector(values, VECTOR: tl.constexpr):
    return tl.sum(tl.reshape(values, [values.shape[0], values.shape[1] // VECTOR, VECTOR]), 2)


@triton.jit
def _add_bytes(counts, values):
    """Add the sum of byte 0 to the first count, that of byte 1 to the second."""
    both = tl.sum((values & 0xFF) | ((values & 0xFF00) << 8))
    tl.atomic_add(counts, (both & 0xFFFF).to(tl.int64))
    tl.atomic_add(counts + 1, ((both >> 16) & 0xFFFF).to(tl.int64))


@triton.jit
def _pack(
    weights, pairs, norms, top, words, counts, threshold, rows, columns, expert_stride, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, VECTOR: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(2).to(tl.int64)
    first, second = tl.load(pairs + 2 * pair).to(tl.int64), tl.load(pairs + 2 * pair + 1).to(tl.int64)
    low = tl.maximum(tl.load(top).to(tl.int32) - (WINDOW - 1), 1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * (ROWS * STEPS) + tl.arange(0, ROWS)
    inside = column < columns
    norm_x = tl.load(norms + first * columns + column, mask=inside, other=0.0)[None, :]
    norm_y = tl.load(norms + second * columns + column, mask=inside, other=0.0)[None, :]
    start = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    target = words + pair * rows * columns + row.to(tl.int64)[:, None] * columns + column[None, :]
    begin_x, begin_y = weights + first * expert_stride, weights + second * expert_stride

    alone = tl.zeros([ROWS, COLUMNS // VECTOR], tl.int32)
    widest = tl.zeros([ROWS, COLUMNS], tl.uint32)
    offset, out = start, target
    for step in tl.range(0, STEPS, num_stages=STAGES):
        mask = (row < rows - step * ROWS)[:, None] & inside[None, :]
        x = _float(tl.load(begin_x + offset, mask=mask, other=0))
        y = _float(tl.load(begin_y + offset, mask=mask, other=0))
        magnitude, state = _merge(x, y, norm_x, norm_y, threshold)
        field = _field(magnitude, low)
        tl.store(out, (_word(x, y, state, field) >> 16).to(tl.int16), mask=mask)
        widest = tl.maximum(widest, field.to(tl.uint32, bitcast=True))
        alone += _by_vector(state, VECTOR)
        offset += ROWS * row_stride
        out += ROWS * columns
    _add_bytes(counts, alone)  # outside of the matrix both weights are 0, which is shared

    if tl.max(widest) > _LAST:
        emptied = tl.zeros([ROWS, COLUMNS // VECTOR], tl.int32)
        rare = emptied
        offset, out = start, target
        for step in range(STEPS):
            mask = (row < rows - step * ROWS)[:, None] & inside[None, :]
            x = _float(tl.load(begin_x + offset, mask=mask, other=0))
            y = _float(tl.load(begin_y + offset, mask=mask, other=0))
            magnitude, state = _merge(x, y, norm_x, norm_y, threshold)
            field = _field(magnitude, low)
            below = field < 0
            word = tl.where(below, 0, _word(x, y, state, tl.minimum(field, _LAST)))
            tl.store(out, (word >> 16).to(tl.int16), mask=mask)
            emptied += _by_vector(tl.where(below, state, 0), VECTOR)
            kind = tl.where(below, tl.where(magnitude > 0, 0x101, 0x1), tl.where(field > _LAST, 0x10000, 0))
            kind += tl.where(magnitude < float("inf"), 0, 0x1000000)
            rare += _by_vector(tl.where(mask, kind, 0), VECTOR)
            offset += ROWS * row_stride
            out += ROWS * columns
        _add_bytes(counts + 2, emptied)
        _add_bytes(counts + 4, rare)
        _add_bytes(counts + 6, rare >> 16)


@triton.jit
def _largest(
    weights, experts, top, rows, columns, expert_stride, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    expert = tl.load(experts + tl.program_id(2)).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * (ROWS * STEPS) + tl.arange(0, ROWS)
    offset = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    begin = weights + expert * expert_stride
    largest = tl.zeros([ROWS, COLUMNS], tl.int32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        mask = (row < rows - step * ROWS)[:, None] & (column < columns)[None, :]
        weight = _float(tl.load(begin + offset, mask=mask, other=0))
        largest = tl.maximum(largest, weight.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # NaN is above infinity
        offset += ROWS * row_stride
    bits = tl.minimum(tl.max(largest), 0x7F800000)
    tl.atomic_max(top, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 23).to(tl.int64))


def pack_pairs(
    weights: Tensor,
    pairs: Tensor,
    norms: Tensor,
    threshold: float,
    top: Tensor,
    words: Tensor | None = None,
    counts: Tensor | None = None,
    block: Block | None = None,
) -> tuple[Tensor, Tensor]:
    """The words [pair, rows, columns] int16 and counts (PACK_COUNTS, int64) of many pairs; nothing waits for the host.

    `weights` [expert, rows, columns] may be a view; `pairs` [pair, 2] int32 or int64 are rows of it; `norms` [expert,
    columns] float32; `top` [1] int64, on the device too, is the window's. Into `words` it is written, to `counts` it is
    added, where they are given. A `broken` count above 0 says that magnitudes were not finite, and words mean nothing.
    """
    _, rows, columns = weights.shape
    words = weights.new_empty(len(pairs), rows, columns, dtype=torch.int16) if words is None else words
    counts = weights.new_zeros(len(PACK_COUNTS), dtype=torch.int64) if counts is None else counts
    expected = {
        "pairs": (pairs, (torch.int32, torch.int64), (len(pairs), layout.SLOTS)),
        "norms": (norms, (torch.float32,), (len(weights), columns)),
        "words": (words, (torch.int16,), (len(pairs), rows, columns)),
        "counts": (counts, (torch.int64,), (len(PACK_COUNTS),)),
    }
    _check(weights, {"top": (top, (torch.int64,), (1,)), **expected})
    block, launch = block or PACK_BLOCKS[0], cast(Any, _pack)  # its type has no launch options
    if words.numel():
        with torch.cuda.device_of(weights):
            launch[block.grid(rows, columns, len(pairs))](
                _as_bits(weights), pairs, norms, top, words, counts, float(threshold), rows, columns, *weights.stride(),
                ROWS=block.rows, COLUMNS=block.columns, STEPS=block.steps, STAGES=block.stages, VECTOR=VECTOR,
                WINDOW=layout.WINDOW, num_warps=block.warps, num_stages=block.stages, maxnreg=block.registers,
                enable_fp_fusion=False,  # a fused multiply-add would decide near ties otherwise than the definition
            )  # fmt: skip
    return words, counts


def largest_exponent(weights: Tensor, experts: Tensor, top: Tensor | None = None, block: Block | None = None) -> Tensor:
    """The biased exponent of the largest |weight| of these experts as bf16, at least 1, on the device: [1] int64.

    255 says that a weight is infinite, NaN, or too large for bf16. `weights` [expert, rows, columns] may be a view and
    `experts` is an index into it. Where `top` is given, it is raised to that exponent.
    """
    _, rows, columns = weights.shape
    top = weights.new_ones(1, dtype=torch.int64) if top is None else top
    index = (experts, (torch.int32, torch.int64), (len(experts),))
    _check(weights, {"top": (top, (torch.int64,), (1,)), "experts": index})
    block, launch = block or LARGEST_BLOCKS[0], cast(Any, _largest)
    if rows * columns * len(experts):
        with torch.cuda.device_of(weights):
            launch[block.grid(rows, columns, len(experts))](
                _as_bits(weights), experts, top, rows, columns, *weights.stride(),
                ROWS=block.rows, COLUMNS=block.columns, STEPS=block.steps, STAGES=block.stages,
                num_warps=block.warps, num_stages=block.stages,
            )  # fmt: skip
    return top


def _as_bits(weights: Tensor) -> Tensor:
    return weights.view(torch.int16) if weights.dtype == torch.bfloat16 else weights


def _check(weights: Tensor, others: Mapping[str, tuple[Tensor, tuple[torch.dtype, ...], tuple[int, ...]]]) -> None:
    """Kernels see addresses only: a wrong device, dtype or layout would read and write elsewhere."""
    if weights.dtype not in SOURCES:
        raise FormatError(f"weights are {weights.dtype}; the kernel packs {', '.join(map(str, SOURCES))}")
    for name, (tensor, dtypes, shape) in others.items():
        if tensor.device != weights.device or tensor.dtype not in dtypes or tensor.shape != shape:
            found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise FormatError(f"{name} is {found}; write {shape} {dtypes[0]} on {weights.device}")
        if not tensor.is_contiguous():
            raise FormatError(f"{name} is not contiguous; write {name}.contiguous()")
