"""What leveled_apart.py and overlapped_apart.py share: warps of one program that copy, and warps that multiply.

In leveled.py and overlapped.py groups of four warps wait for each other at each step, so that they decode together, and
multiply together: neither runs beside the other. Here nothing but barriers in memory (`mbarrier`) joins warps. `come`:
what a stage holds has come, which each copying thread says when its own copies have ended. `free`: nobody reads a stage
any more, which each multiplying thread says for itself, by the instruction that waits for a thread's copies, of which
it has none (Triton's own is one thread for all, behind a barrier of all). So a group runs ahead of the other, until
there is nothing for it to read. (Triton keeps a barrier of all multiplying warps in each turn through the stages, since
two waits for the same barrier need one between them.)

Multiplying warps get the registers that copying warps do not need. Those hold rows as offsets of 32 bits from a base,
where pointers would take twice as many.
"""

# ruff: noqa: RUF005 - the compiler knows tuples' `+`, and no `*given`
# mypy: disable-error-code=assignment
# (tuples that grow)

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moefold_kernels.triton.overlapped import (
    copy_layout,
    entries_at,
    gates_of,
    product_layout,
    store_layout,
    write_outer,
)

COPYING = gl.constexpr(4)
"""Warps that copy."""
WRITTEN = gl.constexpr(128)
"""More entries are written by halves between blocks of rows: gate weights, or activations, take registers, too."""


@gluon.jit
def barriers(STAGES: gl.constexpr):
    """`come` and `free` of each stage: of as many threads as copy, and of as many as multiply.

    The last arrivals at `free` are waited for by nobody; a product and the warps' meeting lie between them and what
    Triton may put in the same memory.
    """
    come, free = (), ()
    for _ in gl.static_range(STAGES):
        one = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        other = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(one, count=32 * COPYING)
        mbarrier.init(other, count=32 * gl.num_warps())
        come = come + (one,)
        free = free + (other,)
    return come, free


@gluon.jit
def rows_in(order, begin, end, top_k, x_row, COLUMNS: gl.constexpr, N: gl.constexpr):
    """overlapped.tokens_at as offsets [N, COLUMNS]; behind the end it is the last entry's, whose sums are not written.

    (A row that all programs share would be read by all of them at once.)
    """
    layout: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    n = gl.minimum(begin + gl.arange(0, N, gl.SliceLayout(1, layout)), end - 1)
    row = gl.load(order + n) // top_k * x_row
    return gl.multiple_of(row, 8)[:, None] + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def rows_out(begin, end, inner, COLUMNS: gl.constexpr, N: gl.constexpr):
    """overlapped.positions_at likewise."""
    layout: gl.constexpr = copy_layout(COLUMNS, gl.num_warps())
    row = gl.minimum(begin + gl.arange(0, N, gl.SliceLayout(1, layout)), end - 1) * inner
    return gl.multiple_of(row, 8)[:, None] + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def entries_and_gates(order, weights, begin, end, TOKENS: gl.constexpr, EXTRA: gl.constexpr):
    """overlapped.gates_of a tile's first TOKENS entries, and of those behind."""
    entries = entries_at(order, begin, end, TOKENS)
    more = entries_at(order, begin + TOKENS, end, max(EXTRA, 16))
    return gates_of(entries, weights), gates_of(more, weights)


@gluon.jit
def keep(order, weights, begin, end, TOKENS: gl.constexpr, EXTRA: gl.constexpr):
    """The same in shared memory: to write blocks of rows in turn, through which registers do not reach."""
    entries, more = entries_and_gates(order, weights, begin, end, TOKENS, EXTRA)
    kept = _keep(entries, TOKENS)
    return kept, _keep(more, EXTRA) if EXTRA else kept


@gluon.jit
def _keep(entries, N: gl.constexpr):
    entry, gates = entries
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    kept = gl.allocate_shared_memory(gl.int32, [N], flat, entry)
    return kept, gl.allocate_shared_memory(gl.float32, [N], flat, gates)


@gluon.jit
def write_kept(
    sums, extra, kept, more, begin, end, given, ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr
):  # fmt: skip
    """overlapped.write_slot_outer of entries that were kept (`keep`), the extra ones first: they leave registers."""
    if EXTRA:
        _write(extra, more, begin + TOKENS, end, given, ROWS, EXTRA)
    _write(sums, kept, begin, end, given, ROWS, TOKENS)


@gluon.jit
def halves(sums, ROWS: gl.constexpr, N: gl.constexpr):
    """Sums [ROWS, N] as one part, or (WRITTEN) as the sums of the first and the second half of the entries."""
    parts = (sums,)
    if N > WRITTEN:
        mma: gl.constexpr = product_layout(N // 2, gl.num_warps())
        one, other = gl.split(gl.permute(gl.reshape(sums, (ROWS, 2, N // 2)), (0, 2, 1)))
        one = gl.convert_layout(one, mma, assert_trivial=True)
        parts = one, gl.convert_layout(other, mma, assert_trivial=True)
    return parts


@gluon.jit
def _write(sums, kept, begin, end, given, ROWS: gl.constexpr, N: gl.constexpr):
    out, first_row, hidden, shift, expert, bias, bias_expert, bias_row = given
    parts = halves(sums, ROWS, N)
    n: gl.constexpr = N // len(parts)
    mma: gl.constexpr = product_layout(n, gl.num_warps())
    for part in gl.static_range(N // n):
        entry = kept[0].slice(n * part, n).load(gl.SliceLayout(0, store_layout(ROWS, gl.num_warps())))
        gates = kept[1].slice(n * part, n).load(gl.SliceLayout(0, mma))
        write_outer(
            parts[part], out, (entry, gates), begin + n * part, end, first_row, hidden, shift, expert, bias,
            bias_expert, bias_row, ROWS, n,
        )  # fmt: skip
