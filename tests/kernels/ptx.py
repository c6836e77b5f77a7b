"""A few of PTX's instructions in Python: what the assembly for Hopper computes, tried without a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

WORD = 0xFFFFFFFF


def run(assembly: str, results: int, operands: list[int], memory: Mapping[int, int] | None = None) -> list[int]:
    """The results of inline assembly for its operands; `memory` is shared memory by the address of its 32-bit words."""
    held = {f"${results + number}": value & WORD for number, value in enumerate(operands)}
    for line in re.split(r"[;\n]", assembly.strip().strip("{}")):
        if line.strip(" {}") and not line.strip().startswith(".reg"):
            name, rest = line.strip().split(None, 1)
            _step(name, [one.strip(" {}[]") for one in rest.split(",")], held, memory or {})
    return [held[f"${number}"] for number in range(results)]


def _step(name: str, places: list[str], held: dict[str, int], memory: Mapping[int, int]) -> None:
    if name == "ld.shared.v2.b32":
        at = held[places[2]]
        assert at % 8 == 0
        held[places[0]], held[places[1]] = memory[at], memory[at + 4]
        return
    given = [held[place] if place in held else int(place, 0) & WORD for place in places[1:]]
    held[places[0]] = _INSTRUCTIONS[name](*given) if name != "ld.shared.b32" else memory[given[0]]


def _bytes(value: int) -> list[int]:
    return list(value.to_bytes(4, "little"))


def _prmt(a: int, b: int, selector: int) -> int:
    pool, out = _bytes(a) + _bytes(b), 0
    for number in range(4):
        code = selector >> 4 * number & 15
        byte = pool[code & 7]
        out |= (255 * (byte >> 7) if code & 8 else byte) << 8 * number
    return out


def _lop3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> (a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) & 1) << i for i in range(32))


def _dp2a(a: int, b: int, c: int, high: bool) -> int:
    two = _bytes(b)[2:] if high else _bytes(b)[:2]
    return (c + (a & 0xFFFF) * two[0] + (a >> 16) * two[1]) & WORD


def _halves(value: int) -> torch.Tensor:
    """Two bf16 numbers, in float64."""
    return torch.tensor([value << 16 & WORD, value & 0xFFFF0000]).to(torch.int32).view(torch.float32).double()


def _rounded(pair: torch.Tensor) -> int:
    low, high = (int(one) & 0xFFFF for one in pair.bfloat16().view(torch.int16))
    return low | high << 16


_INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b & WORD,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "dp4a.u32.u32": lambda a, b, c: (c + sum(x * y for x, y in zip(_bytes(a), _bytes(b), strict=True))) & WORD,
    "dp2a.lo.u32.u32": lambda a, b, c: _dp2a(a, b, c, high=False),
    "dp2a.hi.u32.u32": lambda a, b, c: _dp2a(a, b, c, high=True),
    "mul.rn.bf16x2": lambda a, b: _rounded(_halves(a) * _halves(b)),
    "add.rn.bf16x2": lambda a, b: _rounded(_halves(a) + _halves(b)),
    "fma.rn.bf16x2": lambda a, b, c: _rounded(_halves(a) * _halves(b) + _halves(c)),
}
