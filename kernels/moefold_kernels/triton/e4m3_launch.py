"""Launches of e4m3.py for a layer's pairs: which layers it takes, and what goes between its kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefold_kernels.triton.leveled_launch import aligned, planes_of
from moefold_kernels.triton.plans import GROUP, STEP, Plan, Tile, part
from moefold_kernels.triton.portability import Target, blocks, launch, power_of_two
from moefold_kernels.triton.weights import Leveled, Weights


class Terms(NamedTuple):
    """Rows as e4m3_tokens.py stores them."""

    values: Tensor  # [row, 2 * columns] float8_e4m3fn
    factors: Tensor  # [row] float32, or [row, splits of the columns, or groups of 64]


def takes(weights: Weights, plan: Plan) -> bool:
    """Whether e4m3.py does a layer's pairs: on Hopper, for levels that are e4m3 numbers, in whole steps of columns."""
    kind = weights.packed
    if not plan.first.terms or not isinstance(kind, Leveled) or not (kind.coded and kind.gated):
        return False
    return aligned(kind) and Target.of(weights.places).overlap and not (kind.hidden % STEP or kind.inner % STEP)


def cut(tile: Tile, kind: Leveled, columns: int) -> dict[str, Any]:
    """What the kernels take of a tile: steps of 256 columns (two halves) where `columns` are a number of those."""
    wide = tile.columns >= 2 * STEP and columns % (2 * STEP) == 0
    most = {"maxnreg": tile.registers} if tile.registers else {}
    return {"FORMAT": kind.format, "PLACES": tile.stages, "HALVES": 2 if wide else 1} | most


def prepared(x: Tensor, early: bool = True, within: int = 0) -> Terms:
    """The terms of `x` [row, columns] bfloat16, columns being a number of groups.

    One factor a row, or for each `within` columns. `early`: where `x` was complete before the kernel in front began,
    as routing is. Otherwise the kernel behind may begin while the one in front still runs, which must have waited for
    all that the one behind reads before its own wait: a first projection has, routing has not.
    """
    from moefold_kernels.triton import e4m3_tokens

    rows, columns = x.shape
    within = within or columns
    parts = blocks(columns, within)
    made = empty(rows, columns, x, parts)
    if rows:
        chain, size = Target.of(x).chain, power_of_two(within)
        launch(
            e4m3_tokens.prepare, (rows, parts), x, *made, columns, within, x.stride(0), COLUMNS=size, CHAIN=chain,
            EARLY=early, num_warps=max(1, min(8, size // 512)), **({"launch_pdl": True} if chain else {}),
        )  # fmt: skip
    return made


def empty(rows: int, columns: int, like: Tensor, factors: int) -> Terms:
    """Room for the terms of so many rows, with so many factors each (one: no dimension for them)."""
    values = like.new_empty(rows, 2 * columns, dtype=torch.float8_e4m3fn)
    return Terms(values, like.new_empty((rows,) if factors == 1 else (rows, factors), dtype=torch.float32))


def between(x: Tensor, plan: Plan) -> Terms | None:
    """The terms of activations [entry, inner] as a plan's projections have them between each other.

    Not early (`prepared`): never between routing and the projection that takes them.
    """
    if not plan.second.terms:
        return None
    if plan.rounded:
        return prepared(x, early=False, within=part(plan.second, x.shape[1], few_bits=True))
    values, factors = prepared(x, early=False)
    return Terms(values, factors[:, None].expand(-1, x.shape[1] // GROUP).contiguous())


def gate_up(
    grid: tuple[int, ...],
    tokens: Terms,
    kind: Leveled,
    out: Terms | Tensor,
    tables: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """`tables`: order, offsets, tiles, experts and bias; `options`: numbers and constants of the kernel.

    `out` [entry, inner] may be bfloat16, for `prepared`.
    """
    from moefold_kernels.triton import e4m3

    to = out if isinstance(out, Terms) else (out, tokens.factors)  # any pointer, where no factors are written
    launch(e4m3.project_in, grid, *tokens, *planes_of(kind, kind.wide), *to, *tables, w_up=kind.inner, **options)


def down(
    grid: tuple[int, ...], rows: Terms, kind: Leveled, out: Tensor, tables: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """The same, with the gate weights before the bias; `options` also say whether `rows` are WHOLE (Plan.rounded)."""
    from moefold_kernels.triton import e4m3

    launch(e4m3.project_out, grid, *rows, *planes_of(kind, kind.narrow), out, *tables, **options)
