"""Merged checkpoints as sources: merged or packed further; and what no files can hold."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from merged_layers import FAMILIES, GROUPS, PROVENANCE, Made, hybrids, load, logits, merged, mergers, paired, stream

from moefold import Checkpoint, Layers, Reduced
from moefold.errors import CheckpointError, FormatError
from moefold_plugins.save import save

FEWER = [[0, 4], [1, 2], [3]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints, made once."""
    return Made(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_is_merged_further(made, tmp_path, family):
    first = Checkpoint.open(str(made.saved(family)[0]))
    save(first, mergers(first, FEWER), None, PROVENANCE, to=tmp_path / "out")
    save(first, mergers(first, FEWER), None, PROVENANCE, to=tmp_path / "twin", export="expanded")
    assert {layer.expert_count for layer in Checkpoint.open(str(tmp_path / "out")).layers()} == {3}
    assert Checkpoint.open(str(tmp_path / "out")).layers()[0].experts().route.tolist() == [0, 1, 1, 0, 2, 0, 0, 1]
    ours = load(tmp_path / "out")
    assert torch.equal(logits(ours), logits(load(tmp_path / "twin")))
    assert torch.equal(logits(ours), stream(tmp_path / "out"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_is_packed(made, tmp_path, family):
    """The same files as when both were done at once."""
    first = Checkpoint.open(str(made.saved(family)[0]))
    layers = {n.number: partial(lambda layer: paired(layer.experts(), [[3, 0], [1, 4]]), n) for n in first.layers()}
    save(first, Layers(layers), None, PROVENANCE, to=tmp_path / "out")
    out, once = (Checkpoint.open(str(path)) for path in (tmp_path / "out", made.saved(family, "hybrid")[0]))
    assert out.entries == once.entries
    assert out.weight_map.keys() == once.weight_map.keys()
    assert all(torch.equal(out.tensor(key), once.tensor(key)) for key in out.weight_map)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_a_packer_skips_stays_merged(made, tmp_path, family):
    source = made.source(family)
    values = {n: partial(lambda n: paired(merged(n.experts(), GROUPS), []), n) for n in source.layers()}
    layers = Layers({layer.number: value for layer, value in values.items()})
    saved_ = save(source, layers, None, PROVENANCE, to=tmp_path / "out")
    out, once = (Checkpoint.open(str(path)) for path in (tmp_path / "out", made.saved(family)[0]))
    assert out.entries == once.entries
    assert all(torch.equal(out.tensor(key), once.tensor(key)) for key in once.weight_map)
    assert (saved_.figures["format"], saved_.figures["kinds"]) == ("none", {"merged": 2})


def test_layers_that_nothing_replaces(made, tmp_path):
    source = made.source("mixtral")
    one = Layers({1: mergers(source)[1]})
    figures = save(source, one, None, PROVENANCE, to=tmp_path / "one").figures
    assert figures["experts"] == {"0": [8, 8], "1": [8, 5]}
    first = Checkpoint.open(str(tmp_path / "one"))
    assert torch.equal(logits(load(first.path)), stream(first.path))
    save(first, Layers({0: mergers(first)[0]}), None, PROVENANCE, to=tmp_path / "both")
    both = Checkpoint.open(str(tmp_path / "both"))
    assert both.entries == Checkpoint.open(str(made.saved("mixtral")[0])).entries
    with pytest.raises(FormatError, match="layer 1 is merged or packed there already, and nothing replaces it; to exp"):
        save(first, Layers({0: mergers(first)[0]}), None, PROVENANCE, to=tmp_path / "x", export="expanded")


def test_what_has_no_form_is_refused(made, tmp_path):
    source = made.source("mixtral")
    value, packed = mergers(source)[0], hybrids(source)[0]
    experts = {"gate_up": value.gate_up, "down": value.down}

    def refuse(value, message, kind=FormatError, source=source, **options):
        with pytest.raises(kind, match=message):
            save(source, Layers({0: value}), None, PROVENANCE, to=tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())

    refuse(packed, "packed experts have no form that stock readers know", export="expanded")
    refuse(Reduced(**experts), "layer 0: 5 experts with no route come in place of those of 8 router outputs")
    refuse(Reduced(**experts, route=torch.tensor([0, 1, 2, 3, 4])), "a route of 5 entries onto 5 come in place")
    refuse(Reduced(**experts, route=torch.tensor([0, 1, 2, 3, 3, 3, 3, 3])), "a route of 8 entries onto 4 come in")
    wide = {name: tensor.float() for name, tensor in experts.items()}
    refuse(Reduced(**wide, route=value.route), "merged experts are torch.float32, the source's torch.bfloat16")
    refuse(
        value,
        "the experts of layer 0 are packed, and no others can take their place",
        CheckpointError,
        Checkpoint.open(str(made.saved("mixtral", "hybrid")[0])),
    )


@pytest.mark.parametrize("kind", ["merged", "hybrid"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: e["0"].update(route=[0, 1, 2, 3, 4, 0]),
            r"layers\.0\.route has 6 entries, the router 8 outputs; they",
        ),
        (lambda e: e.update({"7": e.pop("0")}), "MixtralForCausalLM has no experts in layer 7, of which config.json"),
    ],
)
def test_our_reader_checks_the_entry(made, tmp_path, kind, change, message):
    out = tmp_path / "out"
    out.mkdir()
    for path in made.saved("mixtral", kind)[0].iterdir():
        (out / path.name).symlink_to(path)
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"]["layers"])
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(str(out)).layers()
