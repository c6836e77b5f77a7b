"""Strips of columns in one launch: `moefold_kernels.columns` says what it computes.

One program has a tile of rows of one pair and walks the strip's columns; what each column got wrong stays in registers,
a thread's rows by themselves, so that no thread waits for another. torch needs some 25 launches for every column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefold_kernels.columns import STRIP, Rounding
from moefold_kernels.errors import FormatError

ROWS, WARPS = 32, 1
"""One row a thread: 64 registers of errors each, and programs enough for a GPU from some 8,000 rows of pairs on."""


@triton.jit
def _round(magnitude, scale, levels, bounds, smallest, largest, LEVELS: tl.constexpr):
    """The nearest magnitude that the format has, as float32."""
    if LEVELS:
        place = tl.div_rn(magnitude, scale)
        level = tl.load(levels) + tl.zeros_like(magnitude)
        for i in tl.static_range(1, LEVELS):
            level = tl.where(place > tl.load(bounds + i - 1), tl.load(levels + i), level)
        return _as_bf16(level * tl.where(scale == float("inf"), 0.0, scale))
    rounded = tl.minimum(_as_bf16(magnitude), largest)
    return tl.where(rounded >= smallest, rounded, 0.0)


@triton.jit
def _as_bf16(magnitude):
    """To the nearest bf16 number, ties to even; in integers, which the interpreter does alike."""
    bits = magnitude.to(tl.int32, bitcast=True)
    return ((bits + ((bits >> 16) & 1) + 0x7FFF) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _code(
    target, whole, read, follow, cost, weight, scales, levels, bounds, smallest, largest, columns, rows, target_stride,
    whole_stride, scale_stride, LEVELS: tl.constexpr, STRIP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, STRIP)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if LEVELS:
        scale = tl.load(scales + pair * scale_stride + row, mask=inside, other=1.0)
        scale = tl.where(scale > 0, scale, float("inf"))
    target_0 = target + 2 * pair * target_stride + row
    whole_0 = whole + 2 * pair * whole_stride + row
    read_0 = read + 2 * pair * columns * rows + row
    follow_0 = follow + 2 * pair * columns * columns
    cost_0 = cost + 2 * pair * columns
    weight_0 = tl.load(weight + 2 * pair * rows + row, mask=inside, other=1.0)
    weight_1 = tl.load(weight + (2 * pair + 1) * rows + row, mask=inside, other=1.0)
    off_0 = tl.zeros([STRIP, ROWS], tl.float32)
    off_1 = tl.zeros([STRIP, ROWS], tl.float32)
    for k in range(columns):
        ahead = column < k
        pushed_0 = tl.load(follow_0 + k * columns + column, mask=ahead, other=0.0)
        pushed_1 = tl.load(follow_0 + columns * columns + k * columns + column, mask=ahead, other=0.0)
        w_0 = tl.load(target_0 + k * rows, mask=inside, other=0.0) + tl.sum(pushed_0[:, None] * off_0, 0)
        w_1 = tl.load(target_0 + target_stride + k * rows, mask=inside, other=0.0)
        w_1 += tl.sum(pushed_1[:, None] * off_1, 0)
        tl.store(target_0 + k * rows, w_0, mask=inside)
        tl.store(target_0 + target_stride + k * rows, w_1, mask=inside)
        c_0, c_1 = tl.load(cost_0 + k) * weight_0, tl.load(cost_0 + columns + k) * weight_1
        a_0, a_1 = tl.abs(w_0), tl.abs(w_1)
        both = a_0 * tl.div_rn(c_0, c_0 + c_1) + a_1 * tl.div_rn(c_1, c_0 + c_1)
        both = _round(both, scale, levels, bounds, smallest, largest, LEVELS)
        first = _round(a_0, scale, levels, bounds, smallest, largest, LEVELS)
        second = _round(a_1, scale, levels, bounds, smallest, largest, LEVELS)
        cost_both = (a_0 - both) * (a_0 - both) * c_0 + (a_1 - both) * (a_1 - both) * c_1
        cost_first = (a_0 - first) * (a_0 - first) * c_0 + a_1 * a_1 * c_1
        cost_second = a_0 * a_0 * c_0 + (a_1 - second) * (a_1 - second) * c_1
        alone = cost_second < tl.minimum(cost_both, cost_first)
        shared = cost_both <= tl.minimum(cost_first, cost_second)
        q_0 = tl.where(shared, both, tl.where(alone, 0.0, first))
        q_1 = tl.where(shared, both, tl.where(alone, second, 0.0))
        q_0 = tl.where(w_0 < 0, -q_0, q_0)
        q_1 = tl.where(w_1 < 0, -q_1, q_1)
        tl.store(read_0 + k * rows, q_0, mask=inside)
        tl.store(read_0 + (columns + k) * rows, q_1, mask=inside)
        now = (column == k)[:, None]
        off_0 = tl.where(now, (tl.load(whole_0 + k * rows, mask=inside, other=0.0) - q_0)[None, :], off_0)
        left_1 = tl.load(whole_0 + whole_stride + k * rows, mask=inside, other=0.0) - q_1
        off_1 = tl.where(now, left_1[None, :], off_1)


def code(target: Tensor, whole: Tensor, follow: Tensor, cost: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
    """`moefold_kernels.columns.code_strip`, on a GPU or interpreted."""
    pairs, _, columns, rows = target.shape
    read = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    _check(target, {"target": (target, target.shape), "whole": (whole, target.shape)}, dense=False)
    before = follow.mT.contiguous()  # [.., k, j]: what column k takes from those before it lies in a row
    operands: dict[str, tuple[Tensor, tuple[int, ...]]] = {"follow": (before, (pairs, 2, columns, columns))}
    operands |= {"cost": (cost, (pairs, 2, columns)), "weight": (weight, (pairs, 2, rows))}
    levels = bounds = scale = cost
    count, stride = 0, 0
    if rounding.levels is not None and rounding.bounds is not None and rounding.scale is not None:
        levels, bounds, scale = rounding.levels, rounding.bounds, rounding.scale.float()
        count, stride = len(levels), rows
        operands |= {"levels": (levels, (count,)), "bounds": (bounds, (count - 1,)), "scale": (scale, (pairs, rows))}
    _check(target, operands)
    if columns > STRIP:
        raise FormatError(f"{columns} columns came; write at most {STRIP}")
    if target.numel():
        launch = cast(Any, _code)  # its type has no launch options
        with torch.cuda.device_of(target):
            launch[(triton.cdiv(rows, ROWS), pairs)](
                target, whole, read, before, cost, weight, scale, levels, bounds, float(rounding.smallest),
                float(rounding.largest), columns, rows, target.stride(1), whole.stride(1), stride,
                LEVELS=count, STRIP=STRIP, ROWS=ROWS, num_warps=WARPS,
            )  # fmt: skip
    return read


def _check(target: Tensor, operands: Mapping[str, tuple[Tensor, tuple[int, ...]]], dense: bool = True) -> None:
    """Kernels see addresses only: a wrong device, dtype or layout would read and write elsewhere."""
    for name, (tensor, shape) in operands.items():
        if tensor.device != target.device or tensor.dtype != torch.float32 or tuple(tensor.shape) != tuple(shape):
            found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise FormatError(f"{name} is {found}; write {tuple(shape)} float32 on {target.device}")
        rows = tensor.shape[-1]
        apart = dense or (tensor.stride()[2:] == (rows, 1) and tensor.stride(0) == 2 * tensor.stride(1))
        if not (tensor.is_contiguous() if dense else apart):
            raise FormatError(f"{name} is not contiguous; write {name}.contiguous()")
