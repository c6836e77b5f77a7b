"""The warps of a stream (streamed.py) that look ahead and that count: which item is next, and what is written.

Items are taken in their order, by whoever asks first, those of down when none of gate and up are left, or by some
programs earlier (streamed_launch.early). An item of down waits until all blocks of gate and up of its tile are written
(`ready` counts them, as in joined.py): those were taken before it, by programs that run, so somebody always gets on.

Others are told in a ring of RING: copying warps, and the one that counts when an item is written, say when they have
heard, and copying ones ask for the next item.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moefold_kernels.triton import streamed_launch
from moefold_kernels.triton.overlapped import after_the_one_before, barrier
from moefold_kernels.triton.sorting import FIELDS, READY

RING = gl.constexpr(2)
"""Items that are told of at once: one is multiplied, one copied."""
MARGIN = gl.constexpr(streamed_launch.MARGIN)
LOOKING = gl.constexpr(40)
"""Registers of a thread that looks ahead."""


@gluon.jit
def ring_of(TOKENS: gl.constexpr, EXTRA: gl.constexpr):
    """What is told of the next items: a record, the numbers and gate weights of entries, and four barriers of each.

    A record is: the projection (0, 1, or -1 behind the last item), the block of rows, the unit, where the slots'
    entries begin and end, and the tile.
    """
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    records = gl.allocate_shared_memory(gl.int32, [RING, FIELDS], flat)
    rest: gl.constexpr = EXTRA or 16
    of0, of1, more0, more1 = _entries(TOKENS), _entries(TOKENS), _entries(rest), _entries(rest)
    numbers, gates = (of0[0], of1[0], more0[0], more1[0]), (of0[1], of1[1], more0[1], more1[1])
    told, weighed, heard = barriers(RING, 1), barriers(RING, 1), barriers(RING, 2)
    return records, numbers, gates, told, heard, weighed, barriers(1, 1).index(0), barriers(RING, 1)


@gluon.jit
def _entries(N: gl.constexpr):
    """Room for N entries' numbers and gate weights of each item of the ring."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.int32, [RING, N], flat)
    return numbers, gl.allocate_shared_memory(gl.float32, [RING, N], flat)


@gluon.jit
def barriers(N: gl.constexpr, THREADS: gl.constexpr):
    """N barriers, which so many threads arrive at."""
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(N):
        mbarrier.init(barriers.index(number), count=THREADS)
    return barriers


@gluon.jit
def after(place, phase, N: gl.constexpr):
    """The next of N places, and its phase."""
    last = place == N - 1
    return gl.where(last, 0, place + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _until(ready, arrived, wanted):
    """Wait until `ready` says so many blocks; `arrived` it has said. What others wrote before can be read then."""
    while arrived < wanted:
        arrived = gl.load(ready, volatile=True)
    gl.inline_asm_elementwise("fence.acq_rel.gpu; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _tell(numbers, slot, order, begin, end, top_k, second, N: gl.constexpr):
    """Of N entries from `begin` on: their tokens, or for down (second) their numbers, which are returned."""
    n = begin + gl.arange(0, N, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    entry = gl.load(order + n, mask=n < end, other=0)
    numbers.index(slot).store(entry if second else entry // top_k)
    return entry


@gluon.jit
def _counted(counter):
    """What a counter says, to all threads of the warp the same."""
    threads = gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return gl.min(gl.load(counter + 0 * threads, volatile=True), 0)


@gluon.jit
def _take(ready, left, early, firsts, few, n_in, n_out):
    """The next item, whether it is one of gate and up, and whether others of those may be left.

    `early`: one of down, if MARGIN rounds of items were begun since all those of its tile, even if `few` programs take
    one at once.
    """
    first = left
    if left & early:
        begun, tile = _counted(ready + 1), (_counted(ready + 2) + few) // n_out
        first = (begun < firsts) & ((tile + 1) * n_in + MARGIN * gl.num_programs(0) > begun)
    item = firsts
    if first:
        item = gl.atomic_add(ready + 1, 1, sem="relaxed")
        first = item < firsts
        left = first
    if first == 0:
        item = firsts + gl.atomic_add(ready + 2, 1, sem="relaxed")
    return item, first, left


@gluon.jit
def look_ahead(
    ring, order, items, ready, weights, hidden, inner, top_k, few, most,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, EXTRA: gl.constexpr,
):  # fmt: skip
    """The warp that looks ahead: it takes items in their order, and tells the others of them.

    The first `few` programs go on to down when they had `most` items. Gate weights, which take another load, come
    behind what else is told, as they are needed last.
    """
    after_the_one_before()
    records, numbers, gates, told, heard, weighed, asked, _written = ring
    n_tiles = gl.load(ready)
    n_in, n_out = gl.cdiv(inner, ROWS), gl.cdiv(hidden, 2 * ROWS)
    firsts = n_tiles * n_in
    n_items = firsts + n_tiles * n_out
    most = gl.where(gl.program_id(0) < few, most, 1 << 30)
    item, first, left = _take(ready, gl.program_id(0) >= 0, gl.program_id(0) < 0, firsts, few, n_in, n_out)
    taken = 1
    field = gl.arange(0, FIELDS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    slot, phase, again = 0, 0, 0
    while item < n_items:
        second = first == 0
        number = gl.where(second, item - firsts, item)
        n_blocks = gl.where(second, n_out, n_in)
        tile = number // n_blocks
        source = items + FIELDS * tile
        record = gl.load(source + field)
        begin0, middle = gl.load(source + 3), gl.load(source + 4)
        begin1, end1 = gl.load(source + 5), gl.load(source + 6)
        record = gl.where(field == 0, second.to(gl.int32), record)
        record = gl.where(field == 1, number % n_blocks, record)
        arrived = gl.load(ready + READY + tile, volatile=True)
        mbarrier.wait(heard.index(slot), phase ^ 1)
        records.index(slot).store(record)
        entry0 = _tell(numbers[0], slot, order, begin0, middle, top_k, second, TOKENS)
        entry1 = _tell(numbers[1], slot, order, begin1, end1, top_k, second, TOKENS)
        more0, more1 = entry0, entry1
        if EXTRA:
            more0 = _tell(numbers[2], slot, order, begin0 + TOKENS, middle, top_k, second, EXTRA)
            more1 = _tell(numbers[3], slot, order, begin1 + TOKENS, end1, top_k, second, EXTRA)
        if second:
            _until(ready + READY + tile, arrived, n_in)
        barrier()
        mbarrier.arrive(told.index(slot), count=1)
        if second:
            gates[0].index(slot).store(gl.load(weights + entry0).to(gl.float32))
            gates[1].index(slot).store(gl.load(weights + entry1).to(gl.float32))
            if EXTRA:
                gates[2].index(slot).store(gl.load(weights + more0).to(gl.float32))
                gates[3].index(slot).store(gl.load(weights + more1).to(gl.float32))
            barrier()
        mbarrier.arrive(weighed.index(slot), count=1)
        slot, phase = after(slot, phase, RING)
        mbarrier.wait(asked, again)
        again ^= 1
        item, first, left = _take(ready, left, taken >= most, firsts, few, n_in, n_out)
        taken += 1
    mbarrier.wait(heard.index(slot), phase ^ 1)
    records.index(slot).store(gl.where(field == 0, -1, 0))
    barrier()
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def release(ring, ready):
    """A warp that counts blocks of gate and up once they are written, and says that an item was heard.

    What counts waits until others can see all that was written, and the warps that multiply go on to the next item
    meanwhile (3 us of a layer of DeepSeek, docs/kernel-log.md).
    """
    records, _numbers, _gates, told, heard, _weighed, _asked, written = ring
    slot, turn = 0, 0
    mbarrier.wait(told.index(slot), turn)
    kind = field_of(records, slot, 0)
    while kind >= 0:
        tile = field_of(records, slot, 7)
        mbarrier.wait(written.index(slot), turn)
        if kind == 0:  # what one thread releases is all that was written before the others arrived
            gl.atomic_add(ready + READY + tile, 1, sem="release")
        mbarrier.arrive(heard.index(slot), count=1)
        slot, turn = after(slot, turn, RING)
        mbarrier.wait(told.index(slot), turn)
        kind = field_of(records, slot, 0)


@gluon.jit
def field_of(records, slot, FIELD: gl.constexpr):
    """One number of a record."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(records.index(slot).slice(FIELD, 1).load(layout), 0)
