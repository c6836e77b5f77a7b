"""A toy world: stages over numbers, and a checkpoint that is only layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from moefold.artifact import Artifact, Json
from moefold.hooks import Registry
from moefold.layer import Layer
from moefold.pipeline import load
from moefold.plan import Plan, plan
from moefold.stage import Context, Layers, Previous, Provenance, stage


@dataclass(frozen=True)
class FakeCheckpoint:
    """Three layers (1, 2, 3: layer 0 is dense) and nothing in them."""

    path: Path = Path("nowhere")
    digest: str = "f"
    count: int = 3

    def fingerprint(self, strict: bool = False) -> str:
        return self.digest

    def layers(self) -> list[Layer]:
        return [Layer(self, n + 1, n) for n in range(self.count)]


@dataclass(frozen=True)
class Number(Artifact):
    value: float

    def facts(self) -> dict[str, Json]:
        return {"value": self.value}


@dataclass(frozen=True)
class State(Artifact):
    values: torch.Tensor


@dataclass(frozen=True)
class Seen(Artifact):
    total: float


@dataclass(frozen=True)
class Result(Artifact):
    total: float
    steps: list[Json]


def called(log: str, name: str) -> None:
    with Path(log).open("a") as file:
        file.write(name + "\n")


def world(log: Path, *, fail_at: int | None = None, extra: tuple[Any, ...] = ()) -> Registry:
    """model (never kept) -> walk (until read, reads the layer before) -> see (kept) -> sum (all layers)."""
    path = str(log)

    @stage("model", keep="never")
    def model(layer: Layer) -> Number:
        """The layer's number."""
        called(path, f"model {layer.number}")
        return Number(float(layer.number))

    @stage("start")
    def start(*, value: float = 1.0) -> Seen:
        """What the walk starts from."""
        called(path, "start")
        return Seen(value)

    @stage("walk", keep="until read")
    def walk(layer: Layer, start: Seen, before: Previous[State], number: Previous[Number]) -> State:
        """Add the number of the layer before to the state."""
        called(path, f"walk {layer.number}")
        if before is None:
            return State(torch.tensor([start.total]))
        assert number is not None
        return State(before.values + number.value)

    @stage("see")
    def see(
        layer: Layer, state: State, number: Number, *, factor: Annotated[float, Field(ge=0, le=10)] = 1.0
    ) -> Looked:
        """Look at the state."""
        called(path, f"see {layer.number}")
        if layer.number == fail_at:
            raise ValueError("the toy broke")
        return Looked(float(state.values.sum()) * factor + number.value)

    @stage("sum")
    def sum_(all_: Layers[Looked], maybe: Result | None, provenance: Provenance, context: Context) -> Total:
        """Add up all layers."""
        called(path, "sum")
        assert maybe is None
        assert context.device.type == "cpu"
        return Total(sum(looked.value for looked in all_.values()), [dict(s) for s in provenance.steps])

    class Plugin:
        pass

    from moefold.hooks import hookimpl

    @hookimpl
    def moefold_stages() -> list[Any]:
        return [model, start, walk, see, sum_, *extra]

    plugin = Plugin()
    plugin.moefold_stages = moefold_stages  # type: ignore[attr-defined]
    return Registry([("toys", plugin, "toys-dist")])


@dataclass(frozen=True)
class Looked(Artifact):
    value: float

    def facts(self) -> dict[str, Json]:
        return {"value": self.value}


@dataclass(frozen=True)
class Total(Artifact):
    value: float
    steps: list[Json]


PIPELINE = """\
model: some/model
stages:
  - uses: start
  - uses: walk
  - uses: see
  - uses: sum
"""


def planned(registry: Registry, text: str = PIPELINE, checkpoint: Any = None) -> Plan:
    return plan(load(text, "p.yaml", registry), checkpoint or FakeCheckpoint(), device="cpu")
