"""`check_backend`: a kernel backend against the definition, over a table of shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moefold.codec import Codec
from moefold.errors import InputError
from moefold.hooks import Registry
from moefold.testing import merges
from moefold.testing.comparing import difference, snapshot
from moefold.testing.failures import CheckError, Unchecked, failing, require
from moefold_kernels import layout
from moefold_kernels.activation import silu
from moefold_kernels.backend import Backend, Need
from moefold_kernels.reference import PackedExperts

TOLERANCE = 1e-2
"""Of ||found - expected|| / ||expected||, where expected is float64 throughout: products of bfloat16 numbers with
activations rounded once are off by 2e-3 to 4e-3."""
Activation = Callable[[Tensor, Tensor], Tensor]
UNKNOWN = "no-such-format"


@dataclass(frozen=True)
class Shape:
    """A layer and a batch; `alone` experts are not paired, `skew` sends nearly every token to the first two."""

    experts: int
    hidden: int
    inner: int
    tokens: int
    top_k: int = 2
    alone: int = 0
    skew: float = 0.0


SHAPES = (
    Shape(experts=2, hidden=64, inner=32, tokens=1, top_k=1),
    Shape(experts=4, hidden=64, inner=32, tokens=5),
    Shape(experts=5, hidden=64, inner=96, tokens=17, alone=1),
    Shape(experts=8, hidden=128, inner=64, tokens=40, alone=2, skew=8.0),
    Shape(experts=6, hidden=72, inner=40, tokens=9, top_k=3),
    Shape(experts=4, hidden=64, inner=32, tokens=0),
    Shape(experts=3, hidden=64, inner=32, tokens=300, alone=1),
)
"""One token, several, none, more than a block; experts alone; an odd number of them; experts that nobody is routed to;
sizes that no block divides."""


def check_backend(
    backend: Backend, codec: Codec | None = None, *, shapes: Sequence[Shape] = SHAPES, tolerance: float = TOLERANCE
) -> None:
    """Ask a backend what it can do, have it do that, and raise CheckError where that is not what the codec decodes.

    Checked: refusals have reasons; formats it cannot know, and meta tensors, are refused; `decode` gives the codec's
    own values, bit for bit; `experts` is, in float32, decode, matmul, activation (the one that it is given), matmul,
    times the gate weight, within `tolerance` of float64, also for a second layer of the same shape; what it is given
    stays as it was.

    `codec`: of the backend's format (default: `exponent`). Raises Unchecked, which pytest shows as skipped, where the
    backend refuses every device of this machine.
    """
    what = f"backend {getattr(backend, 'name', None) or type(backend).__name__}"
    require(bool(getattr(backend, "name", "")), what, "it has no name")
    codec = Registry.installed().codecs[layout.EXPONENT]() if codec is None else codec
    answers = _answers(backend, what, codec.name)
    able = [need for need, (can, _) in answers.items() if can]
    if not able:
        said = "; ".join(f"{need.device}, {need.dtype}: {why}" for need, (_, why) in answers.items())
        raise Unchecked(f"{what} cannot work on format {codec.name} here ({said})")
    for need in able:
        done: list[Shape] = []
        for shape in shapes:
            done += [shape] if _runs(backend, what, codec, need, shape, tolerance, first=not done) else []
        require(bool(done), what, f"it can work on {need.device} in {need.dtype}, but on none of {len(shapes)} shapes")


def _answers(backend: Backend, what: str, format: str) -> dict[Need, tuple[bool, str]]:
    """What it says of each device and dtype there is; and that it does not say yes to everything."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    needs = [Need(format, torch.device(d), dtype) for d in devices for dtype in (torch.bfloat16, torch.float32)]
    found = {need: _ask(backend, what, need) for need in needs}
    able, _ = _ask(backend, what, replace(needs[0], format=UNKNOWN))
    require(not able, what, f"it says that it can work on a format called {UNKNOWN}; refuse formats you do not know")
    able, _ = _ask(backend, what, replace(needs[0], device=torch.device("meta")))
    require(not able, what, "it says that it can work on meta tensors, which hold no values")
    return found


def _ask(backend: Backend, what: str, need: Need) -> tuple[bool, str]:
    with failing(what, f"can({need}) fails; answer (False, reason)"):
        able, reason = backend.can(need)
    require(isinstance(able, bool), what, f"can() answers {able!r}; answer (True or False, reason)")
    require(able or bool(reason), what, f"it refuses {need} without a reason; `moefold doctor` shows reasons")
    return able, str(reason)


def _runs(backend: Backend, what: str, codec: Codec, need: Need, shape: Shape, tolerance: float, first: bool) -> bool:
    """Whether it takes a shape, which is then checked; the `first` with another activation and other weights, too."""
    if not _ask(backend, what, replace(need, hidden=shape.hidden, inner=shape.inner))[0]:
        return False
    where = f"{what} on {need.device}, {need.dtype}, {shape}"
    packed, right = _packed(codec, shape, need.device)
    _check_decode(backend, where, codec, packed)
    _check_experts(backend, where, packed, right, need, shape, tolerance)
    if first:
        _check_experts(backend, f"{where}, another activation", packed, right, need, shape, tolerance, _gelu)
        another = _packed(codec, shape, need.device, seed=1)
        _check_experts(backend, f"{where}, a second layer of the same shape", *another, need, shape, tolerance)
    return True


def _gelu(gate: Tensor, up: Tensor) -> Tensor:
    """An activation that is not silu."""
    return torch.nn.functional.gelu(gate) * up


def _packed(codec: Codec, shape: Shape, device: torch.device, seed: int = 0) -> tuple[PackedExperts, dict[str, Tensor]]:
    """A random layer, pairs in no order; and every expert's matrices as the codec reads them: [expert, ...] float64."""
    order = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(1)).tolist()
    alone, rest = order[: shape.alone], order[shape.alone :]
    if len(rest) % 2:
        raise InputError(f"{shape}: {len(rest)} experts are no pairs; leave another number alone")
    pairs = [(rest[i], rest[i + 1]) for i in range(0, len(rest), 2)]
    sizes = {"gate_proj": (shape.inner, shape.hidden), "up_proj": (shape.inner, shape.hidden)}
    sizes["down_proj"] = (shape.hidden, shape.inner)
    words, dense, settings, right = {}, {}, {}, {}
    for number, (name, (rows, columns)) in enumerate(sizes.items(), 100 * seed):
        spread, seeds = columns**-0.5, range(10 * number, 10 * number + len(pairs))
        merged = [merges.normal(rows, columns, spread, one, neither=False) for one in seeds]
        settings[name] = codec.fit(name, torch.cat([merges.reads(pair).float() for pair in merged]))
        coded = [codec.encode(pair, settings[name]).words for pair in merged]
        own = torch.randn(shape.alone, rows, columns, generator=torch.Generator().manual_seed(number)) * spread
        words[name], dense[name] = torch.stack(coded).to(device), own.bfloat16().to(device)
        right[name] = torch.empty(shape.experts, rows, columns, dtype=torch.float64)
        right[name][alone] = own.bfloat16().double()
        for members, one in zip(pairs, coded, strict=True):
            for slot, expert in enumerate(members):
                right[name][expert] = codec.decode(one, settings[name], slot).double()
    return PackedExperts(words, dense if alone else {}, settings, pairs, alone), right


def _check_decode(backend: Backend, where: str, codec: Codec, packed: PackedExperts) -> None:
    for name, words in packed.words.items():
        for slot in (0, 1):
            setting: Any = packed.window[name]
            before = words[0].clone()
            with failing(where, f"decode of slot {slot} fails"):
                found = backend.decode(words[0], setting, slot)
            if changed := difference(before, words[0], "words"):
                raise CheckError(f"{where}: decode changes the words in place ({changed})")
            require(isinstance(found, Tensor), where, f"decode gave {type(found).__name__}; it gives a tensor")
            if apart := difference(codec.decode(words[0].cpu(), setting, slot), found.cpu(), f"slot {slot} of {name}"):
                raise CheckError(f"{where}: decode is not what the codec reads: {apart}")


def _check_experts(
    backend: Backend,
    where: str,
    packed: PackedExperts,
    right: dict[str, Tensor],
    need: Need,
    shape: Shape,
    tolerance: float,
    activate: Activation = silu,
) -> None:
    batch = _batch(shape, need)
    before = snapshot((dict(packed.words), dict(packed.dense), *batch))
    with torch.inference_mode(), failing(where, "experts fails"):
        found = backend.experts(packed, *batch, activate)
    if changed := difference(before, (dict(packed.words), dict(packed.dense), *batch)):
        raise CheckError(f"{where}: experts changes its input in place ({changed})")
    require(isinstance(found, Tensor), where, f"experts gave {type(found).__name__}; it gives a tensor")
    said = f"experts gave {found.dtype} {list(found.shape)}"
    as_wanted = found.dtype == torch.float32 and found.shape == batch[0].shape
    require(as_wanted, where, f"{said}; it gives float32 {list(batch[0].shape)}")
    for token, expected in enumerate(_expected(right, *batch, activate)):
        error = float((found[token].cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30))
        chosen = batch[1][token].tolist()
        told = f"token {token} (experts {chosen}) is {error:.2g} off the definition, relative to its length"
        require(error <= tolerance, where, f"{told}; {tolerance:g} is allowed")


def _batch(shape: Shape, need: Need) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(shape.tokens, shape.experts, generator=generator)
    scores[:, :2] += shape.skew
    values, index = scores.topk(shape.top_k, dim=1)
    hidden = torch.randn(shape.tokens, shape.hidden, generator=generator).bfloat16()  # exact in every dtype asked for
    return hidden.to(need.device, need.dtype), index.to(need.device), values.softmax(dim=1).to(need.device)


def _expected(
    right: dict[str, Tensor], hidden: Tensor, index: Tensor, weights: Tensor, activate: Activation
) -> Iterator[Tensor]:
    """Token by token: [hidden] float64."""
    for x, chosen, gates in zip(hidden.cpu().double(), index.cpu(), weights.cpu().double(), strict=True):
        out = torch.zeros_like(x)
        for expert, gate in zip(chosen.tolist(), gates, strict=True):
            inner = activate(right["gate_proj"][expert] @ x, right["up_proj"][expert] @ x)
            out += gate * (right["down_proj"][expert] @ inner)
        yield out
