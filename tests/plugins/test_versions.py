"""A stage whose results change must raise its version, or stored results of the old code are taken for new ones.

The digests are of outputs that are the same on every machine: integers, and elementwise arithmetic. When a test here
fails and the change is meant, raise the stage's `version` and put the new pair below.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from moefold import Activity, Context, Experts, Groups, Similarity, Text
from moefold.artifact import Artifact
from moefold.hooks import Registry
from moefold_kernels.layout_pairs import MAGNITUDE_BITS, groups
from moefold_kernels.reference_pairs import encode, stored
from moefold_plugins.damage import CODECS
from moefold_plugins.puzzlemoe import puzzlemoe

PINNED = {
    "pair.random": (1, "b4a98679bdbe933a"),
    "pair.by_usage": (1, "b8ee25658f8c94e0"),
    "pair.similar": (1, "c1f727df409a2a85"),
    "puzzlemoe": (1, "284633552391bc4f"),
    "pack.exponent": (2, "8c015d9226130770"),
    "pack.pair8": (5, "c46901d48a8531df"),
    "pack.pair6": (5, "02968627c6725dc2"),
    "pack.pair5": (5, "696c93a7861baa88"),
    "pack.pair4": (5, "750b40af6fa7833c"),
    "text.mix": (1, "176fcec209b466cd"),
    "save": (3, "ff36797bab13edcf"),
}


@dataclass(frozen=True)
class Layer:
    number: int = 3
    expert_count: int = 6


def numbers(*shape: int, salt: int = 0) -> torch.Tensor:
    """Values in -1 .. 1 with many exponents, from integer arithmetic only."""
    count = torch.Size(shape).numel()
    steps = (torch.arange(count, dtype=torch.int64) * 2654435761 + salt * 40503) % 65521
    values = steps.double() / 65521 * 2 - 1
    return (values * 2.0 ** -(steps % 23).double()).view(shape).bfloat16()


EXPERTS = Experts(numbers(6, 20, 8), numbers(6, 8, 10, salt=1))
ACTIVITY = Activity(
    torch.tensor([9, 4, 30, 1, 0, 12]), numbers(6, 8, salt=2).abs().float(), numbers(6, 10).abs().float()
)
PAIRS = Groups([[0, 4], [2, 3]], [1, 5])
TEXTS = tuple(Text(f"t{i}", torch.arange(24, dtype=torch.int32).view(6, 4) + 100 * i, 24) for i in range(3))


def encoded(format: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """A matrix's bits in a few-bit format: of levels, signs and positions that integers give."""
    number = torch.arange(rows * columns).view(rows, columns)
    level = (number * 7 % (1 << MAGNITUDE_BITS[format])).to(torch.uint8)
    negative = torch.stack([number % 3 == 0, number % 5 < 2])
    keep = torch.stack([number % 7 != 0, number % 7 != 1])
    return encode(format, level, numbers(rows, groups(columns), salt=6).abs(), negative & keep, keep)


def halves(planes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of words: exact in float32."""
    return {name: part.view(torch.int16) for name, part in planes.items()}


def files() -> SimpleNamespace:
    """What is saved of a matrix in each few-bit format, in bands and by rows."""
    sizes = ((128, 256), (3, 160))
    return SimpleNamespace(**{
        f"{format}_{rows}": halves(stored(format, encoded(format, rows, columns), columns))
        for format in MAGNITUDE_BITS
        for rows, columns in sizes
    })  # fmt: skip


def outputs() -> dict[str, Artifact | SimpleNamespace]:
    stages = Registry.installed().stages
    merge = puzzlemoe(EXPERTS, PAIRS, ACTIVITY, Context(torch.device("cpu"), torch.Generator()), threshold=0.4)
    alike = numbers(6, 6, salt=4).float()
    return {
        "pair.random": stages["pair.random"](Layer(), None, seed=5, fraction=1.0, skip=[]),
        "pair.by_usage": stages["pair.by_usage"](Layer(), ACTIVITY, fraction=1.0, skip=[]),
        "pair.similar": stages["pair.similar"](Layer(), Similarity(alike + alike.T, "x"), fraction=0.7, skip=[]),
        "puzzlemoe": merge,
        "pack.exponent": stages["pack.exponent"](merge),
        **{f"pack.{format}": SimpleNamespace(**halves(encoded(format, 3, 160))) for format in MAGNITUDE_BITS},
        "save": files(),
        "text.mix": stages["text.mix"](TEXTS, shares=[1, 2, 1], samples=8, seed=2),
    }


def digest(value: Artifact | SimpleNamespace) -> str:
    found = hashlib.sha256()
    if hasattr(value, "merged"):
        for matrix in EXPERTS.matrices():
            for part in value.merged(matrix):
                for tensor in part:
                    found.update(tensor.float().numpy().tobytes())
        return found.hexdigest()[:16]
    for name, item in sorted(vars(value).items()):
        if item is None:
            continue  # a field that came later and holds nothing here changes no result
        for key, entry in sorted(item.items()) if isinstance(item, dict) else [("", item)]:
            data = entry.float().numpy().tobytes() if isinstance(entry, torch.Tensor) else repr(entry).encode()
            found.update(f"{name}{key}".encode() + data)
    return found.hexdigest()[:16]


def test_what_any_codec_packs_has_a_version_of_all() -> None:
    stages = Registry.installed().stages
    assert stages["pack.planned"].version == max(stages[f"pack.{codec}"].version for codec in CODECS)


@pytest.mark.parametrize("name", PINNED)
def test_results_change_with_the_version_only(name: str) -> None:
    found = (Registry.installed().stages[name].version, digest(outputs()[name]))
    assert found == PINNED[name], f"{name} now gives {found}; if that is meant, raise its version and pin it here"
