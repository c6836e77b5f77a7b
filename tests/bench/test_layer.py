"""The layer, timed: `pytest tests/bench --benchmark-only --benchmark-json FILE`; `-k 'qwen3 and packed'` for a part.

pytest-benchmark keeps the rounds; the timing core measures them (events around graph replays on a GPU), so its clock
is one that shows measured time.
"""

from __future__ import annotations

import pytest

from moefold_kernels.bench import CASES, CONTENDERS, ROUNDS, TINY, Bench, Prepared, kernel


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


@pytest.fixture(scope="module")
def short(bench: Bench) -> Bench:
    """One that prepares a round of one batch: Triton's interpreter takes half a second for it."""
    return Bench(bench.device, batches=1)


@pytest.mark.parametrize("case", [case for case in CASES if case.shape is TINY], ids=lambda case: case.name)
@pytest.mark.parametrize("name", [name for name, one in CONTENDERS.items() if one.can is kernel.can_run])
def test_kernels_are_right_also_where_their_time_means_nothing(name, case, short):
    """In Triton's interpreter where there is no GPU; `prepare` compares with float64, and raises if they are off."""
    able, reason = CONTENDERS[name].can(short.device)
    if not able:
        pytest.skip(reason)
    assert short.prepare(case, CONTENDERS[name]).info["error"] > 0  # or it was compared with itself
