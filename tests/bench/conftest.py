"""The registry as tests: all of it with `--benchmark-only`, else the tiny shape: a plain `pytest` stays quick."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moefold_kernels.bench import CASES, CONTENDERS, TINY, Bench, Prepared, kernel, record

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    every = metafunc.config.getoption("benchmark_only", default=False)
    cases = [case for case in CASES if every or case.shape is TINY]
    metafunc.parametrize(
        ("case", "contender"),
        [
            pytest.param(case.name, name, id=f"{case.name}-{name}", marks=() if case.shape is TINY else pytest.mark.gpu)
            for case in cases
            for name in CONTENDERS
        ],
    )


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    threads = torch.get_num_threads()
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    yield Bench(DEVICE)
    torch.set_num_threads(threads)


@pytest.fixture
def prepared(case: str, contender: str, bench: Bench) -> Prepared:
    able, reason = CONTENDERS[contender].can(DEVICE)
    if not able:
        pytest.skip(f"{contender}: {reason}")
    if DEVICE.type == "cpu" and CONTENDERS[contender].can is kernel.can_run:
        pytest.skip(f"{contender}: Triton's interpreter is for right or wrong (test_layer.py), its time means nothing")
    return bench.prepare({case.name: case for case in CASES}[case], CONTENDERS[contender])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= record.machine(DEVICE)
