"""Kernels compile for the GPUs that they are for: Triton needs none for it, and its interpreter takes more than it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

BUILD = """
import os
import subprocess
import sys
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    "x": "*bf16", "words": "*i32", "low": "*i32", "scale": "*i16", "levels": "*i32", "out": "*bf16", "order": "*i32",
    "offsets": "*i32", "tiles": "*i32", "experts": "*i32", "weights": "*fp32", "factors": "*fp32",
    "token_factors": "*fp32",
}
FLOATS = ("shift", "gate_shift", "up_shift", "limit", "alpha")
WHOLE = ("hidden", "inner", "x_row", "w_up", "part", "out_split", "w_unit", "w_row")

def build(source, function, constants, pointers, arch, **options):
    names, signature, divisible = function.arg_names, {}, {}
    constants = {name: value for name, value in constants.items() if name in names}
    for place, name in enumerate(names):
        kind = "fp32" if name in FLOATS else "i32"
        signature[name] = "constexpr" if name in constants else (POINTERS | pointers).get(name, kind)
        if name not in constants and (name in POINTERS or name in WHOLE):
            divisible[(place,)] = [["tt.divisibility", 16]]
    held = {(names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", arch, 32)
    made = triton.compile(source(function, signature, held, divisible), target=target, options=options)
    print(function.__name__, arch, constants.get("FORMAT", constants.get("LOW")), "compiled", flush=True)
    if arch == 90:  # what ptxas says is not to be seen otherwise
        Path("kernel.ptx").write_text(made.asm["ptx"])
        given = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", os.devnull]
        said = subprocess.run(given, capture_output=True, text=True, check=True).stderr
        for line in said.splitlines():
            if "wgmma" in line:
                print(f"{function.__name__} {constants}: {line}", flush=True)
    return made
"""

PLAIN = """
from moefold_kernels.triton import project

given = dict(
    bias=None, ROWS=64, COLUMNS=32, TOKENS=16, GROUP=1, EXTRA=0, EVEN=True, UPCAST=False, CHAIN=False, LINES=1,
    GATED=True, ACTIVATION=1, GUESS=False, ASM=True,
)
for arch, mode, low, bands in (
    (80, project.PAIR, -1, False), (80, project.PAIR, 2, True), (80, project.SLOT, 4, True),
    (80, project.SLOT, 1, False), (90, project.PAIR, 0, True), (90, project.SLOT, 2, False),
):
    words = {} if low >= 0 else {"words": "*i16"}
    planes = {} if low >= 0 else dict(low=None, scale=None, levels=None)
    for function in (project.project_in, project.project_out):
        build(
            ASTSource, function, given | planes | dict(MODE=mode.value, LOW=low, BANDS=bands), words, arch, num_warps=4,
            num_stages=2,
        )
for arch, columns in ((80, 512), (90, 32), (90, 1024)):
    sums = dict(SPLITS=1, TOP_K=8, COLUMNS=columns, CHAIN=arch == 90)
    types, more = dict(parts="*bf16", index="*i64"), dict(launch_pdl=True) if arch == 90 else {}
    build(ASTSource, project.combine, sums, types, arch, num_warps=max(1, columns // 256), **more)
"""

JOINED = """
from moefold_kernels.triton import joined, project

WHOLE += ("down_unit", "down_row")
FLOATS += ("down_shift",)
POINTERS |= {name: "*bf16" for name in ("between", "parts", "bias", "down_bias")}
POINTERS |= {"words": "*i16", "down": "*i16", "ready": "*i32"}
given = dict(COLUMNS=32, TOKENS=16, GROUP=2, ACTIVATION=1, ASM=True, UPCAST=False, LINES=1, KEEP=True)
for arch, mode, rows, extra in ((80, project.PAIR, 32, 0), (80, project.SLOT, 64, 16), (90, project.PAIR, 32, 16)):
    cut = given | dict(MODE=mode.value, ROWS=rows, EXTRA=extra, CHAIN=arch == 90, GUESS=arch == 90)
    cut |= {} if extra else dict(bias=None, down_bias=None)
    more = dict(launch_pdl=True) if arch == 90 else {}
    build(ASTSource, joined.project, cut, {}, arch, num_warps=4, num_stages=3, **more)
"""

MERGING = """
from dataclasses import asdict
from moefold_kernels import layout
from moefold_kernels.triton import columns, pack

WHOLE += ("rows", "columns", "expert_stride", "row_stride", "target_stride", "whole_stride", "scale_stride")
FLOATS += ("threshold", "smallest", "largest")
POINTERS |= {name: "*i64" for name in ("top", "counts", "pairs", "experts")}
POINTERS |= {name: "*fp32" for name in ("target", "whole", "read", "follow", "cost", "weight", "scales", "bounds")}
POINTERS |= {"words": "*i16", "norms": "*fp32", "levels": "*fp32"}
for arch, function, block, kind in (
    (80, pack._pack, pack.PACK_BLOCKS[0], "*i16"), (80, pack._pack, pack.PACK_BLOCKS[1], "*fp32"),
    (90, pack._pack, pack.PACK_BLOCKS[0], "*i16"), (80, pack._largest, pack.LARGEST_BLOCKS[0], "*i16"),
    (90, pack._largest, pack.LARGEST_BLOCKS[0], "*fp32"),
):
    given = {name.upper(): value for name, value in asdict(block).items()}
    given |= dict(VECTOR=pack.VECTOR, WINDOW=layout.WINDOW, column_stride=1)
    build(
        ASTSource, function, given, dict(weights=kind), arch, num_warps=block.warps, num_stages=block.stages,
        maxnreg=block.registers, enable_fp_fusion=False,
    )
for arch, levels in ((80, 0), (80, 8), (90, 32)):
    given = dict(LEVELS=levels, STRIP=columns.STRIP, ROWS=columns.ROWS)
    build(ASTSource, columns._code, given, {}, arch, num_warps=columns.WARPS)
"""

ENTRY = """
from moefold_kernels.triton import by_entry, by_entry_launch

WHOLE += ("width", "dense_unit", "dense_row")
types = dict(x="*i32", index="*i64", places="*i32", dense="*i32", weights="*bf16", bias="*bf16")
given = dict(EXPERTS=128, PLACES=2, ACTIVATION=1, PACKED=True, SPLITS=2, AHEAD=4)
for arch, low, bands, alone in (
    (80, -1, False, True), (80, 4, True, False), (90, -1, False, False), (90, 2, True, True),
):
    kind = {} if low >= 0 else dict(low=None, scale=None, levels=None)
    kind |= dict(WHOLE=alone, DENSE=alone and low < 0) | ({} if alone else dict(dense=None, bias=None))
    kind |= dict(LOW=low, BANDS=bands, ALONE=alone, TOP_K=6, ASM=True, CHAIN=arch == 90)
    more = dict(launch_pdl=True) if arch == 90 else {}
    more |= dict(ptx_options=by_entry_launch.COMPILED) if low < 0 else {}
    for function, rows, cells, several in (
        (by_entry.gate_up, 4, 128, 1), (by_entry.down, 8, 64, 1), (by_entry.down, 2, 64, 4),
    ):
        if several == 1 or (low < 0 and not alone):
            given |= dict(ROWS=rows, CELLS=cells, BLOCKS=several)
            build(ASTSource, function, given | kind, types, arch, num_warps=4, **more)
"""

SORTING = """
from moefold_kernels.triton import sorting

for arch, columns in ((80, 0), (90, 0), (90, 2048)):
    given = dict(
        TOKENS1=16, TOKENS2=48, PLACES=256, COLUMNS=columns, BLOCK=16, COUNT_STEP=1024, CHUNK=256,
        BY_WORK=columns > 0, ITEMS=columns == 0, CHAIN=arch == 90,
    ) | ({} if columns else dict(x=None, rows=None, factors=None))
    types = dict(x="*bf16", rows="*fp8e4nv", index="*i64", places="*i32", chunks="*i32", keys="*i32")
    more = dict(launch_pdl=True) if arch == 90 else {}
    for function, step in ((sorting.route_few, 512), (sorting.count_chunks, 0), (sorting.place_chunks, 32)):
        build(ASTSource, function, given | dict(STEP=step), types, arch, num_warps=8, **more)
"""

HOPPER = """
from triton.experimental.gluon._runtime import GluonASTSource
from moefold_kernels.triton import (
    e4m3, leveled, leveled_apart, overlapped, overlapped_apart, overlapped_pair, streamed,
    streamed_launch,
)
from moefold_kernels.triton.plans import Tile, tile_fits

terms = dict(x="*fp8e4nv", scale="*i32", weights="*bf16")
given = dict(bias=None, GROUP=1, EXTRA=0, ACTIVATION=1)
few = given | dict(ROWS=64, TOKENS=8, PLACES=2, FORMAT="pair5", PAIRED=True, HALVES=2, WHOLE=True)
build(GluonASTSource, e4m3.project_in, few, terms, 90, num_warps=8)
build(GluonASTSource, e4m3.project_in, few, terms | dict(out="*fp8e4nv"), 90, num_warps=8)
build(GluonASTSource, e4m3.project_out, few | dict(ROWS=128), terms, 90, num_warps=8)
many = given | dict(ROWS=64, TOKENS=64, EXTRA=16, PLACES=2, FORMAT="pair6", PAIRED=True, BLOCKS=2)
build(GluonASTSource, leveled.project_out, many, dict(scale="*i32", weights="*bf16"), 90, num_warps=4)
build(GluonASTSource, leveled.project_in, many | dict(EXTRA=32, FORMAT="pair8"), dict(scale="*i32"), 90, num_warps=8)
build(GluonASTSource, leveled.project_in, many | dict(BLOCKS=1), dict(scale="*i32"), 90, num_warps=8)
most = given | dict(TOKENS=256, EXTRA=32, PLACES=2, FORMAT="pair8", BLOCKS=2, REGISTERS=104)
build(GluonASTSource, leveled_apart.project_in, most | dict(ROWS=64), dict(scale="*i32"), 90, num_warps=8)
WHOLE = tuple(name for name in WHOLE if name != "x_row")  # rows of tokens that begin at multiples of 16 bytes
build(GluonASTSource, leveled.project_in, many | dict(BLOCKS=1), dict(scale="*i32"), 90, num_warps=8)
narrow = given | dict(ROWS=32, COLUMNS=64, TOKENS=32, PLACES=4)
for mode in (overlapped, overlapped_pair):
    build(GluonASTSource, mode.project_in, narrow, dict(words="*i16"), 90, num_warps=4)
WHOLE += ("x_row",)
words = dict(words="*i16", weights="*bf16", bias="*bf16", down_bias="*bf16")
one = given | dict(ROWS=128, COLUMNS=64, TOKENS=256, EXTRA=32, PLACES=4, BLOCKS=2, REGISTERS=112)
build(GluonASTSource, overlapped_apart.project_out, one, words, 90, num_warps=8)
WHOLE += ("down_unit", "down_row")
FLOATS += ("down_shift",)
POINTERS |= {"between": "*bf16", "down": "*i16", "parts": "*bf16", "ready": "*i32", "items": "*i32"}
stream = dict(ACTIVATION=1, ROWS=64, GUESS=True, KEEP=True)
for biases, tokens, extra, columns, places in (
    (False, 16, 0, 128, 5), (True, 16, 16, 128, 4), (True, 64, 32, 64, 5), (False, 32, 8, 128, 4),
    (True, 32, 16, 128, 4), (True, 64, 0, 64, 7),
):
    tile = Tile("streamed", tokens, extra, 64, columns, 8, places)
    given = stream | dict(TOKENS=tokens, EXTRA=extra, COLUMNS=columns, PLACES=places)
    given |= dict(REGISTERS=streamed_launch.REGISTERS[columns]) | ({} if biases else dict(bias=None, down_bias=None))
    taken = build(GluonASTSource, streamed.project, given, words, 90, num_warps=8).metadata.shared
    assert tile_fits(tile, True, 232448) and not tile_fits(tile, True, taken - 1), (tile, taken)
"""


@pytest.mark.parametrize(
    ("code", "count"),
    [(PLAIN, 15), (JOINED, 3), (ENTRY, 9), (SORTING, 9), (MERGING, 8), (HOPPER, 17)],
    ids=["plain", "joined", "by entry", "sorting", "merging", "Hopper's"],
)
def test_kernels_compile_without_a_gpu(code, count, tmp_path):
    if code is HOPPER:
        pytest.importorskip("triton.experimental.gluon", reason="needs a Triton with Gluon")
    (tmp_path / "build.py").write_text(BUILD + code)
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "build.py"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=clean | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.stdout.count(" compiled") == count, done.stdout + done.stderr[-3000:]
    assert "wgmma" not in done.stdout, done.stdout  # products that wait for one another (C7512, C7513)


def test_no_constant_of_a_kernel_is_a_string_by_default():
    """Triton 3.6 makes no constant of it in a function that is called without it; 3.7 does."""
    looked_at, wrong = 0, []
    for file in sorted((Path(__file__).parents[2] / "kernels" / "moefold_kernels" / "triton").glob("*.py")):
        for function in ast.walk(ast.parse(file.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            if not any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
                continue
            looked_at += 1
            given = [default.value for default in function.args.defaults if isinstance(default, ast.Constant)]
            wrong += [f"{file.name}: {function.name}"] * any(isinstance(value, str) for value in given)
    assert looked_at > 100
    assert not wrong
