"""compressed-tensors' entry inside ours: written, read back, and refused where it cannot be."""

from __future__ import annotations

import json

import pytest

from moefold_kernels import FormatError, MergedLayer, PackedLayer, read_config, write_config
from moefold_kernels.quantized import MatrixReader, tripwire

MERGED = MergedLayer("model.layers.0.mlp.experts", (0, 1, 0, 1))
MATRICES = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def test_what_is_written_is_read():
    entry = json.loads(json.dumps(write_config({0: MERGED}, MATRICES)))
    assert entry["matrices"] == MATRICES
    assert read_config(entry) == {0: MERGED}
    assert "matrices" not in write_config({0: MERGED})


@pytest.mark.parametrize("matrices", [{"quant_method": "gptq"}, "int4", {}])
def test_other_entries_are_refused(matrices):
    entry = write_config({0: MERGED}) | {"matrices": matrices}
    with pytest.raises(FormatError, match=r"quantization_config\.matrices is no quantization_config of compressed"):
        read_config(entry)


def test_packed_layers_are_not_quantised():
    window = {"gate_proj": 120, "up_proj": 120, "down_proj": 120}
    packed = PackedLayer("model.layers.1.mlp.experts", window, pairs=((0, 1),))
    with pytest.raises(FormatError, match="packed layers have words of their own"):
        read_config(write_config({0: MERGED, 1: packed}, MATRICES))


def test_a_library_that_is_not_there(monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_compressed_tensors_available", lambda: False)
    with pytest.raises(FormatError, match="pip install 'compressed-tensors"):
        MatrixReader(MATRICES)


def test_the_tripwire_has_the_name_of_a_stock_tensor():
    assert tripwire("model.layers.0.mlp.experts", "w1") == "model.layers.0.mlp.experts.0.w1.weight"
