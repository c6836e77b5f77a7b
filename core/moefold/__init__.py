"""moefold: compression pipelines for Mixture-of-Experts language models.

The public names: plugins import from here (and from moefold_kernels) only. Importing it also registers the packed
formats with transformers, so that `AutoModelForCausalLM.from_pretrained` loads what moefold saved.
"""

import moefold_kernels  # noqa: F401  (registers the formats with transformers)
from moefold.artifact import Artifact, Json
from moefold.artifacts import (
    Activity,
    Baseline,
    DualMask,
    Experts,
    Groups,
    MergedPair,
    Metrics,
    Paired,
    PairMerge,
    Routed,
    Similarity,
    Text,
)
from moefold.checkpoint import Checkpoint
from moefold.codec import Codec, Coded, CodedLayer
from moefold.errors import MoefoldError
from moefold.families import StreamedModel
from moefold.history import Figure
from moefold.hooks import hookimpl
from moefold.layer import ExpertNames, Layer
from moefold.magnitudes import LeveledPair, LevelLoop, Levels, LevelTable
from moefold.measuring import Benchmark, Workbench, benchmark
from moefold.merge_plan import MergePlan, PairDamage
from moefold.merged_pairs import MergedPairs
from moefold.pruned import Pruning
from moefold.quantized import Scheme
from moefold.replacements import Aligned, Packed, Quantized, Reduced, Replacement, Unpacked
from moefold.saved import Saved
from moefold.stage import Context, Layers, Previous, Provenance, Stage, stage

__version__ = "0.1.0"

__all__ = [
    "Activity",
    "Aligned",
    "Artifact",
    "Baseline",
    "Benchmark",
    "Checkpoint",
    "Codec",
    "Coded",
    "CodedLayer",
    "Context",
    "DualMask",
    "ExpertNames",
    "Experts",
    "Figure",
    "Groups",
    "Json",
    "Layer",
    "Layers",
    "LevelLoop",
    "LevelTable",
    "LeveledPair",
    "Levels",
    "MergePlan",
    "MergedPair",
    "MergedPairs",
    "Metrics",
    "MoefoldError",
    "Packed",
    "PairDamage",
    "PairMerge",
    "Paired",
    "Previous",
    "Provenance",
    "Pruning",
    "Quantized",
    "Reduced",
    "Replacement",
    "Routed",
    "Saved",
    "Scheme",
    "Similarity",
    "Stage",
    "StreamedModel",
    "Text",
    "Unpacked",
    "Workbench",
    "__version__",
    "benchmark",
    "hookimpl",
    "stage",
]
