"""What is installed, what the devices are, and which kernel backend each format gets."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from moefold.artifact import Json
from moefold.hooks import Registry
from moefold_kernels.backend import Need, ask
from moefold_kernels.errors import KernelsError
from moefold_kernels.triton.configs import origin, overlapped

_LIBRARIES = ("moefold", "torch", "transformers", "safetensors", "triton", "accelerate", "datasets", "vllm")


def examine() -> dict[str, dict[str, Json]]:
    """Versions, devices, plugins, and per format and device the backend chosen and why others refuse."""
    registry = Registry.installed()
    plugins = sorted({registry.stages.source(name) for name in registry.stages})
    return {
        "Versions": {"python": platform.python_version()} | {name: _version(name) for name in _LIBRARIES},
        "Devices": _devices(),
        "Plugins": {name: _version(name) for name in plugins},
        "Kernel backends": _backends(registry) | _plans(),
        "Packing": _packers(registry),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, Json]:
    found: dict[str, Json] = {"cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if len(found) == 1:
        found["cuda"] = "none that torch can use"
    return found


def _backends(registry: Registry) -> dict[str, Json]:
    """For each format and device: which backend is chosen, and what every other one answered."""
    return {f"{name} on {device}": _answers(registry, name, device) for name in registry.codecs for device in _usable()}


def _packers(registry: Registry) -> dict[str, Json]:
    """For each format and device: who merges and packs there."""
    return {
        f"pack.{name} on {device}": codec.packer(torch.device(device))
        for name, codec in registry.codecs.items()
        for device in _usable()
    }


def _plans() -> dict[str, Json]:
    """For each GPU: whose measurements say how the Triton kernels are cut."""
    found: dict[str, Json] = {}
    for index in range(torch.cuda.device_count()):
        try:
            found[f"plans on cuda:{index}"] = _whose(torch.device("cuda", index))
        except KernelsError as error:
            found[f"plans on cuda:{index}"] = str(error)
    return found


def _whose(device: torch.device) -> str:
    told = [origin(device)]
    if importlib.util.find_spec("triton") is not None:
        told.append(overlapped(device))
    return "; ".join(filter(None, told))


def _usable() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _answers(registry: Registry, name: str, device: str) -> str:
    answers = ask(Need(name, torch.device(device)), registry.ordered_backends())
    chosen = next((a for a in answers if a.able), None)
    said = [f"{a.backend.name} refuses ({a.reason})" for a in answers if not a.able]
    first = f"{chosen.backend.name} ({chosen.reason})" if chosen else "none can"
    return "; ".join([first, *said])
