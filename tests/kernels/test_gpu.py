"""The same on a CUDA device: bits as on the CPU, models as their twins."""

from __future__ import annotations

import pytest
import torch
from layers import TOLERANCE, difference
from packing import pack_checkpoint
from transformers import AutoModelForCausalLM

import moefold_kernels.transformers  # noqa: F401  (registers the format)
from models import samples, tiny
from moefold_kernels import decode, encode, implementation, layout

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("top", [1, 40, 127, 253])
def test_bits_are_those_of_the_cpu(top):
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    for slot in (0, 1):
        assert torch.equal(
            decode(words.cuda(), top, slot).cpu().view(torch.int16), decode(words, top, slot).view(torch.int16)
        )
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.rand(300, 129, generator=generator) * 2.0 ** (layout.high(top) - 126)  # some above the window
    negative, keep = torch.randint(2, (2, 2, 300, 129), generator=generator).bool()
    there, counts = encode(magnitude.cuda(), negative.cuda(), keep.cuda(), top)
    here, expected = encode(magnitude, negative, keep, top)
    assert torch.equal(there.cpu(), here)
    assert counts == expected


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_logits_are_the_twins(family, implementation, tmp_path):
    source = tiny(family, tmp_path / "source", shard_size="1GB", num_hidden_layers=2)
    pack_checkpoint(source, tmp_path / "packed", tmp_path / "twin", alone=2)
    logits, moved = [], []
    for name in ("packed", "twin"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, device_map="auto", experts_implementation=implementation
        )
        with torch.no_grad():
            logits.append(model(samples(2, 9).cuda()).logits)
            moved.append(model.cpu()(samples(2, 9)).logits)
    assert logits[0].is_cuda
    assert torch.equal(*logits)
    assert torch.equal(*moved)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_kernels_are_the_default(family, tmp_path, caplog):
    """A model that was loaded on the CPU too, and each copy of one that is moved back and forth."""
    source = tiny(family, tmp_path / "source", shard_size="1GB", num_hidden_layers=2)
    pack_checkpoint(source, tmp_path / "packed", tmp_path / "twin", alone=2)
    model, twin = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("packed", "twin"))
    ids = samples(2, 9).cuda()
    with torch.no_grad():
        found, right = model.cuda()(ids).logits, twin.cuda()(ids).logits
        named = AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", device_map="cuda", experts_implementation="moefold"
        )
        assert torch.equal(named(ids).logits, found)
        assert not [record for record in caplog.records if record.name == implementation.__name__]
        assert 0 < difference(found, right) < TOLERANCE["logits"]
        assert torch.equal(model.cpu()(ids.cpu()).logits, twin.cpu()(ids.cpu()).logits)


@pytest.mark.slow
def test_generate_compiles_the_model(tmp_path):
    source = tiny("qwen3_moe", tmp_path / "source", shard_size="1GB", num_hidden_layers=2)
    pack_checkpoint(source, tmp_path / "packed", tmp_path / "twin", alone=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cuda")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(samples(2, 9).cuda(), **settings)
    compiled = model.generate(samples(2, 9).cuda(), cache_implementation="static", **settings)
    assert compiled.shape == plain.shape
    assert torch.equal(compiled[:, :10], plain[:, :10])
