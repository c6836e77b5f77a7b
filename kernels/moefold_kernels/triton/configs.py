"""How the projections are cut into programs: by a table of measurements, else by a rule; never by trying while serving.

Measured plans are kept per device, in `tables/` beside this file and in the user's cache (`moefold tune` writes there,
and it goes first). For a shape that was not measured the nearest one that was is taken, by the entries per expert,
which decide the regime, and by the matrices' sizes, cut into about as many programs as there (fitting.py). A device
without a table in `tables/` gets that of the nearest one of its compute capability (an H100 that of the H200): the same
instructions and as much shared memory.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moefold_kernels import layout, layout_pairs
from moefold_kernels.errors import FormatError
from moefold_kernels.triton.fitting import fitted
from moefold_kernels.triton.plans import STEP, Plan, Tile, fits

SHIPPED = Path(__file__).parent / "tables"


class Shape(NamedTuple):
    """What a plan was measured for, or is wanted for."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    dense: bool
    tokens: int
    format: str = layout.EXPONENT
    """Of pairs."""

    @property
    def load(self) -> float:
        """Entries per expert, on average."""
        return self.tokens * self.top_k / self.experts

    def distance(self, other: Shape, by_entry: bool = False) -> tuple[float, ...]:
        """How far a measured shape is from this one: kind of weights first, then load, sizes and format in doublings.

        A plan for less load counts twice as far as one for more: tiles that are too small read their words again,
        those that are too large only waste some products. Sizes count for less than one doubling, whatever they are:
        tiles for 288 entries took 1.6 times as long, where there were 64, as another shape's tiles for 80 (a layer of
        Mixtral's sizes, bfloat16 weights, 256 tokens on an H200). Four bits of a position count as one doubling.

        For a plan `by_entry` less load than it was measured with is no matter: then fewer words are wanted twice. Nor
        is the number of experts. But other choices count as a doubling, as down's registers depend on them: one token
        of 256 experts of DeepSeek's sizes took 30.9 us by Qwen3's plan, whose load is nearer, and 26.6 by DeepSeek's.
        """
        load = math.log2(max(other.load, 1 / 64) / max(self.load, 1 / 64))
        hidden, inner, experts, top_k = (abs(math.log2(a / b)) for a, b in zip(self[:4], other[:4], strict=True))
        sizes = hidden + inner + top_k + (0 if by_entry else experts)
        far = max(0 if by_entry else load, -2 * load) + (by_entry and top_k > 0) + sizes / (sizes + 4)
        far += abs(_bits(self.format) - _bits(other.format)) / 4
        return float(self.dense != other.dense), far, abs(self.tokens - other.tokens)


def _bits(format: str) -> int:
    """Of a pair's position."""
    if format == layout.EXPONENT:
        return 16
    return layout_pairs.magnitude_bits(format) + layout_pairs.STATE_BITS


def choose(shape: Shape, device: torch.device, by_entry: bool = True) -> Plan:
    """The plan for a batch on a device: the nearest measured one, or the rule where nothing was measured.

    Plans by entry are for as many tokens as they were measured with, at most, and for layers that by_entry.py takes.
    """
    return _choose(shape, _identity(device), by_entry)


def rule(shape: Shape) -> Plan:
    """What holds on a device like none measured: small tiles that fit the shared memory of Ampere and Ada (99 KB)."""
    if shape.format != layout.EXPONENT:
        return _few_bit_rule(shape)
    if shape.load <= 12:
        mode = "pair" if shape.load > 0.5 else "slot"
        return Plan(Tile(mode, 16, 0, 32, 64, 4, 3), Tile(mode, 16, 0, 64, 64, 4, 3))
    if shape.load <= 48:
        return Plan(Tile("pair", 32, 0, 32, 64, 4, 3), Tile("pair", 32, 0, 64, 64, 4, 3))
    return Plan(Tile("slot", 128, 0, 64, 32, 8, 3, group=8), Tile("slot", 128, 0, 128, 32, 8, 3, group=8))


def _few_bit_rule(shape: Shape) -> Plan:
    """The same for the few-bit formats; on Hopper these are tiles of leveled.py."""
    mode = "overlapped_pair" if 0.5 < shape.load <= 48 else "overlapped"
    tokens = 16 if shape.load <= 12 else 32 if shape.load <= 26 else 64 if shape.load <= 48 else 128
    return Plan(Tile(mode, tokens, 0, 32, 64, 4, 4), Tile(mode, tokens, 0, 64, 64, 4, 4))


def table_name(device: str) -> str:
    """The file of a device's measurements, by what CUDA calls it: "NVIDIA H200" is in nvidia-h200.json."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def cache() -> Path:
    """Where `moefold tune` keeps what it measured: $XDG_CACHE_HOME/moefold/tune, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moefold" / "tune"


def read_table(path: Path) -> dict[Shape, Plan]:
    """The measured plans of one file; FormatError names the file when it is no such table."""
    return {shape: plan for shape, (plan, _) in _read(path).items()}


def write_table(path: Path, about: Mapping[str, Any], plans: Iterable[tuple[Shape, Plan, Mapping[str, Any]]]) -> None:
    """Write measured plans with what is known of each, whole or not at all; what `path` holds of other shapes stays.

    What is chosen from then on in this process takes them into account.
    """
    kept = _read(path) if path.exists() else {}
    kept |= {shape: (plan, dict(facts)) for shape, plan, facts in plans}
    items = [
        shape._asdict() | {"plan": asdict(plan)} | facts
        for shape, (plan, facts) in sorted(kept.items(), key=itemgetter(0))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    lines = ",\n".join("  " + json.dumps(item) for item in items)
    draft.write_text(f'{{"about": {json.dumps(dict(about))},\n "plans": [\n{lines}\n]}}\n')
    draft.replace(path)
    _choose.cache_clear()
    _measured.cache_clear()
    _shipped.cache_clear()


def origin(device: torch.device) -> str:
    """Where a device's plans come from, in words."""
    known = _identity(device)
    shipped, other = _shipped(known)
    sources = (("shipped", shipped), ("of your own", cache() / table_name(known.name)))
    counts = {
        label: sum(fits(plan, known.memory, shape.format) for shape, plan in read_table(path).items())
        for label, path in sources
        if path is not None and path.exists()
    }
    told = ", ".join(f"{count} {label}" for label, count in counts.items() if count)
    if not told:
        return "by a rule, none measured for this device: run `moefold tune`"
    if not other or not counts.get("shipped"):
        return f"measured: {told}"
    return (
        f"measured: {told}; those shipped on {other}, of the same compute capability: run `moefold tune` for this one"
    )


def overlapped(device: torch.device) -> str:
    """What becomes of the plans for this device that overlap decoding with products, in words; nothing if none do."""
    known = _identity(device)
    steps = [
        [STEP if shape.format != layout.EXPONENT else tile.step for tile in plan.tiles if tile.hoppers]
        for shape, plan in _measured(known).items()
        if fits(plan, known.memory, shape.format) and any(tile.hoppers for tile in plan.tiles)
    ]
    if not steps:
        return ""
    from moefold_kernels.triton.portability import plain_because

    count, why = len(steps), plain_because(device)
    if why:
        return f"{count} of them overlap decoding with products, and get the plain kernels instead: {why}"
    columns = max(map(max, steps))
    return f"{count} of them overlap decoding with products, where sizes are multiples of {columns}"


def _read(path: Path) -> dict[Shape, tuple[Plan, dict[str, Any]]]:
    try:
        return dict(_entry(item) for item in json.loads(path.read_text())["plans"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is no table of plans ({error!r}); delete it, or run `moefold tune` again") from error


def _entry(item: Mapping[str, Any]) -> tuple[Shape, tuple[Plan, dict[str, Any]]]:
    plan = dict(item["plan"])
    plan["first"], plan["second"] = Tile(**plan["first"]), Tile(**plan["second"])
    sizes: dict[str, Any] = {name: item[name] for name in Shape._fields if name in item or name != "format"}
    shape = Shape(**sizes)
    if any(not isinstance(size, int) or size < 1 for size in (*shape[:4], shape.tokens)):
        raise FormatError(f"sizes must be whole numbers, at least 1: {shape}")
    facts = {name: value for name, value in item.items() if name not in (*Shape._fields, "plan")}
    return shape, (Plan(**plan), facts)


class Identity(NamedTuple):
    """What decides which measurements a device gets."""

    name: str
    memory: int = 0
    """Shared memory of a block, in bytes."""
    capability: tuple[int, int] = (0, 0)
    processors: int = 0


@functools.cache
def _choose(shape: Shape, device: Identity, by_entry: bool) -> Plan:
    measured = _measured(device)
    few = shape.format != layout.EXPONENT
    able = [
        known
        for known, plan in measured.items()
        if (known.format != layout.EXPONENT) == few  # tiles are of another kind
        and fits(plan, device.memory, shape.format)
        and (not plan.by_entry or (by_entry and shape.tokens <= known.tokens))
    ]
    if not able:
        return rule(shape)
    nearest = min(able, key=lambda known: shape.distance(known, measured[known].by_entry))
    return fitted(measured[nearest], nearest, shape, device.processors)


@functools.cache
def _measured(device: Identity) -> dict[Shape, Plan]:
    plans: dict[Shape, Plan] = {}
    for path in (_shipped(device)[0], cache() / table_name(device.name)):
        if path is not None and path.exists():
            plans |= read_table(path)
    return plans


@functools.cache
def _shipped(device: Identity) -> tuple[Path | None, str]:
    """The shipped table for a device: its own, or that of the nearest of its capability, and what that is called."""
    own = SHIPPED / table_name(device.name)
    if own.exists():
        return own, ""
    alike: list[tuple[int, str, Path]] = []
    for path in sorted(SHIPPED.glob("*.json")) if device.capability != (0, 0) else ():
        about = _about(path)
        if tuple(about.get("capability", ())) == device.capability:
            alike.append((abs(about["processors"] - device.processors), about["device"], path))
    if not alike:
        return None, ""
    _, name, path = min(alike)
    return path, name


def _about(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()).get("about", {})
    return found


def _identity(device: torch.device) -> Identity:
    if device.type != "cuda":
        return Identity(device.type)
    found: Any = torch.cuda.get_device_properties(device)  # torch's types lack the memory
    memory, capability = found.shared_memory_per_block_optin, (found.major, found.minor)
    return Identity(found.name, memory, capability, found.multi_processor_count)
