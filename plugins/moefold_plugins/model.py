"""The stage that is always there: the model's own experts; and the models that ship with moefold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefold import Context, Experts, Layer, Stage, hookimpl, stage
from moefold_plugins import demo


@stage("model", keep="never")
def model(layer: Layer, context: Context) -> Experts:
    """The model's own experts, read from the checkpoint when they are needed."""
    return layer.experts(context.device)


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [model]


@hookimpl
def moefold_models() -> dict[str, Path]:
    return {"demo": demo.PATH}
