"""Calibration and evaluation text: from the standard library, files, Hugging Face datasets, or a mix of them."""

from __future__ import annotations

import glob
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from moefold import Checkpoint, Stage, Text, hookimpl, stage
from moefold.errors import TextError
from moefold_plugins.demo import stdlib
from moefold_plugins.sampling import Document, sampled

Samples = Annotated[int, Field(ge=1, description="how many samples")]
Length = Annotated[int, Field(ge=2, description="tokens in a sample")]
Seed = Annotated[int, Field(description="order in which documents are taken, and from which place of each")]
Spread = Annotated[
    bool, Field(description="a part of many documents, each from a random place, instead of the first ones whole")
]


def _digest(documents: Iterable[Document]) -> str:
    found = hashlib.sha256()
    for name, text in documents:
        found.update(f"{name}\0{text}\0".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _modules(part: stdlib.Part) -> list[Document]:
    try:
        return stdlib.modules(part)
    except FileNotFoundError as error:
        raise TextError(f"{error}; use text.files with files of your own") from error


def _stdlib_reads(part: stdlib.Part, **_: Any) -> str:
    return _digest(_modules(part))


@stage("text.stdlib", reads=_stdlib_reads)
def text_stdlib(
    checkpoint: Checkpoint,
    *,
    part: Annotated[
        stdlib.Part, Field(description="which modules: the demo model was trained on `train` and saw no other")
    ] = "calibrate",
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    spread: Spread = True,
) -> Text:
    """Source code of this Python's standard library, split by a hash of the module's name."""
    return sampled(f"stdlib {part}", _modules(part), checkpoint, samples, length, seed, spread)


def _prose_reads(**_: Any) -> str:
    return _digest(stdlib.prose())


@stage("text.prose", reads=_prose_reads)
def text_prose(
    checkpoint: Checkpoint, *, samples: Samples = 32, length: Length = 512, seed: Seed = 0, spread: Spread = True
) -> Text:
    """English prose that every Python carries: the language reference in pydoc_data.topics."""
    return sampled("prose", stdlib.prose(), checkpoint, samples, length, seed, spread)


def _read_files(files: Sequence[str], field: str) -> list[Document]:
    found = [_matches(str(Path(pattern).expanduser())) for pattern in files]
    paths = [Path(p) for p in dict.fromkeys(p for matches in found for p in matches) if Path(p).is_file()]
    if not paths:
        if folder := next((p for matches in found for p in matches), None):
            raise TextError(f"{folder} is a directory; write which of its files, such as '{folder}/**/*.txt'")
        raise TextError(f"no file matches {', '.join(files)}; quote a pattern so that the shell leaves it alone")
    return [document for path in paths for document in _read_file(path, field)]


def _matches(pattern: str) -> list[str]:
    """A file of just this name, which may hold brackets, or what the pattern matches."""
    # glob.glob and not Path.glob: patterns are absolute as often as not
    return [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207


def _read_file(path: Path, field: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as UTF-8 text: {error}; leave it out, or convert it") from error
    if path.suffix != ".jsonl":
        yield path.name, text
        return
    # not splitlines, which also cuts at U+2028, and JSON strings may hold that
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path.name}:{number}", _field(line, field, f"{path}:{number}")


def _field(line: str, field: str, where: str) -> str:
    """One field of a JSON object, which has to be text: what `str` makes of null is none."""
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise TextError(f"{where}: not a JSON object with the field {field!r}; set `field`") from error
    if not isinstance(text, str):
        raise TextError(f"{where}: the field {field!r} is {text!r:.40}, not text; leave the line out, or set `field`")
    return text


def _files_reads(files: Sequence[str], field: str, **_: Any) -> str:
    return _digest(_read_files(files, field))


@stage("text.files", reads=_files_reads)
def text_files(
    checkpoint: Checkpoint,
    *,
    files: Annotated[list[str], Field(min_length=1, description="paths or glob patterns (** crosses folders)")],
    field: Annotated[str, Field(description="which field of a line is the text, in .jsonl files")] = "text",
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    spread: Spread = True,
) -> Text:
    """Text from UTF-8 files; each file is a document, in .jsonl files each line."""
    return sampled(", ".join(files), _read_files(files, field), checkpoint, samples, length, seed, spread)


@stage("text.dataset")
def text_dataset(
    checkpoint: Checkpoint,
    *,
    name: Annotated[str, Field(description="dataset id on the hub, or a local directory")],
    config: Annotated[str | None, Field(description="which configuration of the dataset")] = None,
    split: Annotated[str, Field(description="which split")] = "train",
    revision: Annotated[str | None, Field(description="a commit or tag; pin it for runs to be repeated")] = None,
    field: Annotated[str, Field(description="which column is the text")] = "text",
    documents: Annotated[int, Field(ge=1, description="read at most so many rows, from the first")] = 20_000,
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    spread: Spread = True,
) -> Text:
    """Text from a Hugging Face dataset, streamed (needs `pip install 'moefold[dataset]'`)."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError:
        raise TextError("text.dataset needs the package datasets: pip install 'moefold[dataset]'") from None
    try:
        rows = list(datasets.load_dataset(name, config, split=split, revision=revision, streaming=True).take(documents))
    except (OSError, ValueError) as error:
        raise TextError(f"dataset {name} cannot be read: {error}; check name, config and split") from error
    if rows and field not in rows[0]:
        raise TextError(f"{name} has no column {field!r}; set `field` to one of {', '.join(rows[0])}")
    found = [(f"{split}#{index}", str(row[field])) for index, row in enumerate(rows) if row[field] is not None]
    return sampled(f"{name} {split}", found, checkpoint, samples, length, seed, spread)


@stage("text.mix")
def text_mix(
    texts: tuple[Text, ...],
    *,
    shares: Annotated[
        list[Annotated[float, Field(gt=0)]] | None, Field(description="weight of each text, in the order of needs")
    ] = None,
    samples: Samples = 128,
    seed: Seed = 0,
) -> Text:
    """Samples from several texts, in shares; calibration text matters more than the method."""
    weights = shares or [1.0] * len(texts)
    if len(weights) != len(texts):
        raise TextError(f"{len(weights)} shares for {len(texts)} texts; write one share for each text in needs")
    if len({text.tokens.shape[1] for text in texts}) != 1:
        lengths = ", ".join(f"{t.name}: {t.tokens.shape[1]}" for t in texts)
        raise TextError(f"the samples differ in length ({lengths}); give all texts the same length")
    parts, sources, size = [], [], 0
    for index, (text, count) in enumerate(zip(texts, _portions(weights, samples), strict=True)):
        have = text.tokens.shape[0]
        if have < count:
            raise TextError(f"{text.name} has {have} samples, and its share is {count}; raise its samples to {count}")
        chosen = sorted(random.Random(f"{seed} {index}").sample(range(have), count))
        parts.append(text.tokens[chosen])
        sources.append({"name": text.name, "samples": count, "wanted": count})
        size += round(text.bytes * count / have)
    return Text(" + ".join(f"{s['samples']} {s['name']}" for s in sources), torch.cat(parts), size, sources)


def _portions(weights: Sequence[float], samples: int) -> list[int]:
    """Whole numbers of samples that add up, by the largest remainder."""
    exact = [samples * w / sum(weights) for w in weights]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    return counts


@hookimpl
def moefold_stages() -> list[Stage[Any, Any]]:
    return [text_stdlib, text_prose, text_files, text_dataset, text_mix]
