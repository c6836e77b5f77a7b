"""What the device can do: which of a kernel's paths it gets."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import cuda


class Target(NamedTuple):
    """The paths a tensor's device gets."""

    assembly: bool
    """PTX of compute capability 8.0 (few bits: packed bf16 multiplication); else plain Triton operations."""
    upcast: bool
    """Multiply in float32: Triton's interpreter takes bf16 operands for bit patterns."""
    overlap: bool
    """Hopper's asynchronous products, and a Triton that has Gluon (overlapped.py)."""
    chain: bool
    """Programmatic dependent launch (capability 9.0 on): a kernel's programs may start while the one before ends."""

    @classmethod
    def of(cls, tensor: Tensor) -> Target:
        """The paths for work on this tensor."""
        if knobs.runtime.interpret:
            return cls(assembly=False, upcast=True, overlap=False, chain=False)
        if not tensor.is_cuda or torch.version.hip is not None:
            return cls(assembly=False, upcast=False, overlap=False, chain=False)
        major = torch.cuda.get_device_capability(tensor.device)[0]
        return cls(assembly=major >= 8, upcast=False, overlap=major == 9 and not _no_gluon(), chain=major >= 9)


def plain_because(device: torch.device) -> str:
    """Why a CUDA device gets the plain kernels where a plan wants overlapped ones, or nothing if it does not."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return "they are for compute capability 9.0 (Hopper)"
    return _no_gluon()


@functools.cache
def _no_gluon() -> str:
    try:
        from moefold_kernels.triton import (  # noqa: F401
            e4m3,
            leveled_apart,
            overlapped_apart,
            overlapped_pair,
            streamed,
        )
    except (ImportError, AttributeError) as error:  # experimental in Triton: it may move
        return f"triton {triton.__version__} has no Gluon as they know it ({error})"
    return ""


def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **options: Any) -> None:
    """Start a kernel on the current device (ops.py makes it the tensors'); the decorators' types know no launch."""
    if getattr(kernel, "hash", "") is None:
        settle(kernel)
    kernel[grid](*operands, **options)


def settle(kernel: Any) -> None:
    """Let a kernel's key in Triton's cache be the same in each process, whichever kernels were started before.

    Triton (3.6, 3.7) forgets what a function reads of its module where it was not hashed before its caller, so the key
    depends on which kernel came first, and a kernel that one process compiled another compiles anew. Here a
    function is hashed after all that it calls.
    """
    for name in kernel.fn.__code__.co_names:
        found = kernel.fn.__globals__.get(name)
        if getattr(found, "hash", "") is None:
            settle(found)
    kernel.cache_key  # noqa: B018 - computes and keeps it


def blocks(length: int, size: int) -> int:
    """How many blocks of `size` cover `length`."""
    return -(-length // size)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << max(number - 1, 0).bit_length()


@triton.jit
def after_the_one_before(CHAIN: tl.constexpr):
    """Wait for the data of the kernel before this one, then let the next one's programs start as places become free.

    In this order: what a kernel reads before its own wait then is from two kernels back or earlier, which have ended
    (from three, behind one that lets the next come first: e4m3_tokens.prepare).
    """
    wait_for_the_one_before(CHAIN)
    launch_the_next(CHAIN)


@triton.jit
def wait_for_the_one_before(CHAIN: tl.constexpr):
    if CHAIN:
        cuda.gdc_wait()


@triton.jit
def launch_the_next(CHAIN: tl.constexpr):
    if CHAIN:
        cuda.gdc_launch_dependents()


@triton.jit
def ask(lines):
    """Ask for cache lines in L2; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
