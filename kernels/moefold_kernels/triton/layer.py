"""Runs the kernels on one layer: route, gate and up with activation, down, combine; nothing waits for the host."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefold_kernels import layout, layout_pairs
from moefold_kernels.triton import by_entry_launch, e4m3_launch, joined, leveled_launch, plans, project, streamed_launch
from moefold_kernels.triton.configs import Shape, choose
from moefold_kernels.triton.e4m3_launch import Terms
from moefold_kernels.triton.plans import STREAMED, Plan, Tile, join
from moefold_kernels.triton.portability import Target, blocks, launch, power_of_two
from moefold_kernels.triton.routing import Rows, Tables, Tiles, route
from moefold_kernels.triton.weights import (
    Leveled,
    Planes,
    Projections,
    Weights,
    elements_between,
    planes_of,
    rescaling,
    stride_of,
)

ACTIVATIONS = {"silu": project.SILU.value, "clamped": project.CLAMPED.value}
"""Activations that the first projection computes itself; any other runs between the projections."""


class Activation(NamedTuple):
    """What lies between the projections: a name of ACTIVATIONS, or a function of the rows (gate before up)."""

    name: str = "silu"
    limit: float = 0.0
    alpha: float = 0.0
    function: Callable[[Tensor], Tensor] | None = None


SILU = Activation()

WIDEST = 64
"""Columns of a tile that overlapped.py takes: what is copied for a row is at most 128 bytes, as products read it."""
NARROW, SHALLOW = 32, 3
"""Columns and stages of a tile of an overlapped mode, at most, where project.py does pairs in few bits: up to 129 KB of
a block's memory then (compiled for Hopper; a tile of 64 x 256 took up to 459)."""
COPY_REGISTERS = 112
"""Of a thread that copies for overlapped_apart.py."""
KEPT = 24 * 2**20
"""Bytes of activations and of experts' outputs that are to stay in L2 while words go through it, at most: half of an
H200's. They are read again when far more words than L2 holds have been read. Reckoned as if each expert filled a tile:
by the batch, some would have kernels compiled anew."""
SUMMED = 256
"""Columns that a warp sums, 8 a thread: with fewer, warps share a column's sum through shared memory, and the layer
takes 8 us more (docs/kernel-log.md)."""
SHORTEST = 1024
"""Columns of a row that routing's kernels rewrite, at least: four or more for each of their threads."""
LEVELED = 2.0**-32
"""The shift of few-bit formats, the inverse of decode.RESTORE, which their sums are multiplied with as well."""


def plan_for(weights: Weights, tokens: int, top_k: int, by_entry: bool = True) -> Plan:
    """The plan that a batch of so many tokens gets on the weights' device."""
    sizes = weights.any.hidden, weights.any.inner, len(weights.places)
    shape = Shape(*sizes, top_k, weights.packed is None, max(tokens, 1), weights.format)
    return choose(shape, weights.places.device, by_entry)


def forward(
    weights: Weights,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    activation: Activation = SILU,
    dtype: torch.dtype | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """The routed experts' output [token, hidden], in `dtype` (default that of `hidden`).

    `hidden` [token, hidden] is computed with as bfloat16, whatever its dtype; `top_k_index` and `top_k_weights` are
    [token, top_k]. Sums are float32; activations (by entry times their gate weights), and each expert's output where
    `combine` adds no splits (not by entry), are rounded to bfloat16 once. Entries whose expert does not exist
    contribute nothing. `plan` is for measuring.
    """
    tokens, top_k = top_k_index.shape
    plan = plan or plan_for(weights, tokens, top_k)
    fused = weights.any.gated and activation.name in ACTIVATIONS
    plan = sorted_first(weights, plan, tokens, top_k, fused)
    top_k_index = top_k_index.contiguous()  # here, as `combine` reads it before the kernel in front of it has ended
    x = hidden.to(torch.bfloat16)
    x = x if x.stride(-1) == 1 else x.contiguous()
    if plan.by_entry:
        gates, kind = top_k_weights.contiguous(), ACTIVATIONS[activation.name]
        return by_entry_launch.forward(weights, x, top_k_index, gates, plan, activation, kind, dtype or hidden.dtype)
    plan = as_run(weights, plan, x, top_k_index.numel(), activation)
    tables = route_for(weights, top_k_index, plan, x if fused else None)
    if plan.joined:
        parts = both(weights, x, top_k_weights, tables, plan.first, activation)
        return combine(parts, top_k_index, len(weights.places), dtype or hidden.dtype)
    inner = gate_up(weights, x, top_k, tables, plan, activation)
    tables = tables._replace(rows=None)  # memory that nobody needs any more
    return down(weights, inner, top_k_index, top_k_weights, tables, plan, dtype or hidden.dtype)


def sorted_first(weights: Weights, plan: Plan, tokens: int, top_k: int, fused: bool) -> Plan:
    """The plan, or one that sorts entries if by_entry.py does not take the layer."""
    if not plan.by_entry or (fused and by_entry_launch.takes(weights, plan, tokens, top_k)):
        return plan
    return plan_for(weights, tokens, top_k, by_entry=False)


def as_run(weights: Weights, plan: Plan, x: Tensor, entries: int, activation: Activation = SILU) -> Plan:
    """A plan that sorts entries as `forward` runs it: in two launches, and by other kernels, where a layer asks so.

    It is settled before entries are sorted, as tiles are cut for the kernels that take them.
    """
    plan = plan if joins(weights, activation, plan.first) else plan.separate()
    if plan.first.mode == STREAMED and not streamed_launch.takes(weights.packed, x, entries):
        plan = join(plan.first.as_pair(min(plan.first.stages, SHALLOW)))
    return able(weights, plan, activation.name in ACTIVATIONS)


def joins(weights: Weights, activation: Activation, tile: Tile) -> bool:
    """Whether joined.py takes this: one kind of experts, a gate and its activation, whole tiles of columns, 16 bits."""
    alike = weights.packed is None or weights.alone is None
    fused = weights.any.gated and activation.name in ACTIVATIONS
    whole = all(size % tile.columns == 0 for size in (weights.any.inner, weights.any.hidden))
    return alike and fused and whole and not isinstance(weights.packed, Leveled)


def apart(weights: Weights, tokens: int, top_k: int) -> Plan:
    """A plan with a launch for each projection, bf16 rows between them in their order, and no activation fused."""
    plan = sorted_first(weights, plan_for(weights, tokens, top_k), tokens, top_k, False)
    return able(weights, plan.separate(), False)


def able(weights: Weights, plan: Plan, fused: bool) -> Plan:
    """The plan with bf16 operands unless e4m3.py takes it, and tiles that project.py can hold where that does pairs.

    In few bits, that is: there it makes integers of all of a tile's columns, 256 of which do not fit a block's memory.
    """
    if fused and e4m3_launch.takes(weights, plan):
        return plan
    plan = in_bf16(plan)
    if not isinstance(weights.packed, Leveled) or (fused and leveled_launch.takes(weights, plan)):
        return plan
    if Target.of(weights.places).overlap and (why := leveled_launch.slow_because(weights.packed, fused)):
        _say(f"{weights.packed.format} by plain kernels, not by the fast ones: {why}")

    def narrow(tile: Tile) -> Tile:
        columns, stages = min(tile.columns, NARROW), min(tile.stages, SHALLOW)
        return replace(tile, columns=columns, stages=stages) if tile.overlapped else tile

    return replace(plan, first=narrow(plan.first), second=narrow(plan.second))


@functools.cache
def _say(what: str) -> None:
    """Once."""
    logging.getLogger(__name__).warning(what)


def in_bf16(plan: Plan) -> Plan:
    """The plan with bf16 operands."""

    def plain(tile: Tile) -> Tile:
        return replace(tile, terms=0, registers=0, tokens=max(tile.tokens, 8)) if tile.terms else tile

    return replace(plan, first=plain(plan.first), second=plain(plan.second))


def route_for(weights: Weights, top_k_index: Tensor, plan: Plan, x: Tensor | None = None) -> Tables:
    """The routing tables of a batch [token, top_k] for a plan; those of a joined plan are for `both` alone.

    With tokens `x` [token, hidden], which a fused activation follows, they are rewritten on the way if the plan's first
    projection wants that.
    """
    chain = Target.of(weights.places).chain
    rows = None if x is None else _rows(weights, plan, x)
    return route(top_k_index, weights.places, weights.pairs, weights.singles, plan, chain, rows)


def _rows(weights: Weights, plan: Plan, x: Tensor) -> Rows | None:
    """What e4m3.py takes of tokens, to be filled; nothing where it is not in use, or a kernel of its own does that."""
    if x.shape[1] < SHORTEST or not e4m3_launch.takes(weights, plan):
        return None
    return Rows(x, *e4m3_launch.empty(x.shape[0], x.shape[1], x, 1))


def both(
    weights: Weights, x: Tensor, top_k_weights: Tensor, tables: Tables, tile: Tile, activation: Activation = SILU
) -> Tensor:
    """Both projections in one launch: what `combine` sums, [1, token * top_k, hidden]."""
    inner, hidden = weights.any.inner, weights.any.hidden
    between, parts = (x.new_empty(1, len(tables.order), size, dtype=torch.bfloat16) for size in (inner, hidden))
    target, biases = Target.of(x), weights.biases
    for kind, mode, first, table in _kinds(weights, tables.first, tile):
        assert isinstance(kind, Projections)
        assert kind.gate is not None
        bias, below = (None, None) if biases is None else (biases.gate, biases.down)
        programs = _programs(table, mode) * (blocks(inner, tile.rows) + blocks(hidden, 2 * tile.rows))
        operands = (
            x, kind.gate, between, kind.down, parts, tables.order, tables.offsets, table, tables.ready,
            weights.experts, top_k_weights.contiguous(), bias, below,
        )  # fmt: skip
        shared = {
            "hidden": hidden, "inner": inner, "top_k": top_k_weights.shape[1], "capacity": table.shape[1],
            "x_row": x.stride(0), "w_unit": kind.gate.stride(0), "w_row": kind.gate.stride(1),
            "w_up": elements_between(kind.gate, kind.up), "down_unit": kind.down.stride(0),
            "down_row": kind.down.stride(1), "gate_shift": rescaling(kind.tops[0]), "up_shift": rescaling(kind.tops[1]),
            "down_shift": rescaling(kind.tops[2]), "bias_expert": stride_of(bias, 0), "bias_row": stride_of(bias, 1),
            "bias_up": 0 if biases is None else elements_between(biases.gate, biases.up),
            "down_bias_expert": stride_of(below, 0), "down_bias_row": stride_of(below, 1), "limit": activation.limit,
            "alpha": activation.alpha, "ACTIVATION": ACTIVATIONS[activation.name],
            "KEEP": 2 * tile.entries * len(weights.places) * (inner + hidden) <= KEPT,
        }  # fmt: skip
        guess = target.chain and _guess(len(tables.order), len(weights.places), tile)
        if tile.mode == STREAMED:
            cut = {name: value for name, value in _cut(tile, target).items() if name != "GROUP"}
            streamed_launch.both(operands, tables.items, shared | cut, tile, len(kind.up), guess)
            continue
        launch(
            joined.project, (programs,), *operands, **shared, first=first, units=len(kind.up), MODE=mode,
            ASM=target.assembly, UPCAST=target.upcast, CHAIN=target.chain, LINES=_lines(tile, min(hidden, inner)),
            GUESS=guess, num_stages=tile.stages, **_cut(tile, target),
        )  # fmt: skip
    return parts


def _terms(rows: Rows | None) -> Terms | None:
    return None if rows is None else Terms(rows.values, rows.factors)


class Inner(NamedTuple):
    """Hidden activations of a batch, entries in their order."""

    rows: Tensor  # [entry, inner] bf16; none where all experts have, and were not rounded first,
    terms: Terms | None = None
    """those of pairs, for e4m3.py."""
    leveled: bool = False
    """whether leveled.py made those of pairs, and takes them."""

    @property
    def values(self) -> Tensor:
        """One of the tensors."""
        return self.rows if self.terms is None else self.terms.values


def gate_up(
    weights: Weights, x: Tensor, top_k: int, tables: Tables, plan: Plan, activation: Activation = SILU
) -> Inner:
    """The hidden activations of `x` [token, hidden]."""
    inner, hidden, gated = weights.any.inner, weights.any.hidden, weights.any.gated
    fused = ACTIVATIONS.get(activation.name) if gated else None
    target, tile, biases = Target.of(x), plan.first, weights.biases
    entries = 0 if tile.terms and weights.alone is None and not plan.rounded else len(tables.order)
    out = x.new_empty(entries, inner if fused or not gated else 2 * inner)
    bias = None if biases is None else (biases.gate if biases.gate is not None else biases.up)
    terms = None
    if tile.terms and not plan.rounded:
        terms = e4m3_launch.empty(len(tables.order), inner, x, inner // layout_pairs.GROUP)
    leveled = fused is not None and leveled_launch.takes(weights, plan)
    for kind, mode, first, table in _kinds(weights, tables.first, tile):
        shared = {
            "hidden": hidden, "inner": inner, "top_k": top_k, "capacity": table.shape[1], "x_row": x.stride(0),
            "bias_expert": stride_of(bias, 0), "bias_row": stride_of(bias, 1),
            "bias_up": 0 if biases is None else elements_between(biases.gate, biases.up),
            "limit": activation.limit, "alpha": activation.alpha,
        } | _cut(tile, target)  # fmt: skip
        lists = (out, tables.order, tables.offsets, table, weights.experts, bias)
        grid = (_programs(table, mode) * blocks(inner, tile.rows),)
        if tile.terms and isinstance(kind, Leveled):
            assert fused
            e4m3_launch.gate_up(
                grid, _terms(tables.rows) or e4m3_launch.prepared(x), kind, out if terms is None else terms,
                (tables.order, tables.offsets, table, weights.experts, bias),
                _narrow(shared, tile, "x_row") | e4m3_launch.cut(tile, kind, hidden) | {"ACTIVATION": fused},
            )  # fmt: skip
            continue
        if isinstance(kind, Leveled):
            if leveled:
                tokens = leveled_launch.copyable(x)
                in_turn = leveled_launch.in_turn(tile, inner, hidden, hidden)
                leveled_launch.gate_up(
                    (_programs(table, mode) * blocks(inner, tile.rows * in_turn),), tokens, kind, out,
                    (tables.order, tables.offsets, table, weights.experts, bias),
                    _narrow(shared | {"x_row": tokens.stride(0)}, tile)
                    | {"shift": LEVELED, "ACTIVATION": fused, "PLACES": tile.stages, "BLOCKS": in_turn},
                )  # fmt: skip
                continue
            planes, low, bands = _planes(kind, kind.wide, inner, hidden)
            base, shifts = kind.wide.words, dict.fromkeys(("gate_shift", "up_shift"), LEVELED)
            operands, apart = (x, *planes, *lists), 0
        else:
            base, low, bands = kind.gate if kind.gate is not None else kind.up, -1, False
            shifts = {"gate_shift": rescaling(kind.tops[0]), "up_shift": rescaling(kind.tops[1])}
            operands, apart = (x, base, None, None, None, *lists), elements_between(kind.gate, kind.up)
        shared |= {"w_unit": base.stride(0), "w_row": base.stride(1), "w_up": apart} | shifts
        if low < 0 and fused and mode != project.DENSE.value and _overlaps(tile, target, base, x, 2):
            file, more = _overlapped(tile, x)
            launch(file.project_in, grid, x, base, *lists, **shared, **more, PLACES=tile.stages, ACTIVATION=fused)
            continue
        launch(
            project.project_in, grid, *operands, **shared, first=first, units=len(base), MODE=mode, LOW=low,
            BANDS=bands, GATED=gated, ACTIVATION=fused or project.NONE.value, EVEN=hidden % tile.columns == 0,
            ASM=target.assembly, UPCAST=target.upcast, CHAIN=target.chain, LINES=_lines(tile, hidden),
            GUESS=target.chain and _guess(len(tables.order), len(weights.places), tile), num_stages=tile.stages,
        )  # fmt: skip
    if fused is None:
        assert activation.function is not None
        out = activation.function(out).to(x.dtype).contiguous()
    return Inner(out, e4m3_launch.between(out, plan) if plan.rounded else terms, leveled)


def down(
    weights: Weights,
    x: Inner,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    tables: Tables,
    plan: Plan,
    dtype: torch.dtype,
    chained: bool = True,
) -> Tensor:
    """The output [token, hidden] of the hidden activations `x`.

    Not `chained` to the kernel in front: for tables that it may have made, which down reads before it waits.
    """
    hidden, inner = weights.any.hidden, weights.any.inner
    rows = x.rows
    tile, target = plan.second, Target.of(rows)
    if not chained:
        target = target._replace(chain=False)
    part = plans.part(tile, inner, isinstance(weights.packed, Leveled))
    splits = blocks(inner, part)
    parts = rows.new_empty(splits, len(tables.order), hidden, dtype=torch.float32 if splits > 1 else torch.bfloat16)
    gates, top_k_index = top_k_weights.contiguous(), top_k_index.contiguous()
    bias = None if weights.biases is None else weights.biases.down
    for kind, mode, first, table in _kinds(weights, tables.second, tile):
        shared = {
            "inner": inner, "hidden": hidden, "capacity": table.shape[1],
            "bias_expert": stride_of(bias, 0), "bias_row": stride_of(bias, 1),
        } | _cut(tile, target)  # fmt: skip
        lists = (parts, tables.order, tables.offsets, table, weights.experts, gates, bias)
        programs = _programs(table, mode) * blocks(hidden, tile.rows)
        if x.terms and isinstance(kind, Leveled):
            e4m3_launch.down(
                (programs, splits), x.terms, kind, parts,
                (tables.order, tables.offsets, table, weights.experts, gates, bias),
                _narrow(shared, tile)
                | e4m3_launch.cut(tile, kind, inner)
                | {"part": part, "out_split": parts.stride(0), "WHOLE": plan.rounded},
            )  # fmt: skip
            continue
        if isinstance(kind, Leveled):
            if x.leveled:
                in_turn = leveled_launch.in_turn(tile, hidden, inner, part)
                programs = _programs(table, mode) * blocks(hidden, tile.rows * in_turn)
                leveled_launch.down(
                    (programs, splits), rows, kind, parts,
                    (tables.order, tables.offsets, table, weights.experts, gates, bias),
                    _narrow(shared, tile)
                    | {"part": part, "out_split": parts.stride(0), "shift": LEVELED, "PLACES": tile.stages}
                    | {"BLOCKS": in_turn},
                )  # fmt: skip
                continue
            planes, low, bands = _planes(kind, kind.narrow, hidden, inner)
            base, operands, shift = kind.narrow.words, (rows, *planes, *lists), LEVELED
        else:
            base, low, bands, shift = kind.down, -1, False, rescaling(kind.tops[2])
            operands = (rows, kind.down, None, None, None, *lists)
        shared |= {"w_unit": base.stride(0), "w_row": base.stride(1)}
        if low < 0 and splits == 1 and mode != project.DENSE.value and _overlaps(tile, target, base, rows, 1):
            file, more = _overlapped(tile, rows)
            if more:  # warps apart
                more["BLOCKS"] = leveled_launch.in_turn(tile, hidden, inner, part, tile.columns)
                programs = _programs(table, mode) * blocks(hidden, tile.rows * more["BLOCKS"])
            launch(file.project_out, (programs,), rows, base, *lists, **shared, **more, shift=shift, PLACES=tile.stages)
            continue
        launch(
            project.project_out, (programs, splits), *operands, **shared, first=first, part=part,
            out_split=parts.stride(0), shift=shift, MODE=mode, LOW=low, BANDS=bands,
            EVEN=inner % (part if splits > 1 else tile.columns) == 0, ASM=target.assembly,
            UPCAST=target.upcast, CHAIN=target.chain, LINES=_lines(tile, part),
            num_stages=tile.stages,
        )  # fmt: skip
    return combine(parts, top_k_index, len(weights.places), dtype)


def combine(parts: Tensor, top_k_index: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """The sum of `parts` [split, token * top_k, hidden] over splits and each token's choices: [token, hidden].

    The contiguous `top_k_index` must have been there before what made `parts` began.
    """
    (splits, _, hidden), (tokens, top_k) = parts.shape, top_k_index.shape
    out = parts.new_empty(tokens, hidden, dtype=dtype)
    if tokens:
        columns = min(1024, power_of_two(hidden))
        chain = Target.of(parts).chain
        launch(
            project.combine, (tokens, blocks(hidden, columns)),
            parts, top_k_index, out, hidden, top_k, experts, parts.stride(0), out.stride(0),
            SPLITS=splits, TOP_K=power_of_two(top_k), COLUMNS=columns, CHAIN=chain,
            num_warps=max(1, columns // SUMMED), **_chained(chain),
        )  # fmt: skip
    return out


def _kinds(weights: Weights, tiles: Tiles, tile: Tile) -> Iterator[tuple[Projections | Leveled, int, int, Tensor]]:
    """What to launch: (matrices, mode, the first place, tiles), for the pairs and for the experts left alone."""
    if weights.packed is not None and tiles.packed.numel():
        yield weights.packed, (project.PAIR if tile.paired else project.SLOT).value, 0, tiles.packed
    if weights.alone is not None and tiles.alone.numel():
        yield weights.alone, project.DENSE.value, 2 * weights.pairs, tiles.alone


def _cut(tile: Tile, target: Target) -> dict[str, int | bool]:
    """What all projections' kernels take of a tile."""
    return {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "TOKENS": tile.tokens, "EXTRA": tile.extra, "GROUP": tile.group,
        "num_warps": tile.warps,
    } | _chained(target.chain)  # fmt: skip


def _chained(chain: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if chain else {}  # other backends of Triton do not know the word


def _lines(tile: Tile, columns: int) -> int:
    """How many cache lines (64 words each) of a row to ask for ahead: a power of two, and no more than there are."""
    return max(1, min(tile.ahead, 1 << (columns // 64).bit_length() >> 1))


def _guess(entries: int, experts: int, tile: Tile) -> bool:
    """Whether it is likely that every unit has entries and needs one tile only."""
    return 4 * experts <= entries <= 0.75 * tile.entries * experts


def _overlaps(tile: Tile, target: Target, words: Tensor, x: Tensor, matrices: int) -> bool:
    """Whether overlapped.py takes this: 16-byte copies, an even number of whole tiles of columns, 16 rows a warp.

    `matrices` are side by side in a tile.
    """
    aligned = all(stride % 8 == 0 for stride in (*words.stride()[:2], x.stride(0)))
    aligned &= words.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    whole = words.shape[2] % (2 * tile.columns) == 0 and tile.columns <= WIDEST
    return tile.overlapped and target.overlap and aligned and whole and leveled_launch.shared_by_warps(tile, matrices)


def _planes(kind: Leveled, matrix: Planes, rows: int, columns: int) -> tuple[tuple[Tensor, ...], int, bool]:
    """Planes and levels as project.py takes them, the bits of the plane `low`, and whether they lie in bands."""
    return planes_of(kind, matrix), layout_pairs.low_bits(kind.format), layout_pairs.banded(rows, columns)


def _narrow(shared: dict[str, Any], tile: Tile, *but: str) -> dict[str, Any]:
    """What leveled.py and e4m3.py take of these."""
    taken = {name: value for name, value in shared.items() if name not in ("COLUMNS", *but)}
    return taken | {"PAIRED": tile.paired}


def _overlapped(tile: Tile, x: Tensor) -> tuple[Any, dict[str, int]]:
    """The file of the kernels of an overlapped mode, and what it takes beside what all take."""
    from moefold_kernels.triton import overlapped, overlapped_apart, overlapped_pair

    if tile.columns == WIDEST and leveled_launch.apart(tile.tokens, tile.warps, tile.paired, x):
        return overlapped_apart, {"REGISTERS": COPY_REGISTERS}
    return (overlapped_pair if tile.paired else overlapped), {}


def _programs(table: Tensor, mode: int) -> int:
    return table.shape[1] * (layout.SLOTS if mode == project.SLOT.value else 1)
