"""The layer, timed: `pytest tests/bench --benchmark-only --benchmark-json FILE`; `-k 'qwen3 and packed'` for a part.

pytest-benchmark keeps the rounds; the timing core measures them (events around graph replays on a GPU), so its clock
is one that shows measured time.
"""

from __future__ import annotations

import pytest

from moefold_kernels.bench import ROUNDS, Prepared


class Clock:
    """Seconds that went into calls of the layer."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.seconds = 0.0

    def layer_seconds(self) -> float:
        return self.seconds

    def round(self) -> None:
        self.seconds += self.prepared.rounds()


@pytest.fixture
def clock(prepared: Prepared, request: pytest.FixtureRequest) -> Clock:
    clock = Clock(prepared)
    request.applymarker(pytest.mark.benchmark(group=prepared.group, timer=clock.layer_seconds))
    return clock


def test_layer(clock, benchmark):  # in this order: the clock's marker is read when `benchmark` is made
    benchmark.extra_info |= clock.prepared.info
    benchmark.pedantic(clock.round, rounds=ROUNDS)
    if benchmark.enabled:
        data = benchmark.stats.stats.data
        assert len(data) == ROUNDS
        assert min(data) > 0
        assert sum(data) == pytest.approx(clock.seconds)
