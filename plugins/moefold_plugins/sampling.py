"""Samples of equal length from documents, for every source of text."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from moefold import Checkpoint, Text
from moefold.errors import TextError

WINDOW = 16
"""Characters that are tokenised for each token wanted of a document: several times what a token holds, mostly."""

Document = tuple[str, str]
"""The name and the text of one document; no name says where on a machine a file lies, as places depend on names."""


def sampled(
    name: str,
    documents: Sequence[Document],
    checkpoint: Checkpoint,
    samples: int,
    length: int,
    seed: int,
    spread: bool,
) -> Text:
    """Tokenise documents in a random order and cut them into samples of equal length.

    A document ends with the tokenizer's end-of-text token where it has one; a sample may span several. With `spread`
    no document gives more than `length` tokens, or, where documents are too few for that, as few more as it takes.
    Takes fewer samples than asked for when the text ends, and says so in `sources`; raises TextError when not one is
    full.
    """
    tokenizer, wanted = checkpoint.tokenizer(), samples * length
    documents = [document for document in documents if document[1]]
    order = random.Random(seed).sample(documents, len(documents))
    parts = _spread(tokenizer, order, wanted, length, seed) if spread else _whole(tokenizer, order, wanted)
    tokens = [token for part in parts for token in part]
    found = min(samples, len(tokens) // length)
    if found == 0:
        raise TextError(
            f"{name}: {len(tokens)} tokens in {len(documents)} documents do not fill one sample of {length}; "
            "give more text, or a smaller length"
        )
    cut = torch.tensor(tokens[: found * length], dtype=torch.int32).view(found, length)
    size = sum(len(str(tokenizer.decode(row)).encode()) for row in cut.tolist())
    source = {"name": name, "documents": len(parts), "samples": found, "wanted": samples}
    return Text(name, cut, size, [source | ({"of_each_at_most": max(map(len, parts))} if spread else {})])


def _whole(tokenizer: Any, documents: Iterable[Document], wanted: int) -> list[list[int]]:
    """The tokens of the first documents, until they are enough."""
    parts: list[list[int]] = []
    for _, text in documents:
        parts.append(_tokens(tokenizer, text))
        wanted -= len(parts[-1])
        if wanted <= 0:
            break
    return parts


def _spread(tokenizer: Any, documents: Sequence[Document], wanted: int, most: int, seed: int) -> list[list[int]]:
    """At most `most` tokens of each document; of all of them, and more of each, where that is not enough."""
    parts = _Parts(tokenizer, seed)
    while True:
        found: list[list[int]] = []
        missing = wanted
        for document in documents:
            found.append(parts.of(document, most))
            missing -= len(found[-1])
            if missing <= 0:
                return found
        longer = sum(len(part) == most for part in found)
        if longer:
            most += -(-missing // longer)
        elif not parts.widen(documents, most):
            return found


class _Parts:
    """Parts of documents, each from a place that its name and the seed choose.

    A part that ends before its document does gets no end-of-text behind it: the model could foretell neither that nor
    what comes next, and both would count in losses.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._window = WINDOW
        self._whole: dict[int, list[int]] = {}
        """By document, those that were short enough to be tokenised whole."""

    def of(self, document: Document, most: int) -> list[int]:
        """At most so many tokens of one document."""
        name, text = document
        place = random.Random(f"{self._seed} {name}")
        size = most * self._window
        first = place.randint(0, max(0, len(text) - size))
        if size < len(text):
            tokens = _tokens(self._tokenizer, text[first : first + size], ends=first + size == len(text))
        else:
            tokens = self._whole.get(id(document)) or _tokens(self._tokenizer, text)
            self._whole[id(document)] = tokens
        start = place.randint(0, max(0, len(tokens) - most))
        return tokens[start : start + most]

    def widen(self, documents: Sequence[Document], most: int) -> bool:
        """Take more characters for a token, if any document has more; where tokens are longer than WINDOW."""
        more = any(len(text) > most * self._window for _, text in documents)
        self._window *= 2
        return more


def _tokens(tokenizer: Any, text: str, ends: bool = True) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None or not ends else [*ids, tokenizer.eos_token_id]
