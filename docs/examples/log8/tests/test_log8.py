"""The codec keeps to its word, the kernel to the codec, and a pipeline runs through both."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from moefold_log8 import plugin
from moefold_log8.backend import Log8Triton
from moefold_log8.codec import Log8

from moefold import MergedPair
from moefold.testing import Shape, check_backend, check_codec
from moefold_kernels import Need

PIPELINE = """
model: {model}
stages:
  - {{id: text, uses: text.stdlib, with: {{part: calibrate, samples: 2, length: 32}}}}
  - {{uses: forward, needs: {{experts: unpack.log8}}}}
  - {{uses: observe}}
  - {{uses: pair.by_usage}}
  - {{uses: puzzlemoe}}
  - {{uses: pack.log8}}
  - {{uses: unpack.log8, needs: {{packed: pack.log8}}}}
  - {{uses: pack.exponent}}
  - {{uses: save, needs: {{experts: pack.exponent}}, with: {{to: {out}}}}}
"""


def test_it_is_a_good_codec():
    check_codec(Log8, tolerance=0.12)


def test_it_is_a_good_backend():
    shapes = (Shape(experts=4, hidden=64, inner=32, tokens=5), Shape(experts=5, hidden=39, inner=21, tokens=3, alone=1))
    check_backend(Log8Triton(), Log8(), shapes=shapes)


def test_half_octaves_are_exact():
    magnitude = torch.tensor([[2.0 ** (-k / 2) for k in range(16)] + [2.0**-8.4, 2.0**-8.6]])
    flags = torch.ones(2, *magnitude.shape, dtype=torch.bool)
    codec, pair = Log8(), MergedPair(magnitude, flags & False, flags)
    settings = codec.fit("up_proj", magnitude[None])
    coded = codec.encode(pair, settings)
    assert coded.counts == {"clipped": 0, "flushed": 1}
    assert coded.words.shape == (1, 9)
    found = codec.decode(coded.words, settings, 1)
    assert torch.equal(found[:, :16], magnitude[:, :16].bfloat16())
    assert found[0, 16:].tolist() == [float(torch.tensor(2.0**-7.5).bfloat16()), 0.0]


def test_refusals_have_reasons(monkeypatch):
    backend = Log8Triton()
    assert backend.can(Need("exponent", torch.device("cuda"))) == (False, "knows format log8 only, not exponent")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.can(Need("log8", torch.device("cpu"))) == (False, "compiles for CUDA devices, not for cpu")


def test_it_runs_from_yaml(moefold_run, moefold_model, tmp_path):
    notes = moefold_run(PIPELINE.format(model=moefold_model.path, out=tmp_path / "out"), plugins=[plugin])
    facts = notes["pack.log8"]["0"]["facts"]
    assert facts["bytes"] * 2 == notes["pack.exponent"]["0"]["facts"]["bytes"]
