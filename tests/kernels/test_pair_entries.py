"""A few-bit layer's entry in config.json, its tensors' names and shapes, and reading them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from leveled import FORMATS, levels_of, matrix

from moefold_kernels import FormatError, PackedLayer, read_config, read_layer, write_config
from moefold_kernels.backend import Reference
from moefold_kernels.reference_pairs import LeveledExperts, decode, encode, stored


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([0.5], "has 2 positive levels"),
        ([0.5, 0.5], "increase"),
        ([1.0, 0.5], "increase"),
        ([0.0, 1.0], "has 2 positive"),
        ([1, 2], "has 2 positive"),
        ([1.0, float("nan")], "has 2 positive"),
        ([1.0, 1.001], "bf16 numbers"),
        ("ab", "has 2 positive"),
    ],
)
def test_levels_are_checked_where_they_are_read(levels, message):
    entry = json.loads(json.dumps(write_config({3: layer("pair4")})))
    entry["layers"]["3"]["levels"]["up_proj"] = levels
    with pytest.raises(FormatError, match=rf"layers\.3\.levels\.up_proj: .*{message}"):
        read_config(entry)


def layer(format: str, **changes) -> PackedLayer:
    """An entry of config.json."""
    names = ("gate_proj", "up_proj", "down_proj")
    levels = dict.fromkeys(names, levels_of(format))
    one = PackedLayer("layers.3.experts", {}, ((4, 1), (0, 3)), (2,), format=format, levels=levels)
    return replace(one, **changes)


@pytest.mark.parametrize("format", FORMATS)
def test_the_entry_is_read_as_it_was_written(format):
    entry = json.loads(json.dumps(write_config({3: layer(format)})))
    assert read_config(entry) == {3: layer(format)}
    assert "window" not in entry["layers"]["3"]
    entry["layers"]["3"]["window"] = {}
    with pytest.raises(FormatError, match=r"layers\.3\.window: unknown key"):
        read_config(entry)


def test_names_and_shapes():
    shapes = dict(layer("pair6").shapes(inner=96, hidden=130))
    assert shapes["layers.3.experts.1.gate_proj.packed_weight"] == (96, 24)
    assert shapes["layers.3.experts.1.gate_proj.packed_weight_low"] == (96, 12)
    assert shapes["layers.3.experts.1.gate_proj.packed_weight_group"] == (96, 3)
    assert shapes["layers.3.experts.0.down_proj.packed_weight"] == (130, 16)
    assert shapes["layers.3.experts.0.down_proj.weight"] == (130, 96)
    assert len(shapes) == 2 * 3 * 3 + 3 + 1
    forbidden = ("scale", "zero", "offset", "g_idx")  # vLLM's loader reads these words specially
    assert not [name for name in shapes for word in forbidden if word in name]
    assert not any(name.endswith("_low") for name in dict(layer("pair4").shapes(96, 130)))


def test_shapes_in_bands():
    """A matrix is in bands or not by its own rows and columns."""
    shapes = dict(layer("pair6").shapes(inner=192, hidden=256))
    assert shapes["layers.3.experts.1.gate_proj.packed_weight"] == (12, 16 * 32)
    assert shapes["layers.3.experts.1.gate_proj.packed_weight_low"] == (12, 16 * 16)
    assert shapes["layers.3.experts.1.gate_proj.packed_weight_group"] == (12, 16 * 4)
    assert shapes["layers.3.experts.0.down_proj.packed_weight"] == (256, 24)  # 192 columns
    assert shapes["layers.3.experts.0.down_proj.weight"] == (256, 192)


@pytest.mark.parametrize(("inner", "hidden"), [(70, 80), (128, 128), (128, 64), (64, 128)])
@pytest.mark.parametrize("format", FORMATS)
def test_experts_of_a_layer(format, inner, hidden):
    """The output is that of the decoded matrices, and `read_layer` gives the same from the files' names.

    By rows, in bands, and with one matrix kind in bands.
    """
    entry = layer(format)
    shape = {name: (hidden, inner) if name == "down_proj" else (inner, hidden) for name in entry.matrix}
    files, planes, dense = {}, {}, {}
    for number, (name, (rows, columns)) in enumerate(shape.items()):
        drawn = [matrix(format, rows, columns, 10 * number + pair) for pair in range(2)]
        each = [stored(format, encode(format, *one), columns) for one in drawn]
        planes[name] = {part: torch.stack([one[part] for one in each]) for part in each[0]}
        dense[name] = torch.randn(1, rows, columns).bfloat16()
        files |= {entry.packed(pair, name, part): one[part] for pair, one in enumerate(each) for part in one}
        files[entry.alone(0, name)] = dense[name][0]
    assert {name: tuple(tensor.shape) for name, tensor in files.items()} | {entry.tripwire: (0,)} == dict(
        entry.shapes(inner, hidden)
    )
    parts = {part: {name: planes[name][part] for name in shape} for part in planes["up_proj"]}
    columns = {name: size[1] for name, size in shape.items()}
    packed = LeveledExperts(
        parts["words"], dense, {}, entry.pairs, entry.dense, format, parts.get("low", {}), parts["scale"],
        entry.levels, columns,
    )  # fmt: skip
    read = read_layer(files.__getitem__, entry)
    for name in shape:
        assert packed.shape(name) == shape[name]
        assert torch.equal(packed.unpacked(name), read[name])
        assert torch.equal(read[name][4], decode(format, {k: v[0] for k, v in planes[name].items()},
                                                 entry.levels[name], columns[name], 0))  # fmt: skip
    x, weights = torch.randn(6, hidden).bfloat16(), torch.rand(6, 2)
    index = torch.randint(5, (6, 2))

    def activate(gate, up):
        return torch.nn.functional.silu(gate) * up

    expected = torch.zeros(6, hidden)
    for token, choice in product(range(6), range(2)):
        gate, up, down = (read[name][index[token, choice]].float() for name in shape)
        inside = activate(gate @ x[token].float(), up @ x[token].float()).bfloat16().float()
        expected[token] += weights[token, choice] * (down @ inside)
    found = Reference().experts(packed, x, index, weights, activate)
    assert (found - expected).norm() < 5e-3 * expected.norm()
    assert found.count_nonzero()


def test_words_of_no_layer_are_refused():
    entry = layer("pair4")
    files = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in entry.shapes(64, 128)}
    name = entry.packed(0, "up_proj")
    files[name] = files[name][:, 1:]
    with pytest.raises(FormatError, match=r"layers\.3\.experts: .* no nibble planes .* the checkpoint is damaged"):
        read_layer(files.__getitem__, entry, matrices=["up_proj"])
