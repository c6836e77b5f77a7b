"""Calibration text: whole samples, repeatable, honest about what it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models import tiny
from moefold import Checkpoint, Text
from moefold.errors import TextError
from moefold_plugins import sampling
from moefold_plugins.text import text_dataset, text_files, text_mix, text_prose, text_stdlib


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose tokens are bytes."""
    return Checkpoint.open(str(tiny("qwen3_moe", tmp_path_factory.mktemp("model"))))


def made(name: str, samples: int, length: int = 4, first: int = 0) -> Text:
    tokens = torch.arange(first, first + samples * length, dtype=torch.int32).view(samples, length)
    return Text(name, tokens, samples * length)


def test_files_documents_and_bytes(checkpoint, tmp_path: Path):
    (tmp_path / "a.txt").write_text("héllo " * 50, encoding="utf-8")
    found = text_files(checkpoint, files=[str(tmp_path / "*.txt")], samples=3, length=20, spread=False)
    assert found.tokens.shape == (3, 20)
    assert found.tokens.dtype == torch.int32
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.decode(found.tokens.flatten().tolist()).startswith("héllo héllo")
    assert 55 <= found.bytes <= 62  # a sample may cut a character in two
    assert found.sources[0]["samples"] == 3


def test_documents_are_joined_by_the_end_of_text(checkpoint, tmp_path: Path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 5)
    found = text_files(checkpoint, files=[str(tmp_path / "*")], samples=1, length=18)
    assert (found.tokens == checkpoint.tokenizer().eos_token_id).sum() == 3


def test_fewer_samples_than_wanted_are_said(checkpoint, tmp_path: Path):
    (tmp_path / "a.txt").write_text("x" * 45)
    found = text_files(checkpoint, files=[str(tmp_path / "a.txt")], samples=10, length=20, spread=False)
    assert found.tokens.shape[0] == 2
    assert found.sources == [{"name": str(tmp_path / "a.txt"), "documents": 1, "samples": 2, "wanted": 10}]


def spread(checkpoint: Checkpoint, folder: Path, samples: int, length: int, seed: int = 0) -> Text:
    return text_files(checkpoint, files=[str(folder / "*")], samples=samples, length=length, seed=seed, spread=True)


def test_spread_takes_a_part_of_each_document(checkpoint, tmp_path: Path):
    """As many tokens of each as a sample has, where documents are many; another place with another seed."""
    for name in "abcdefgh":
        (tmp_path / name).write_text("".join(f"{name}{i:03}" for i in range(200)))
    found = spread(checkpoint, tmp_path, samples=8, length=20)
    assert found.sources[0]["documents"] == 8
    assert found.sources[0]["of_each_at_most"] == 20
    told = [checkpoint.tokenizer().decode(row) for row in found.tokens.tolist()]
    whole = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert all(row in whole[next(c for c in row if c.isalpha())] for row in told)
    starts = [whole[next(c for c in row if c.isalpha())].index(row) for row in told]
    assert len(set(starts)) > 4
    assert torch.equal(found.tokens, spread(checkpoint, tmp_path, samples=8, length=20).tokens)
    assert not torch.equal(found.tokens, spread(checkpoint, tmp_path, samples=8, length=20, seed=1).tokens)
    assert spread(checkpoint, tmp_path, samples=3, length=20).sources[0]["documents"] == 3


def test_spread_takes_more_of_each_where_documents_are_few(checkpoint, tmp_path: Path):
    """Short ones whole, of the long ones as much as it takes; all of all where that is not enough."""
    for name, size in {"a": 10, "b": 400, "c": 500, "d": 6}.items():
        (tmp_path / name).write_text(name * size)
    tokenizer = checkpoint.tokenizer()
    found = spread(checkpoint, tmp_path, samples=20, length=20)
    assert found.tokens.shape == (20, 20)
    of = [int((found.tokens == tokenizer(name, add_special_tokens=False)["input_ids"][0]).sum()) for name in "abcd"]
    assert of[0] == 10
    assert of[3] == 6
    assert abs(of[1] - of[2]) <= 2
    everything = spread(checkpoint, tmp_path, samples=100, length=20)
    assert everything.sources[0]["samples"] == (10 + 400 + 500 + 6 + 4) // 20
    assert everything.sources[0]["of_each_at_most"] == 501


@pytest.mark.parametrize("size", [500, 100_000], ids=["tokenised whole", "cut before"])
def test_the_place_in_a_document_is_the_seeds(checkpoint, tmp_path: Path, size):
    """Of one document, whose turn no seed can change, other parts come with other seeds; not always its beginning."""
    (tmp_path / "a").write_text(whole := "".join(f"{i:05}" for i in range(size // 5)))
    parts = [spread(checkpoint, tmp_path, samples=1, length=30, seed=seed).tokens for seed in range(4)]
    starts = {whole.index(checkpoint.tokenizer().decode(part[0])) for part in parts}
    assert len(starts) == 4
    assert max(starts) > size / 10


def test_parts_do_not_depend_on_where_files_lie(checkpoint, tmp_path: Path, monkeypatch):
    """The same texts below another folder, and named relative to here, give the same tokens."""
    for folder in ("one", "another/place"):
        (tmp_path / folder).mkdir(parents=True)
        for name in "abc":
            (tmp_path / folder / name).write_text("".join(f"{name}{i:03}" for i in range(100)))
    monkeypatch.chdir(tmp_path / "one")
    found = [
        text_files(checkpoint, files=[pattern], samples=2, length=25)
        for pattern in ("*", str(tmp_path / "one/*"), str(tmp_path / "another/place/*"))
    ]
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].tokens, found[2].tokens)


def test_spread_does_not_tokenise_what_it_leaves(checkpoint, tmp_path: Path, monkeypatch):
    """Of a file of gigabytes only a piece, as large as the wanted tokens need; where tokens are long, a larger one."""
    (tmp_path / "a").write_text("x" * 400_000)
    asked = []
    whole = sampling._tokens
    monkeypatch.setattr(sampling, "_tokens", lambda *of, **ends: asked.append(len(of[1])) or whole(*of, **ends)[::50])
    found = spread(checkpoint, tmp_path, samples=2, length=50)
    assert found.tokens.shape == (2, 50)
    assert 5000 <= max(asked) < 20_000
    assert len(asked) < 10
    assert checkpoint.tokenizer().eos_token_id not in found.tokens


def test_empty_documents_are_none(checkpoint, tmp_path: Path):
    for name in "abc":
        (tmp_path / name).write_text("")
    with pytest.raises(TextError, match="0 tokens in 0 documents do not fill one sample"):
        spread(checkpoint, tmp_path, samples=1, length=2)
    (tmp_path / "d").write_text("some words")
    assert spread(checkpoint, tmp_path, samples=1, length=5).sources[0]["documents"] == 1


def test_lines_of_jsonl(checkpoint, tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"body": f"line {i} " * 5}) for i in range(4)))
    assert text_files(checkpoint, files=[str(file)], field="body", samples=2, length=30).sources[0]["documents"] <= 4
    with pytest.raises(TextError, match=r"a.jsonl:1: not a JSON object with the field 'text'"):
        text_files(checkpoint, files=[str(file)], samples=2, length=30)


def test_lines_that_json_allows(checkpoint, tmp_path: Path):
    """U+2028 inside a string, empty lines, a byte order mark, lines that end in CR LF; brackets in a file's name."""
    file = tmp_path / "a[1].jsonl"
    text = ["one\u2028two " * 3, "three " * 6]
    lines = "\r\n\n".join(json.dumps({"text": one}, ensure_ascii=False) for one in text)
    file.write_bytes(("\ufeff" + lines + "\n").encode())
    found = text_files(checkpoint, files=[str(file)], samples=1, length=40)
    assert found.sources[0]["documents"] == 2
    for line in ('{"text": null}', '{"text": ["a"]}', "[1]"):
        file.write_text(line)
        with pytest.raises(TextError, match=r"jsonl:1: (the field 'text' is .*, not text|not a JSON object)"):
            text_files(checkpoint, files=[str(file)], samples=1, length=4)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfabcd")
    assert text_files(checkpoint, files=[str(tmp_path / "b.txt")], samples=1, length=4, spread=False).bytes == 4


def test_bad_files(checkpoint, tmp_path: Path):
    with pytest.raises(TextError, match="no file matches"):
        text_files(checkpoint, files=[str(tmp_path / "*.none")])
    with pytest.raises(TextError, match=r"is a directory; write which of its files, such as '.*/\*\*/\*.txt'"):
        text_files(checkpoint, files=[str(tmp_path)])
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(TextError, match="do not fill one sample of 2048"):
        text_files(checkpoint, files=[str(tmp_path / "short.txt")])
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="cannot be read as UTF-8"):
        text_files(checkpoint, files=[str(tmp_path / "binary.txt")])


def test_content_is_in_the_key(tmp_path: Path):
    assert text_files.reads is not None
    (tmp_path / "a.txt").write_text("one")
    options = text_files.options(files=[str(tmp_path / "a.txt")]).model_dump()
    first = text_files.reads(**options)
    assert first == text_files.reads(**options)
    (tmp_path / "a.txt").write_text("two")
    assert first != text_files.reads(**options)


def test_stdlib_parts_differ_and_seeds_too(checkpoint):
    one = text_stdlib(checkpoint, part="calibrate", samples=4, length=64)
    assert torch.equal(one.tokens, text_stdlib(checkpoint, part="calibrate", samples=4, length=64).tokens)
    assert not torch.equal(one.tokens, text_stdlib(checkpoint, part="evaluate", samples=4, length=64).tokens)
    assert not torch.equal(one.tokens, text_stdlib(checkpoint, part="calibrate", samples=4, length=64, seed=1).tokens)
    assert text_prose(checkpoint, samples=2, length=64).tokens.shape == (2, 64)


def test_mix_takes_shares():
    mixed = text_mix((made("a", 10), made("b", 10, first=1000)), shares=[3, 1], samples=8)
    assert mixed.tokens.shape == (8, 4)
    assert int((mixed.tokens[:, 0] >= 1000).sum()) == 2
    assert mixed.name == "6 a + 2 b"
    assert mixed.bytes == 32
    assert len({tuple(row) for row in mixed.tokens.tolist()}) == 8
    third = text_mix((made("a", 9), made("b", 9), made("c", 9)), samples=10)
    assert sorted(s["samples"] for s in third.sources) == [3, 3, 4]


def test_mix_refuses_what_does_not_fit():
    with pytest.raises(TextError, match="differ in length"):
        text_mix((made("a", 4), made("b", 4, length=5)), samples=4)
    with pytest.raises(TextError, match="raise its samples to 9"):
        text_mix((made("a", 4),), samples=9)
    with pytest.raises(TextError, match="2 shares for 1 texts"):
        text_mix((made("a", 4),), shares=[1, 2], samples=2)


def test_dataset_from_a_directory(checkpoint, tmp_path: Path):
    pytest.importorskip("datasets", reason="the extra `dataset` is not installed")
    (tmp_path / "data").mkdir()
    rows = "\n".join(json.dumps({"text": f"row {i} " * 20}) for i in range(9))
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    found = text_dataset(checkpoint, name=str(tmp_path / "data"), samples=3, length=50)
    assert found.tokens.shape == (3, 50)
    with pytest.raises(TextError, match="no column 'body'"):
        text_dataset(checkpoint, name=str(tmp_path / "data"), field="body", samples=3, length=50)
