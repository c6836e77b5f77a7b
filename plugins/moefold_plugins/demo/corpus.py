"""The demo model's training text: the library's `train` modules and other code, without copies of held-out text."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moefold_plugins.demo import stdlib

END = "<|endoftext|>"
LONG = 30  # Characters: shorter lines are shared by chance.
COPIED = 0.1  # Share of long lines at which a file counts as holding a held-out module, or being held in one.
SEEN = 0.6  # Share of long lines at which a file is a near copy of training text already taken.
VENDORED = {"_vendor", "vendored", "_distutils", "externals", "third_party"}
COPIES = {
    "cloudpickle",
    "importlib_metadata",
    "importlib_resources",
    "mock",
    "simplejson",
    "tomli",
    "typing_extensions",
    "zipp",
}
Document = tuple[str, str]

# Closing punctuation, line break and the next line's indentation are one piece: 3 % fewer tokens than Qwen3's pieces.
PIECES = r" ?\p{L}+|_\p{L}*|\p{N}| ?[^\s\p{L}\p{N}_]*\r?\n[\r\n]*[ \t]*| ?[^\s\p{L}\p{N}_]+|[ \t]+|\s"


def long_lines(text: str) -> set[str]:
    """Return the distinct lines of a text that tell where it comes from: long ones, no comments (licences repeat)."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= LONG and not line.startswith("#")}


class HeldOut:
    """The lines of all held-out text, to recognise copies of it under any name."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self.owners: dict[str, set[str]] = defaultdict(set)
        self.sizes: dict[str, int] = {}
        for name, text in documents:
            lines = long_lines(text)
            self.sizes[name] = max(len(lines), 1)
            for line in lines:
                self.owners[line].add(name)

    def copied_in(self, lines: set[str]) -> bool:
        """Say whether a file's lines are copied from held-out text, or hold a good share of one such text."""
        shared = [line for line in lines if line in self.owners]
        owners = Counter(owner for line in shared for owner in self.owners[line])
        holds = any(count >= 5 and count > COPIED * self.sizes[owner] for owner, count in owners.items())
        return holds or (len(shared) >= 5 and len(shared) > COPIED * len(lines))


def held_out(libraries: Iterable[Path]) -> HeldOut:
    """Collect the held-out modules of every library, and the prose."""
    named = (
        (f"{folder.name}:{name}", text)
        for folder in libraries
        for part in ("calibrate", "evaluate")
        for name, text in stdlib.modules(part, folder)
    )
    return HeldOut([*named, *stdlib.prose()])


def packages(folders: Iterable[Path]) -> Iterator[Document]:
    """Yield the Python files of other packages' folders, without tests: most of those are data."""
    for folder in sorted(set(folders)):
        for path in sorted(folder.rglob("*.py")):
            if {"tests", "test", "testing"}.isdisjoint(path.relative_to(folder).parts):
                yield f"{folder.name}/{path.relative_to(folder)}", path.read_text("utf-8", errors="ignore")


def unsuitable(text: str) -> bool:
    """Say whether a file is a table, generated, or too short to learn from."""
    lines = text.splitlines()
    letters = sum(map(str.isalpha, text))
    table = letters < 0.4 * len(text) or max(map(len, lines), default=0) > 1000
    return table or not 300 < len(text) < 250_000 or "@generated" in text or "AUTO-GENERATED" in text[:2000]


def select(documents: Iterable[Document], held: HeldOut, seen: set[str], counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents to train on, counting why the others are dropped; `seen` grows by what is taken."""
    for name, text in documents:
        lines = long_lines(text)
        if not VENDORED.isdisjoint(re.split(r"[/.]", name)) or not COPIES.isdisjoint(re.split(r"[/.]", name)):
            counts["vendored, by name"] += 1
        elif held.copied_in(lines):
            counts["copy of held-out text"] += 1
        elif unsuitable(text):
            counts["table, generated or tiny"] += 1
        elif len(lines & seen) > SEEN * len(lines):
            counts["near copy of training text"] += 1
        else:
            seen |= lines
            counts["taken"] += 1
            yield name, text


def collect(
    libraries: list[Path], folders: list[Path]
) -> tuple[list[Document], list[Document], dict[str, dict[str, int]]]:
    """Return the library's training documents, the other packages', and the counts of both; libraries newest first."""
    held, seen = held_out(libraries), set[str]()
    counts: dict[str, Counter[str]] = {"library": Counter(), "packages": Counter()}
    own = [document for folder in libraries for document in stdlib.modules("train", folder)]
    own.sort(key=lambda document: not stdlib.TESTS.isdisjoint(document[0].split(".")))  # Stable: tests come last.
    library = list(select(own, held, seen, counts["library"]))
    others = list(select(packages(folders), held, seen, counts["packages"]))
    return library, others, {kind: dict(count) for kind, count in counts.items()}


def train_tokenizer(documents: Iterable[Document], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every text encodes without loss."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document], seed: int = 0) -> torch.Tensor:
    """Return the documents as one stream of int16 tokens in random order, the end token before each of them."""
    random.Random(seed).shuffle(documents)
    end = tokenizer.convert_tokens_to_ids(END)
    pieces = []
    for start in range(0, len(documents), 256):
        texts = [text for _, text in documents[start : start + 256]]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            pieces.append(torch.tensor([end, *ids], dtype=torch.int16))
    return torch.cat(pieces)
