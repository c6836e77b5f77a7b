"""`@stage` reads a signature, and refuses what it cannot read."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import torch
from pydantic import Field, ValidationError

from moefold import (
    Activity,
    Checkpoint,
    Context,
    Experts,
    Groups,
    Layer,
    Layers,
    Packed,
    PairMerge,
    Previous,
    Routed,
    stage,
)
from moefold.errors import PluginError


@stage("everything", keep="until read", version=3)
def everything(
    layer: Layer,
    experts: Experts,
    before: Previous[Routed],
    packed: Layers[Packed],
    several: tuple[Groups, ...],
    maybe: Activity | None,
    all_maybe: Layers[Activity] | None,
    context: Context,
    checkpoint: Checkpoint,
    *,
    share: Annotated[float, Field(ge=0, le=1)] = 0.5,
    name: str,
) -> Groups:
    """One of each.

    And more.
    """
    return Groups([[layer.number]], [])


def test_everything_is_read():
    kinds = {port.name: (port.type, port.kind) for port in everything.ports.values()}
    assert kinds == {
        "experts": (Experts, "one"),
        "before": (Routed, "previous"),
        "packed": (Packed, "layers"),
        "several": (Groups, "many"),
        "maybe": (Activity, "optional"),
        "all_maybe": (Activity, "optional layers"),
    }
    assert everything.injected == {"layer": Layer, "context": Context, "checkpoint": Checkpoint}
    assert (everything.produces, everything.keep, everything.version) == (Groups, "until read", 3)
    assert everything.summary == "One of each."


def test_options_forbid_what_is_unknown():
    assert everything.options(name="x").share == 0.5
    for wrong in ({}, {"name": "x", "share": 2}, {"name": "x", "shaer": 1}):
        with pytest.raises(ValidationError):
            everything.options(**wrong)


def test_a_stage_is_called_as_the_function_it_is():
    @stage("plain")
    def plain(groups: Groups, *, more: int = 1) -> Groups:
        """Add."""
        return Groups(groups.members, [more])

    assert plain(Groups([[0, 1]], []), more=2) == Groups([[0, 1]], [2])


def _missing(groups) -> Groups:  # type: ignore[no-untyped-def]
    return groups


def _plain_type(groups: int) -> Groups:
    raise AssertionError


def _no_artifact(groups: Groups) -> int:
    raise AssertionError


def _star(*groups: Groups) -> Groups:
    raise AssertionError


def _recipe(groups: Groups) -> PairMerge:
    raise AssertionError


def _tensor_option(*, value: torch.Tensor) -> Groups:
    raise AssertionError


def _nowhere(groups: Unknown) -> Groups:  # type: ignore[name-defined]  # noqa: F821
    raise AssertionError


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_missing, "parameter groups has no annotation"),
        (_plain_type, "input groups is <class 'int'>; an input is an Artifact class"),
        (_no_artifact, "annotate it with one Artifact class"),
        (_star, "cannot be wired"),
        (_recipe, 'write @stage(..., keep="never")'),
        (_tensor_option, "an option has a type that pydantic cannot check"),
        (_nowhere, "import the types it names at the top of the module"),
    ],
)
def test_what_cannot_be_read_is_refused(function: Any, message: str):
    with pytest.raises(PluginError, match="stage wrong: ") as caught:
        stage("wrong")(function)
    assert message in str(caught.value)


def test_layers_load_one_at_a_time():
    loaded: list[int] = []

    def load(number: int) -> Groups:
        loaded.append(number)
        return Groups([[number]], [])

    layers: Layers[Groups] = Layers({3: lambda: load(3), 5: lambda: load(5)})
    assert list(layers) == [3, 5]
    assert loaded == []
    assert layers[5].members == [[5]]
    assert loaded == [5]
