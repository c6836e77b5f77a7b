"""Two runs compared by ratios that each measured within itself: absolute times on shared machines prove nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moefold_kernels.bench.results import Run
from moefold_kernels.errors import BenchmarkError

MARGIN = 0.05
"""A ratio may fall by this part of itself before a comparison fails."""


@dataclass(frozen=True)
class Change:
    """One ratio in both runs: `contender` is so many times as fast as `against`."""

    case: str
    contender: str
    against: str
    before: float
    after: float

    @property
    def relative(self) -> float:
        """-0.1: the ratio fell by a tenth."""
        return self.after / self.before - 1


@dataclass(frozen=True)
class Comparison:
    """Ratios that both runs have, those that only one has, and in what else the runs differ."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    remarks: tuple[str, ...]

    def dropped(self, margin: float) -> list[Change]:
        """The changes that are worse than the margin allows."""
        return [change for change in self.changes if change.relative < -margin]


def compare(before: Run, after: Run) -> Comparison:
    """Every ratio of both; BenchmarkError when they have none in common."""
    a, b = before.ratios(), after.ratios()
    common = [key for key in a if key in b]
    if not common:
        raise BenchmarkError(
            f"{before.source} and {after.source} have no ratio in common; "
            f"run the same cases and contenders: {', '.join(dict.fromkeys(case for case, _, _ in a)) or 'none'}"
        )
    return Comparison(
        tuple(Change(*key, a[key], b[key]) for key in common),
        tuple(" / ".join(key) for key in a if key not in b),
        tuple(" / ".join(key) for key in b if key not in a),
        tuple(_remarks(before, after)),
    )


def _remarks(before: Run, after: Run) -> Iterator[str]:
    if before.device != after.device:
        yield f"different devices: {before.device}, then {after.device}"
    for name in dict.fromkeys((*before.versions, *after.versions)):
        a, b = (run.versions.get(name, "unknown") for run in (before, after))
        if a != b:
            yield f"different {name}: {a}, then {b}"
    for run in (before, after):
        if run.others:
            yield f"{run.source}: {run.others} benchmarks of other things are not compared"
