"""Each stage against its formula, and all of them from YAML."""

import json
from pathlib import Path

import pytest
import torch
from moefold_ream import plugin
from moefold_ream.benchmarks import quality_ream
from moefold_ream.stages import Saliency, combine, pair_ream, saliency_reap, similarity_ream

from moefold import Experts, Groups, Routed, Similarity, Workbench
from moefold.testing import check_stage

PIPELINE = """
model: {model}
stages:
  - {{id: text, uses: text.stdlib, with: {{part: calibrate, samples: 2, length: 32}}}}
  - {{uses: forward}}
  - {{uses: observe}}
  - {{uses: saliency.reap}}
  - {{uses: similarity.ream}}
  - {{uses: pair.ream}}
  - {{uses: puzzlemoe}}
  - {{uses: pack.exponent}}
  - {{uses: save, with: {{to: {out}}}}}
"""


def test_they_are_good_stages():
    check_stage(saliency_reap)
    check_stage(similarity_ream)
    check_stage(pair_ream, inputs=lambda world: {"saliency": Saliency(torch.arange(world.layer.expert_count).double())})


def test_saliency_is_the_mean_of_gate_times_norm(moefold_world):
    world = moefold_world
    routed, experts = world.make(Routed), world.make(Experts)
    found = saliency_reap(world.layer, routed, experts, world.context()).values
    sums, counts = [0.0] * experts.count, [0] * experts.count
    for token, chosen, gates in zip(routed.tokens, routed.top_k_index, routed.top_k_weights, strict=True):
        for expert, gate in zip(chosen.tolist(), gates.tolist(), strict=True):
            sums[expert] += gate * float(world.layer.output(experts, expert, token[None]).float().norm())
            counts[expert] += 1
    assert counts[-1] == 0
    assert found.tolist() == pytest.approx([s / max(c, 1) for s, c in zip(sums, counts, strict=True)], rel=1e-2)


def test_similarity_is_half_outputs_half_router():
    outputs = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    # cosines 1, 0, 0 -> 1, 0.5, 0.5; distances sqrt 2, sqrt 2, 0 of at most sqrt 2 -> 0, 0, 1
    expected = torch.tensor([[1.0, 0.5, 0.25], [0.5, 1.0, 0.75], [0.25, 0.75, 1.0]])
    assert torch.allclose(combine(outputs, logits), expected)


def test_the_most_salient_choose_first():
    saliency = Saliency(torch.tensor([0.1, 4.0, 3.0, 0.2]))
    matrix = torch.eye(4)
    matrix[1, 0], matrix[1, 3], matrix[2, 0] = 0.9, 0.1, 0.95  # both want expert 0; 1 is asked before 2
    assert pair_ream(saliency, Similarity(matrix, "")) == Groups([[0, 1], [2, 3]], [])
    assert pair_ream(saliency, Similarity(matrix, ""), fraction=0.5) == Groups([[0, 1]], [2, 3])


def test_it_runs_from_yaml(moefold_run, moefold_model, tmp_path):
    notes = moefold_run(PIPELINE.format(model=moefold_model.path, out=tmp_path / "out"), plugins=[plugin])
    assert [len(note["facts"]["members"]) for note in notes["pair.ream"].values()] == [2, 2]
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "moefold"
    )


def test_the_benchmark_measures_bytes_and_loss(tmp_path):
    found = quality_ream.figures(Workbench(tmp_path, plugins=[plugin]))
    assert found["quality.ream / expert bytes"].value == 0.5
    assert 0 < found["quality.ream / loss increase on stdlib evaluate"].value < 1


def test_the_readmes_pipeline_is_there():
    assert "pair.ream" in (Path(__file__).parents[1] / "pipeline.yaml").read_text()
