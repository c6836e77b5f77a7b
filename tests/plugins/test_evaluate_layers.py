"""Layer by layer and sample by sample, against the stock models loaded whole; gates and samples of the perplexity."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from merged_layers import mergers, paired
from transformers import AutoModelForCausalLM

from models import samples, tiny
from moefold import Baseline, Checkpoint, Context, Layers, Provenance, Saved
from moefold.errors import InputError
from moefold_plugins import evaluate_speed as evaluate_speed_module
from moefold_plugins.evaluate import evaluate_baseline, evaluate_perplexity, losses
from moefold_plugins.evaluate_layers import evaluate_layers
from moefold_plugins.evaluate_samples import evaluate_samples
from moefold_plugins.evaluate_speed import evaluate_speed
from moefold_plugins.pruning import prune_random
from moefold_plugins.save import save

CONTEXT = Context(torch.device("cpu"), torch.Generator())
PROVENANCE = Provenance("org/model", "f" * 64, ())
IDS = samples(3, 20)
BASELINE = Baseline({"a": 0.0, "b": 0.0}, {"a": IDS.int(), "b": samples(2, 12).int()}, {"a": 0, "b": 0})


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    groups = {"n_group": 2, "topk_group": 1} if request.param == "deepseek_v3" else {}  # with four, none can go
    return Checkpoint.open(str(tiny(request.param, tmp_path_factory.mktemp("model"), **groups)))


def saved(source: Checkpoint, folder: Path, kind: str) -> Saved:
    """The source merged, pruned, packed, or as it was."""
    layers = source.layers()
    if kind == "merged":
        values = mergers(source)
    elif kind == "pruned":
        values = Layers({la.number: partial(prune_random.function, la, experts=4, fraction=0.5) for la in layers})
    elif kind == "packed":
        pairs = [[0, 5], [3, 1], [2, 7]]
        values = Layers({la.number: partial(lambda la: paired(la.experts(), pairs), la) for la in layers})
    else:
        values = Layers({})
    return save(source, values, None, PROVENANCE, to=folder / kind)


def rows(source: Checkpoint, made: Saved, **options) -> list[dict]:
    return evaluate_layers(source, made, BASELINE, CONTEXT, **{"samples": 3, "batch": 2} | options).rows


@torch.no_grad()
def states(model) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """What leaves each decoder layer, and what each router chose."""
    left: list[torch.Tensor] = []
    chosen: dict[int, torch.Tensor] = {}
    hooks = []
    for n, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(lambda _, __, out: left.append(out[0] if type(out) is tuple else out)))
        if hasattr(layer.mlp, "experts"):
            hook = partial(lambda n, _, args: chosen.update({n: args[1]}), n)
            hooks.append(layer.mlp.experts.register_forward_pre_hook(hook, prepend=True))
    model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return left, chosen


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)).mean())


def load(path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation="eager")


def test_an_unchanged_model_has_no_error(source, tmp_path):
    found = rows(source, saved(source, tmp_path, "same"))
    assert [row["layer"] for row in found] == [0, 1, 2]
    for row in found:
        assert row["output_error"] == row["update_error"] == row["cumulative_error"] == 0
        assert row["kept"] is None
    numbers = [layer.number for layer in source.layers()]
    assert [n for n, row in enumerate(found) if row["routing_overlap"] == 1] == numbers


def test_errors_and_routing_are_the_stock_models(source, tmp_path):
    """The layers of two models loaded whole, swapped one at a time."""
    twin = save(source, mergers(source), None, PROVENANCE, to=tmp_path / "twin", export="expanded")
    found = rows(source, twin)
    before, after = load(source.path), load(twin.path)
    (own, chosen), (theirs, other) = states(before), states(after)
    for n, row in enumerate(found):
        assert row["cumulative_error"] == pytest.approx(error(theirs[n], own[n]), rel=0.05, abs=1e-3)
        kept, before.model.layers[n] = before.model.layers[n], after.model.layers[n]
        alone = states(before)[0][n]
        before.model.layers[n] = kept
        entered = own[n - 1] if n else before.model.embed_tokens(IDS).detach()
        assert row["output_error"] == pytest.approx(error(alone, own[n]), rel=0.05, abs=1e-3)
        difference, added = (alone - own[n]).float().norm(dim=-1), (own[n] - entered).float().norm(dim=-1)
        assert row["update_error"] == pytest.approx(float((difference / added).mean()), rel=0.05, abs=1e-3)
        inverse = (1 / own[n].float().norm(dim=-1)).mean()
        assert row["inverse_length"] == pytest.approx(float(inverse), rel=0.02)
        if n in chosen:
            same = [len(set(a) & set(b)) / 2 for a, b in zip(chosen[n].tolist(), other[n].tolist(), strict=True)]
            assert row["routing_overlap"] == pytest.approx(sum(same) / len(same), abs=0.05)
    assert found[-1]["cumulative_error"] > 0.01, "there is something to measure"


def test_a_pruned_models_choices_have_the_originals_names(source, tmp_path):
    made = saved(source, tmp_path, "pruned")
    first = source.layers()[0]
    row = rows(source, made)[first.number]
    stays = prune_random(first, experts=4, fraction=0.5).groups
    names = torch.tensor([group[0] for group in stays])
    _, chosen = states(load(source.path))
    _, other = states(load(made.path))
    theirs = names[other[first.number]]
    same = (chosen[first.number][:, :, None] == theirs[:, None]).any(dim=2).double().mean()
    assert row["routing_overlap"] == pytest.approx(float(same), abs=0.02)
    assert 0 < row["routing_overlap"] < 1


def test_packed_layers_tell_what_each_expert_kept(source, tmp_path):
    made = saved(source, tmp_path, "packed")
    found = rows(source, made, samples=1)
    opened = Checkpoint.open(made.path)
    for layer in opened.layers():
        experts = layer.experts()
        kept = found[layer.number]["kept"]
        assert kept[4] == kept[6] == 1, "left alone"
        both = torch.cat([m[3].flatten() for m in experts.matrices().values()])
        assert kept[3] == pytest.approx(float((both != 0).float().mean()), abs=1e-5)
        assert 0.3 < kept[3] < 0.7


def test_the_text_is_the_first_or_the_one_named(source, tmp_path):
    made = saved(source, tmp_path, "merged")
    assert evaluate_layers(source, made, BASELINE, CONTEXT).title.endswith("on a")
    named = evaluate_layers(source, made, BASELINE, CONTEXT, text="b")
    assert named.title.endswith("on b")
    assert named.rows[-1]["cumulative_error"] != rows(source, made)[-1]["cumulative_error"]
    with pytest.raises(InputError, match="no text is called c"):
        evaluate_layers(source, made, BASELINE, CONTEXT, text="c")


def test_samples_are_greedy_and_part_where_they_part(source, tmp_path):
    options = {"prompts": 2, "length": 6, "new": 5}
    (same, *_) = evaluate_samples(source, saved(source, tmp_path, "same"), BASELINE, CONTEXT, **options).rows
    assert same["before"] == same["after"]
    assert same["same_tokens"] == same["new_tokens"] == 5
    made = saved(source, tmp_path, "merged")
    found = evaluate_samples(source, made, BASELINE, CONTEXT, **options).rows
    assert [row["text"] for row in found] == ["a", "a", "b", "b"]
    wrote = []
    for model in (load(source.path), load(made.path)):
        ids = IDS[:1, :6]
        for _ in range(5):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        wrote.append(ids[0, 6:])
    read = partial(source.tokenizer().decode, skip_special_tokens=True)
    assert (found[0]["prompt"], found[0]["before"], found[0]["after"]) == (read(IDS[0, :6]), *map(read, wrote))
    parted = next((i for i, (a, b) in enumerate(zip(*wrote, strict=True)) if a != b), 5)
    assert found[0]["same_tokens"] == parted
    with pytest.raises(InputError, match="the samples of b are shorter than a prompt of 13 tokens"):
        evaluate_samples(source, made, BASELINE, CONTEXT, prompts=1, length=13)


@pytest.mark.parametrize("kind", ["merged", "pruned", "packed"])
def test_sizes_that_the_default_implementation_refuses(tmp_path, kind):
    """Whole models are loaded with experts that run whatever their sizes, as layers by themselves do."""
    odd = Checkpoint.open(str(tiny("qwen3_moe", tmp_path / "odd", moe_intermediate_size=20)))
    made = saved(odd, tmp_path, kind)
    assert len(evaluate_samples(odd, made, BASELINE, CONTEXT, prompts=1, length=6, new=3).rows) == 2
    found = rows(odd, made, samples=1)
    assert len(found) == 3
    assert found[-1]["cumulative_error"] > 0


def test_speed_is_tokens_over_the_median_time(source, tmp_path, monkeypatch):
    """By a clock of our own: the model as it is takes 2 s, the saved one 1 s; the first round warms up."""
    steps = iter([9, 2, 5, 1, 9, 2, 2, 2, 9, 1, 1, 1, 9, 1, 3, 0.5])
    seen = [0.0]

    def clock() -> float:
        seen.append(seen[-1] + (next(steps) if len(seen) % 2 == 0 else 0))
        return seen[-1]

    monkeypatch.setattr(evaluate_speed_module, "time", SimpleNamespace(perf_counter=clock))
    made = saved(source, tmp_path, "same")
    found = evaluate_speed(source, made, BASELINE, CONTEXT, batches=[1, 5], length=4, new=3, rounds=3)
    assert found.title.startswith("speed of generation on ")
    assert [list(row.values()) for row in found.rows] == [[1, 1.5, 3.0, 2.0], [5, 7.5, 15.0, 2.0]]
    with pytest.raises(InputError, match="the samples of a have 20 tokens, and a prompt wants 21"):
        evaluate_speed(source, made, BASELINE, CONTEXT, length=21)


def test_a_gate_judges_the_mean_and_samples_are_kept(source, tmp_path):
    from moefold import Text

    made = saved(source, tmp_path, "merged")
    base = evaluate_baseline(source, (Text("a", IDS.int(), 60), Text("b", IDS[:2].int(), 40)), CONTEXT)
    assert {name: len(values) for name, values in base.samples.items()} == {"a": 3, "b": 2}
    assert base.losses["a"] == pytest.approx(sum(base.samples["a"]) / 3)
    plain = evaluate_perplexity(made, base, CONTEXT).rows
    assert all("gate" not in row for row in plain)
    increase = plain[0]["loss_increase"]
    assert sum(plain[0]["samples_after"]) / 3 - sum(plain[0]["samples_before"]) / 3 == pytest.approx(increase, abs=1e-6)
    assert plain[0]["loss_after"] == losses(Checkpoint.open(made.path), {"a": IDS}, torch.device("cpu"), 8)["a"]
    for gate, passed in ((increase + 1e-6, True), (increase - 1e-6, False)):
        first, second = evaluate_perplexity(made, base, CONTEXT, gate={"a": gate}).rows
        assert (first["gate"], first["passed"]) == (gate, passed)
        assert "passed" not in second
    with pytest.raises(InputError, match="gate: no text is called prose"):
        evaluate_perplexity(made, base, CONTEXT, gate={"prose": 0.1})
    assert math.isfinite(increase)
