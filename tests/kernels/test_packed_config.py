"""config.json's entry and the tensor names: written, read back, and refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from moefold_kernels import FormatError, PackedLayer, decode, layout_pairs, read_config, read_layer, write_config

LAYER = PackedLayer(
    prefix="model.layers.3.block_sparse_moe.experts",
    window={"gate_proj": 125, "up_proj": 126, "down_proj": 124},
    pairs=((4, 1), (0, 3)),
    dense=(2,),
    matrix={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)


OTHER = replace(LAYER, prefix="model.layers.11.block_sparse_moe.experts")


def test_what_is_written_is_read():
    entry = json.loads(json.dumps(write_config({11: OTHER, 3: LAYER})))
    assert read_config(entry) == {3: LAYER, 11: OTHER}
    assert list(entry["layers"]) == ["3", "11"]


def test_names():
    assert LAYER.packed(1, "up_proj") == "model.layers.3.block_sparse_moe.experts.1.w3.packed_weight"
    assert LAYER.alone(0, "down_proj") == "model.layers.3.block_sparse_moe.experts.0.w2.weight"
    assert LAYER.tripwire == "model.layers.3.block_sparse_moe.experts.gate_up_proj"
    assert LAYER.experts == 5
    shapes = dict(LAYER.shapes(inner=6, hidden=8))
    assert len(shapes) == 3 * 3 + 1
    assert shapes[LAYER.packed(0, "gate_proj")] == (6, 8)
    assert shapes[LAYER.alone(0, "down_proj")] == (8, 6)
    assert shapes[LAYER.tripwire] == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(quant_method="gptq"), "quant_method is 'gptq'"),
        (lambda e: e.update(version=9), "version is 9"),
        (lambda e: e.pop("version"), "version is None"),
        (lambda e: e.update(bits=4), r"quantization_config\.bits: unknown key"),
        (lambda e: e.update(layers=[1]), "layers is a list"),
        (lambda e: e["layers"].update({"x": {}}), "'x' is not the number"),
        (lambda e: e["layers"].update({"3": 4}), r"layers\.3 is a int"),
        (lambda e: e["layers"]["3"].update(format="4bit"), r"layers\.3\.format is '4bit'"),
        (lambda e: e["layers"]["3"].update(extra=1), r"layers\.3\.extra: unknown key"),
        (lambda e: e["layers"]["3"].pop("pairs"), r"layers\.3\.pairs is missing"),
        (lambda e: e["layers"]["3"].update(prefix=""), r"layers\.3\.prefix is ''"),
        (lambda e: e["layers"]["3"].update(prefix="a.(b+)+"), r"layers\.3\.prefix"),
        (lambda e: e["layers"].update({"4": e["layers"]["3"]}), "two entries are for one layer"),
        (lambda e: e["layers"]["3"]["matrix"].update(up_proj="w1"), "no names of different tensors"),
        (lambda e: e["layers"]["3"]["matrix"].update(up_proj=".*"), "no names of different tensors"),
        (lambda e: e["layers"]["3"].update(route=[0, 1]), r"layers\.3\.route"),
        (lambda e: e["layers"]["3"]["window"].update(up_proj=255), r"window\.up_proj: window top 255"),
        (lambda e: e["layers"]["3"]["window"].pop("up_proj"), "window has to have"),
        (lambda e: e["layers"]["3"]["matrix"].pop("up_proj"), "matrix has to name"),
        (lambda e: e["layers"]["3"].update(pairs=[]), "at least one"),
        (lambda e: e["layers"]["3"].update(pairs=[[0, 1, 2]]), "at least one"),
        (lambda e: e["layers"]["3"].update(pairs=[[0, 1], [1, 3]]), "each expert 0 .. 4 once"),
        (lambda e: e["layers"]["3"].update(dense=[7]), "each expert 0 .. 4 once"),
        (lambda e: e["layers"]["3"].update(dense=["2"]), "each expert 0 .. 4 once"),
    ],
)
def test_a_wrong_entry_says_where(change, message):
    entry = copy.deepcopy(write_config({3: LAYER}))
    change(entry)
    with pytest.raises(FormatError, match=message):
        read_config(entry)


@pytest.mark.parametrize("format", layout_pairs.MAGNITUDE_BITS)
def test_bits_that_lie_elsewhere_are_refused(format):
    """The few-bit formats have a version each; the exponent format has none, and knows none."""
    levels = tuple(float(i + 1) for i in range(1 << layout_pairs.magnitude_bits(format)))
    layer = replace(
        LAYER, format=format, window={}, levels=dict.fromkeys(("gate_proj", "up_proj", "down_proj"), levels)
    )
    entry, version = write_config({3: layer}), layout_pairs.VERSIONS[format]
    assert version == (4 if format == "pair8" else 3)  # since words have columns in layout_pairs.ORDER
    assert entry["layers"]["3"]["layout"] == version
    assert read_config(entry) == {3: layer}
    for other in (version - 1, version + 1, str(version), None):
        entry["layers"]["3"]["layout"] = other
        said = rf"layers\.3\.layout of {format} is {other!r}, this moefold reads {version}: compress the model again"
        with pytest.raises(FormatError, match=said):
            read_config(entry)
    del entry["layers"]["3"]["layout"]
    with pytest.raises(FormatError, match=rf"layers\.3 is {format} without layout, .* compress the model again"):
        read_config(entry)


def test_words_have_no_layout():
    other = write_config({3: LAYER})
    assert "layout" not in other["layers"]["3"]
    other["layers"]["3"]["layout"] = 1
    with pytest.raises(FormatError, match=r"layers\.3\.layout: unknown key"):
        read_config(other)


def stored(layer: PackedLayer) -> dict[str, torch.Tensor]:
    """Random tensors under every name of a layer."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for name, shape in layer.shapes(inner=6, hidden=8):
        words = torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16)
        made[name] = words if name.endswith("packed_weight") else words.to(torch.bfloat16)
    return made


def test_read_layer_puts_experts_in_their_order():
    tensors = stored(LAYER)
    read = read_layer(tensors.__getitem__, LAYER)
    assert {name: tuple(value.shape) for name, value in read.items()} == {
        "gate_proj": (5, 6, 8),
        "up_proj": (5, 6, 8),
        "down_proj": (5, 8, 6),
    }
    for name, top in LAYER.window.items():
        for index, pair in enumerate(LAYER.pairs):
            for slot, expert in enumerate(pair):
                assert torch.equal(read[name][expert], decode(tensors[LAYER.packed(index, name)], top, slot))
        assert torch.equal(read[name][2], tensors[LAYER.alone(0, name)])


def test_read_layer_refuses_a_pair_of_another_shape():
    tensors = stored(LAYER)
    name = LAYER.packed(1, "gate_proj")
    tensors[name] = tensors[name][:1]
    with pytest.raises(FormatError, match=r"experts\.1\.w1\.packed_weight is \[1, 8\], that of pair 0 \[6, 8\]"):
        read_layer(tensors.__getitem__, LAYER)
