"""`check_backend`: the reference and the Triton kernels pass, and broken ones are told what is wrong."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moefold.hooks import Registry
from moefold.testing import CheckError, Shape, Unchecked, check_backend
from moefold_kernels import Need, Reference
from moefold_kernels.activation import silu
from moefold_kernels.triton.backend import Triton

SMALL = (Shape(experts=4, hidden=64, inner=32, tokens=5), Shape(experts=5, hidden=40, inner=24, tokens=3, alone=1))


def test_the_reference_passes() -> None:
    check_backend(Reference())


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted where there is no GPU")
def test_triton_passes_interpreted() -> None:
    check_backend(Triton(interpret=True), shapes=SMALL, tolerance=1.5e-2)  # there float32 becomes bf16 by cutting


@pytest.mark.gpu
@pytest.mark.parametrize("backend", Registry.installed().ordered_backends(), ids=lambda b: b.name)
def test_all_that_are_installed_pass(backend: Any) -> None:
    check_backend(backend)


def test_where_nothing_can_be_checked_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unchecked, match=r"backend triton cannot work on format exponent here .*cpu.*TRITON_INTERPRET"):
        check_backend(Triton())


def test_pytest_shows_that_as_skipped_and_a_defect_as_failed(tmp_path: Path) -> None:
    text = """
        from moefold.testing import Unchecked, check_stage

        def test_nothing_to_check():
            raise Unchecked("no such device")

        def test_broken(moefold_world):
            check_stage(print)
    """
    (tmp_path / "test_it.py").write_text(textwrap.dedent(text))
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "moefold.testing.plugin", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "1 failed, 1 skipped" in done.stdout, done.stdout
    assert "no such device" in done.stdout
    assert "print: this is no stage" in done.stdout


@dataclass(frozen=True)
class Good(Reference):
    """What the broken ones are made of."""

    name: str = "broken"


class TakesAnything(Good):
    def can(self, need: Need) -> tuple[bool, str]:
        return True, "sure"


class TakesMeta(Good):
    def can(self, need: Need) -> tuple[bool, str]:
        return super().can(replace(need, device=torch.device("cpu")))


class NoReason(Good):
    def can(self, need: Need) -> tuple[bool, str]:
        return super().can(need)[0], ""


class SaysYes(Good):
    def can(self, need: Need) -> Any:
        return "yes", "always"


class FailsWhenAsked(Good):
    def can(self, need: Need) -> tuple[bool, str]:
        assert need.hidden
        return super().can(need)


class NoShape(Good):
    def can(self, need: Need) -> tuple[bool, str]:
        return (False, "too large") if need.hidden else super().can(need)


class SwapsSlots(Good):
    def decode(self, words: Any, top: int, slot: int) -> Any:
        return super().decode(words, top, 1 - slot)


class IgnoresGateWeights(Good):
    def experts(self, packed: Any, hidden: Any, index: Any, weights: Any, activate: Any) -> Any:
        return super().experts(packed, hidden, index, torch.ones_like(weights), activate)


class SwapsGateAndUp(Good):
    def experts(self, packed: Any, hidden: Any, index: Any, weights: Any, activate: Any) -> Any:
        return super().experts(packed, hidden, index, weights, lambda gate, up: activate(up, gate))


class FirstChoiceOnly(Good):
    def experts(self, packed: Any, hidden: Any, index: Any, weights: Any, activate: Any) -> Any:
        return super().experts(packed, hidden, index[:, :1], weights[:, :1], activate)


class Rounds(Good):
    def experts(self, packed: Any, *batch: Any) -> Any:
        return super().experts(packed, *batch).bfloat16()


class NeedsTokens(Good):
    def experts(self, packed: Any, hidden: Any, *batch: Any) -> Any:
        hidden.max()
        return super().experts(packed, hidden, *batch)


class WritesIntoItsInput(Good):
    def experts(self, packed: Any, hidden: Any, *batch: Any) -> Any:
        return super().experts(packed, hidden.mul_(1.5), *batch)


class NothingForNoTokens(Good):
    def experts(self, packed: Any, hidden: Any, *batch: Any) -> Any:
        return super().experts(packed, hidden, *batch) if len(hidden) else None


class ARowForNoTokens(Good):
    def experts(self, packed: Any, hidden: Any, *batch: Any) -> Any:
        return super().experts(packed, hidden, *batch) if len(hidden) else torch.zeros(1, hidden.shape[1])


class EvenOnly(Good):
    """Forgets the expert that an odd number leaves alone."""

    def experts(self, packed: Any, hidden: Any, index: Any, weights: Any, activate: Any) -> Any:
        paired = 2 * len(packed.pairs)
        return super().experts(packed, hidden, index, weights * (index < paired), activate)


class OneBlock(Good):
    def experts(self, packed: Any, hidden: Any, *batch: Any) -> Any:
        found = super().experts(packed, hidden, *batch)
        found[128:] = 0
        return found


class ItsOwnActivation(Good):
    def experts(self, packed: Any, hidden: Any, index: Any, weights: Any, activate: Any) -> Any:
        return super().experts(packed, hidden, index, weights, silu)


SEEN: dict[Any, Any] = {}


class KeepsTheFirstLayer(Good):
    """A cache by shape."""

    def experts(self, packed: Any, *batch: Any) -> Any:
        shapes = (*((name, words.shape) for name, words in packed.words.items()), len(packed.alone))
        return super().experts(SEEN.setdefault(shapes, packed), *batch)


class DecodesInPlace(Good):
    def decode(self, words: Any, top: int, slot: int) -> Any:
        found = super().decode(words, top, slot)
        words.zero_()
        return found


BROKEN = {
    NothingForNoTokens: r"tokens=0.*experts gave NoneType; it gives a tensor",
    ARowForNoTokens: r"tokens=0.*experts gave torch.float32 \[1, 64\]; it gives float32 \[0, 64\]",
    EvenOnly: r"Shape\(experts=5.*token \d+ .*off the definition",
    OneBlock: r"tokens=300.*token 128 .*off the definition",
    ItsOwnActivation: "another activation: token 0 .*off the definition",
    KeepsTheFirstLayer: "a second layer of the same shape: token 0 .*off the definition",
    DecodesInPlace: "decode changes the words in place",
    TakesAnything: "it says that it can work on a format called no-such-format",
    TakesMeta: "it says that it can work on meta tensors",
    NoReason: r"it refuses Need\(.*\) without a reason",
    SaysYes: r"can\(\) answers 'yes'; answer \(True or False, reason\)",
    FailsWhenAsked: r"can\(Need\(.*\) fails; answer \(False, reason\): AssertionError",
    NoShape: "it can work on cpu in torch.bfloat16, but on none of 7 shapes",
    SwapsSlots: "decode is not what the codec reads: slot 0 of gate_proj differs in",
    IgnoresGateWeights: r"Shape\(.*token 0 \(experts \[.*\]\) is .* off the definition",
    SwapsGateAndUp: "off the definition",
    FirstChoiceOnly: "off the definition",
    Rounds: r"experts gave torch.bfloat16 .*; it gives float32",
    NeedsTokens: r"tokens=0.*experts fails: ",
    WritesIntoItsInput: "experts changes its input in place",
}


@pytest.mark.parametrize(("backend", "message"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_backend_is_told_what_is_wrong(backend: type[Good], message: str) -> None:
    with pytest.raises(CheckError, match=f"^backend broken.*{message}"):
        check_backend(backend())


def test_the_backend_they_are_made_of_is_not_broken() -> None:
    check_backend(Good())
