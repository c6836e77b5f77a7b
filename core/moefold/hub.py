"""Models of the Hugging Face hub, by their ids."""

from __future__ import annotations

from pathlib import Path

from moefold.errors import CheckpointError

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def looks_local(name: str) -> bool:
    """Whether a model's name is a path rather than a hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name


def download(name: str, revision: str | None) -> Path:
    """The directory of a model of the hub; raises CheckpointError when the hub gives none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:  # subfolders hold other formats of the same weights (gpt-oss: original/, metal/)
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: neither a local directory nor a model that the hub gives ({first}); "
            "check the spelling, log in if it is gated, or give a directory"
        ) from error
