"""Keys of kernels in Triton's cache: the same in every process, whichever kernels it started before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.experimental.gluon", reason="needs a Triton with Gluon")

KEYS = """
import sys
from moefold_kernels.triton import e4m3, leveled, overlapped, overlapped_pair, portability, project
kernels = [getattr(module, name) for module in (e4m3, leveled, overlapped, overlapped_pair, project)
           for name in ("project_in", "project_out")]
for number in map(int, sys.argv[1]):
    portability.settle(kernels[number])
print(*(kernel.cache_key for kernel in kernels))
"""


def keys(order: str) -> list[str]:
    """Those of all kernels, settled in an order; under TRITON_INTERPRET there are none."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = [sys.executable, "-c", KEYS, order]
    return subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_keys_do_not_depend_on_what_ran_before():
    found = keys("0123456789")
    assert len(set(found)) == 10
    assert keys("9876543210") == found
    assert keys("3816940275") == found
