"""What a plan is: how each projection of a layer is cut into programs, and whether a device can hold that."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moefold_kernels import layout, layout_pairs
from moefold_kernels.errors import FormatError

STEP = layout_pairs.STEP
"""Columns of which few-bit formats need a number on Hopper."""
GROUP = layout_pairs.GROUP
"""Rows of gate and up in terms come in so many: columns of down, where few tokens have a factor for a group."""
PER_WARP = 16
WRITING = 4096
"""Bytes of shared memory that a program's last lines take beside its places, at most as seen; e4m3's twice that."""
MOST_WRITING = 8192
"""The same where they are float32, as sums of a part of the columns are; of more none go through it (overlapped.py)."""
BARRIERS = 512
"""Bytes that warps apart take for barriers and for what they hand over, at most (252 seen)."""
TOLD, HANDED = 2, 896
"""Items that a program of streamed.py knows of at once: a record of 32 bytes, and eight of an entry of both slots; and
bytes of its barriers, and of what its warps are handed (836 seen). It writes by way of its places."""
KEPT = 8
"""Bytes of an entry that they keep to write blocks of rows in turn."""
THINLY = 32
"""e4m3_stage.THINLY: tokens from which on those of steps of 256 columns have one place, without importing Gluon."""
ROUNDED = 8
"""Tokens of down's tile from which on a kernel makes terms of the rows between the projections (Plan.rounded)."""
LEAST_REGISTERS, MOST_REGISTERS = 64, 248
"""Of a thread."""
OVERLAP = 32
"""Entries of a slot from which on decoding and multiplying had better run at the same time."""
BY_ENTRY, STREAMED = "entry", "streamed"
MODES = ("pair", "slot", "overlapped_pair", "overlapped", STREAMED, BY_ENTRY)


@dataclass(frozen=True)
class Tile:
    """One projection's programs: blocks of `rows` x `columns` weights for some entries of each slot."""

    mode: str
    """For packed experts: "pair", "slot" (project.py), or "overlapped_pair", "overlapped" (files of these names, on
    Hopper; elsewhere "pair" and "slot"), and joined in one launch "streamed" (likewise; elsewhere "pair"). For all, and
    both projections: "entry" (by_entry.py)."""
    tokens: int
    """Entries of a program, for each slot: a power of two from 16 on (8 in the overlapped modes, 1 by entry), and"""
    extra: int
    """so many more (0, or another power of two from 16 on, in a stream from 8): 64 + 16 fit experts of about 64 tokens
    as no power of two does."""
    rows: int
    columns: int
    warps: int
    stages: int
    """Steps whose words and tokens are under way at once; in the overlapped modes at least two, each with its place."""
    group: int = 1
    """Tiles of entries that run side by side on one block of rows."""
    splits: int = 1
    """Programs that share the columns of a block (down projection only); their sums are added by `combine`. By entry, 2
    for choices of even and of odd number that are summed apart (by_entry.py)."""
    ahead: int = 4
    """Cache lines of each row of words that a program asks for while the kernel before it ends (project.py), a power of
    two. By entry those of down of 16 bits, behind what it has read already, and 0 for none (by_entry.py)."""
    terms: int = 0
    """Few-bit formats on Hopper: 2 for e4m3 operands, each token's value being a sum of two (e4m3.py), in steps of 128
    or 256 columns; tokens then may be 4."""
    registers: int = 0
    """With `terms`, and by entry: most registers of a thread, a multiple of 8, as 128 let two programs of eight warps
    run on a multiprocessor at once; 0 for as many as the compiler takes."""
    blocks: int = 1
    """On Hopper with bf16 operands, of few-bit formats, and of the 16-bit format's down with warps apart: blocks of
    rows that a program does in turn, where rows and columns are whole (leveled_launch.in_turn); by entry of down of 16
    bits, where rows are (by_entry_launch.py). Elsewhere one."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise FormatError(f"there is no mode {self.mode!r}; there are: {', '.join(MODES)}")
        if self.terms not in (0, 2) or (self.terms and (not self.overlapped or (self.extra and self.paired))):
            raise FormatError(
                f"terms is {self.terms!r}, and must be 0, or 2 in an overlapped mode (overlapped_pair: nothing extra)"
            )
        if self.mode == STREAMED and (self.columns not in (64, 128) or self.warps not in (4, 8) or self.group != 1):
            raise FormatError(f"mode {STREAMED}: write 64 or 128 for columns, 4 or 8 for warps, and 1 for group")
        if self.mode == BY_ENTRY and ((self.tokens, self.extra, self.group) != (1, 0, 1) or self.splits not in (1, 2)):
            raise FormatError(f"mode {BY_ENTRY}: write 1 for tokens and group, 1 or 2 for splits, and 0 for extra")
        least = 4 if self.terms else 8 if self.overlapped else 1 if self.mode == BY_ENTRY else 16
        sizes = {"tokens": least, "rows": 16, "columns": 16, "warps": 1, "ahead": 1}
        sizes |= {"rows": 1, "columns": 64, "ahead": 0} if self.mode == BY_ENTRY else {}
        sizes |= {"extra": 8 if self.mode == STREAMED else 16} if self.extra else {}
        for name, least in sizes.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least or value & (value - 1):
                wanted = f"a power of two, at least {least}" if least else "0 or a power of two"
                raise FormatError(f"{name} is {value!r}, and must be {wanted}")
        if self.mode == STREAMED and max(self.tokens, self.extra) > self.columns:  # results go by way of words' places
            raise FormatError(
                f"mode {STREAMED}: tokens and extra are {self.tokens!r} and {self.extra!r}, and must be no more than "
                f"columns, {self.columns!r}"
            )
        for name, least in {"stages": 2 if self.hoppers else 1, "group": 1, "splits": 1, "blocks": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise FormatError(f"{name} is {value!r}, and must be a whole number, at least {least}")
        allowed = range(LEAST_REGISTERS, MOST_REGISTERS + 1, 8)
        whole = isinstance(self.registers, int) and self.registers in allowed
        if self.registers != 0 and not ((self.terms or self.mode == BY_ENTRY) and whole):
            raise FormatError(
                f"registers is {self.registers!r}, and must be 0, or with e4m3 operands or by entry a multiple "
                f"of 8 from {allowed[0]} to {allowed[-1]}"
            )
        if self.blocks > 1 and (self.terms or not (self.overlapped or self.mode == BY_ENTRY)):
            raise FormatError(
                f"blocks is {self.blocks!r}, and must be 1 but in an overlapped mode with bf16 operands, or by entry"
            )

    def __str__(self) -> str:
        entries = f"{self.tokens}+{self.extra}" if self.extra else f"{self.tokens}"
        more = f" g{self.group}" * (self.group > 1) + f" k{self.splits}" * (self.splits > 1)
        more += f" a{self.ahead}" * (self.ahead != 4) + " e4m3" * (self.terms > 0)
        more += f" r{self.registers}" * (self.registers > 0) + f" b{self.blocks}" * (self.blocks > 1)
        return f"{self.mode} {entries} {self.rows}x{self.columns} w{self.warps} s{self.stages}{more}"

    @property
    def paired(self) -> bool:
        """Whether a program serves both slots of a pair."""
        return self.mode.endswith("pair") or self.mode == STREAMED

    @property
    def overlapped(self) -> bool:
        """Whether products run while the next words are decoded."""
        return self.mode.startswith("overlapped")

    @property
    def hoppers(self) -> bool:
        """Whether it is for Hopper's kernels, elsewhere replaced."""
        return self.overlapped or self.mode == STREAMED

    @property
    def step(self) -> int:
        """Of a 16-bit format's tile of those: the number of columns of which there must be a whole number."""
        return self.columns if self.mode == STREAMED else 2 * self.columns

    def unstreamed(self) -> Tile:
        """The tile itself, or for one of streamed.py what does the same of one projection, of as many programs' size.

        As those were that had been measured before (docs/kernel-log.md): of four warps, and 16 extra entries, if any.
        """
        if self.mode != STREAMED:
            return self
        mode, stages, ahead = ("overlapped_pair", 4, 4) if self.tokens >= OVERLAP else ("pair", 5, 1)
        rows, extra = 4 * self.rows // self.warps, 16 if self.extra else 0
        return replace(self, mode=mode, extra=extra, rows=rows, columns=64, warps=4, stages=stages, ahead=ahead)

    def as_pair(self, stages: int) -> Tile:
        """For one of streamed.py what joined.py can do with its sizes, in so many stages: 16 extra entries, or more."""
        return replace(self, mode="pair", extra=max(self.extra, 16) if self.extra else 0, stages=stages)

    @property
    def entries(self) -> int:
        """How many entries of each slot a program can take."""
        return self.tokens + self.extra


def part(tile: Tile, columns: int, few_bits: bool) -> int:
    """Columns of one of a tile's splits: whole steps, so that the last one may have fewer."""
    step = max(tile.columns, STEP) if few_bits else tile.columns
    return -(-columns // (tile.splits * step)) * step


@dataclass(frozen=True)
class Plan:
    """How one layer is run on one batch."""

    first: Tile
    """Gate and up: blocks of `rows` gate rows and as many up rows."""
    second: Tile
    """Down."""
    joined: bool = False
    """One launch does both (joined.py), where a layer allows it; the tiles then are alike, of `2 * first.rows` rows."""

    def __post_init__(self) -> None:
        first, second = self.first, self.second
        if bool(first.terms) != bool(second.terms):
            raise FormatError(f"{first} and {second}: e4m3 operands are for both or for neither")
        if first.terms and not (
            first.rows % GROUP == 0
            and all(tile.warps % 4 == 0 for tile in (first, second))
            and min(2 * first.rows // first.warps, second.rows // second.warps) >= PER_WARP
        ):
            raise FormatError(
                f"{first} and {second}: e4m3 operands need whole groups of {GROUP} rows of gate and up, and 16 a warp"
            )
        if (first.mode == BY_ENTRY) != (second.mode == BY_ENTRY):
            raise FormatError(f"{first} and {second}: by entry are both or neither")
        if self.by_entry and (first.splits, first.blocks) != (1, 1):
            raise FormatError(f"{first}: by entry splits and blocks are of down, write 1 for them")
        able = not self.first.overlapped and self.first.splits == 1 and not self.by_entry
        if self.joined and not (able and self.second == _below(self.first)):
            raise FormatError(f"{self.first} and {self.second} cannot be joined in one launch")
        if STREAMED in (first.mode, second.mode) and not (self.joined and 2 * first.rows >= PER_WARP * first.warps):
            raise FormatError(f"{first} and {second}: mode {STREAMED} is for joined plans, and 16 rows a warp")

    @property
    def rounded(self) -> bool:
        """With terms: whether rows between the projections are bfloat16 first, and a factor is for a split of them.

        Down's sums of a group then take one multiplication instead of two. For fewer tokens the kernel that makes the
        terms takes longer than that (docs/kernel-log.md), so the first projection does, with a factor for each group.
        """
        return bool(self.second.terms) and self.second.tokens >= ROUNDED

    @property
    def by_entry(self) -> bool:
        """Whether by_entry.py runs the layer: nothing is sorted."""
        return self.first.mode == BY_ENTRY

    def separate(self) -> Plan:
        """The plan with a launch for each projection."""
        first, second = (tile.unstreamed() for tile in self.tiles)
        return replace(self, first=first, second=second, joined=False)

    @property
    def tiles(self) -> tuple[Tile, Tile]:
        """Those of both projections."""
        return self.first, self.second

    def __str__(self) -> str:
        return f"joined {self.first}" if self.joined else f"{self.first} / {self.second}"


def join(first: Tile) -> Plan:
    """The plan that does both projections in one launch, cut as `first`; FormatError for a tile that cannot be."""
    return Plan(first, _below(first), joined=True)


def _below(first: Tile) -> Tile:
    return replace(first, rows=2 * first.rows)


def fits(plan: Plan, memory: int, format: str = layout.EXPONENT) -> bool:
    """Whether the tiles that are under way at once fit a block's shared memory, for pairs in a format."""
    return tile_fits(plan.first, True, memory, format) and tile_fits(plan.second, False, memory, format)


def tile_fits(tile: Tile, gated: bool, memory: int, format: str = layout.EXPONENT) -> bool:
    """The same of one tile, which has twice its rows where there is a gate.

    Plain Triton takes a little less than its stages; the overlapped kernels what they say, and some to write with.
    """
    if tile.overlapped and format != layout.EXPONENT:
        return leveled_bytes(tile, gated, format) <= memory
    rows, entries = tile.rows * (2 if gated else 1), tile.entries * (2 if tile.paired else 1)
    more = 16384
    if tile.overlapped:
        more = -WRITING - _apart(tile)
    if tile.mode == STREAMED:
        more = -HANDED - TOLD * (32 + 16 * tile.entries)
    return 2 * (rows + entries) * tile.columns * tile.stages <= memory + more


def leveled_bytes(tile: Tile, gated: bool, format: str) -> int:
    """What the few-bit formats' kernels on Hopper take of shared memory.

    leveled.py: planes and bf16 tokens of 128 columns a place (stage). e4m3.py, in steps of `columns`: planes, two terms
    of each token (of many at one place), factors of each group between few. Its last lines need no more for float32.
    """
    rows, entries = tile.rows * (2 if gated else 1), tile.entries * (2 if tile.paired else 1)
    bits = layout_pairs.magnitude_bits(format) + layout_pairs.STATE_BITS
    planes = rows * (16 * bits + 4)  # of 128 columns
    most = max(tile.tokens, tile.extra)
    writing = min(4 * tile.rows * most, MOST_WRITING) if tile.splits > 1 else WRITING  # of float32 sums
    if not tile.terms:
        return tile.stages * (planes + 256 * entries) + max(writing, WRITING) + _apart(tile)
    halves = 2 if tile.columns > 128 else 1
    places = 1 if halves == 2 and tile.tokens >= THINLY else tile.stages
    factors = 0 if gated or tile.tokens >= ROUNDED else 16
    whole = halves * (tile.stages * planes + places * (256 + factors) * entries)
    # where columns are no number of 256, steps have 128, and tokens as many places as words
    return max(whole, tile.stages * (planes + (256 + factors) * entries)) + 2 * WRITING


def _apart(tile: Tile) -> int:
    """What warps apart may take more."""
    return 0 if tile.paired else BARRIERS + (KEPT * tile.entries if tile.blocks > 1 else 0)


def alone(tile: Tile, second: bool) -> Plan:
    """A plan in which a tile of the first or the second projection stands, with any tile that goes with it."""
    if not tile.terms:
        shared = tile.overlapped and not second  # rows are of one matrix there
        return Plan(tile, replace(tile, rows=max(tile.rows, PER_WARP * tile.warps)) if shared else tile)
    if second:
        return Plan(replace(tile, rows=max(tile.rows, GROUP), splits=1), tile)
    return Plan(tile, replace(tile, rows=max(tile.rows, PER_WARP * tile.warps)))
