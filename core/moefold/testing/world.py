"""A small model, and a value of every built-in kind that belongs to one of its layers: what stages are tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from moefold import Checkpoint, Layer
from moefold.artifact import Artifact
from moefold.artifacts import (
    Activity,
    Baseline,
    DualMask,
    Experts,
    Groups,
    MergedPair,
    Metrics,
    PairMerge,
    Routed,
    Similarity,
    Text,
)
from moefold.codec import pack
from moefold.errors import InputError
from moefold.hooks import Registry
from moefold.magnitudes import Levels, LevelTable
from moefold.merge_plan import MergePlan, PairDamage
from moefold.merged_pairs import MergedPairs
from moefold.quantized import Scheme
from moefold.replacements import Packed, Quantized, Reduced
from moefold.saved import Saved
from moefold.stage import Context, Provenance
from moefold_kernels import layout, reference
from moefold_kernels.layout_pairs import MAGNITUDE_BITS

T = TypeVar("T", bound=Artifact)
SAMPLES, LENGTH = 3, 64
CPU = torch.device("cpu")


class Watched(Checkpoint):
    """A checkpoint that notes which tensors were read from it."""

    @cached_property
    def read_names(self) -> set[str]:
        """Every tensor read so far."""
        return set()

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], Tensor]]:
        with super().reading() as read:

            def noting(name: str) -> Tensor:
                self.read_names.add(name)
                return read(name)

            yield noting


@dataclass(frozen=True)
class World:
    """One layer of a checkpoint, and inputs for stages made up for it: the same on every machine."""

    checkpoint: Checkpoint
    position: int = 0
    device: torch.device = CPU

    @cached_property
    def layer(self) -> Layer:
        """The layer that the values are of."""
        return self.checkpoint.layers()[self.position]

    def context(self) -> Context:
        """A fresh context; its generator always starts alike."""
        return Context(self.device, torch.Generator().manual_seed(7))

    def provenance(self) -> Provenance:
        """Of no steps at all."""
        return Provenance(str(self.checkpoint.path), "none", ())

    def every_layer(self) -> dict[int, World]:
        """The same world at each layer, by the decoder layer's number."""
        count = len(self.checkpoint.layers())
        worlds = (World(self.checkpoint, position, self.device) for position in range(count))
        return {world.layer.number: world for world in worlds}

    def make(self, kind: type[T]) -> T:
        """A value of this kind, or of one that serves for it; raises InputError for kinds that only a plugin knows."""
        for known, maker in self._makers().items():
            if issubclass(known, kind):
                return maker()  # type: ignore[return-value]  # mypy does not see that the maker makes `known`
        raise InputError(f"there is no ready-made {kind.__name__}; give one: inputs={{NAME: {kind.__name__}(...)}}")

    def can_make(self, kind: type[Artifact]) -> bool:
        """Whether `make` has one."""
        return any(issubclass(known, kind) for known in self._makers())

    def _makers(self) -> Mapping[type[Artifact], Callable[[], Artifact]]:
        return {
            Experts: self.layer.experts, Text: self._text, Routed: self._routed, Activity: self._activity,
            Similarity: self._similarity, Groups: self._groups, PairMerge: self._merge, MergedPairs: self._merged,
            Packed: self._packed, Reduced: self._reduced, Quantized: self._quantized, Baseline: self._baseline,
            Saved: self._saved, LevelTable: self._levels, PairDamage: self._damage, MergePlan: self._plan,
            Metrics: lambda: Metrics("made up", [{"row": 1}]),
        }  # fmt: skip

    @property
    def _count(self) -> int:
        return self.layer.expert_count

    def _random(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + self.position))

    def _text(self) -> Text:
        tokens = torch.arange(SAMPLES * LENGTH, dtype=torch.int32).view(SAMPLES, LENGTH) * 7 % 250
        return Text("made up", tokens, bytes=tokens.numel())

    def _routed(self) -> Routed:
        """No token is routed to the last expert, where the router has a choice: calibration is never complete."""
        hidden = self.checkpoint.config["hidden_size"]
        top_k = min(self.checkpoint.config["num_experts_per_tok"], self._count)
        scores = self._random(SAMPLES * LENGTH, self._count, seed=1)
        if self._count > top_k:
            scores[:, -1] = -torch.inf
        values, index = scores.topk(top_k, dim=1)
        tokens = self._random(SAMPLES * LENGTH, hidden, seed=2).bfloat16()
        return Routed(tokens.view(SAMPLES, LENGTH, hidden).clone(), tokens, index, values.softmax(dim=1))

    def _activity(self) -> Activity:
        experts = self.layer.experts()
        tokens = torch.arange(1, self._count + 1)
        inputs = self._random(self._count, experts.down.shape[1], seed=3).abs()
        inner = self._random(self._count, experts.inner, seed=4).abs()
        return Activity(tokens, inputs, inner, total=int(tokens.sum()), minimum=1)

    def _similarity(self) -> Similarity:
        matrix = self._random(self._count, self._count, seed=5).tanh()
        return Similarity((matrix + matrix.T) / 2, "made up")

    def _groups(self) -> Groups:
        """Pairs, so that it serves merges of pairs and of groups; of an odd count the last is alone."""
        paired = self._count - self._count % 2
        return Groups([[e, e + 1] for e in range(0, paired, 2)], list(range(paired, self._count)))

    def _merge(self) -> PairMerge:
        experts, groups, activity = self.layer.experts(), self._groups(), self._activity()
        matrices = experts.matrices()
        rule = DualMask({name: activity.norms(name) for name in matrices}, 0.4)

        def merge(matrix: str, pair: int) -> MergedPair:
            members = groups.members[pair]
            return MergedPair(*reference.merge_pair(matrices[matrix][members], rule.norms[matrix][members], 0.4))

        return PairMerge(experts, groups.members, groups.alone, merge, rule)

    def _merged(self) -> MergedPairs:
        recipe = self._merge()
        merged = {name: list(recipe.merged(name)) for name in recipe.experts.matrices()}
        magnitude = {name: torch.stack([pair.magnitude.bfloat16() for pair in pairs]) for name, pairs in merged.items()}
        flags = {
            name: MergedPairs.flag(torch.stack([p.negative for p in pairs]), torch.stack([p.keep for p in pairs]))
            for name, pairs in merged.items()
        }
        alone = {name: weights[recipe.alone] for name, weights in recipe.experts.matrices().items()}
        return MergedPairs(layout.EXPONENT, recipe.pairs, recipe.alone, magnitude, flags, alone if recipe.alone else {})

    def _packed(self) -> Packed:
        return pack(Registry.installed().codecs[layout.EXPONENT](), self._merge())

    def _reduced(self) -> Reduced:
        """Every pair as its mean."""
        own, groups = self.layer.experts(), self._groups().all()
        route = torch.empty(self._count, dtype=torch.int64)
        for number, members in enumerate(groups):
            route[members] = number
        gate_up, down = (
            torch.stack([w[m].float().mean(0) for m in groups]).to(w.dtype) for w in (own.gate_up, own.down)
        )
        return Reduced(gate_up, down, gated=own.gated, route=route, groups=groups)

    def _quantized(self) -> Quantized:
        scheme, tensors = Scheme("int8", None), dict[str, Tensor]()
        for name, weights in self.layer.experts().matrices().items():
            stored = [scheme.quantize(weight) for weight in weights]
            tensors |= {f"{name}.{end}": torch.stack([one[end] for one in stored]) for end in scheme.ends}
        return Quantized(scheme.name, None, tensors)

    def _baseline(self) -> Baseline:
        text = self._text()
        return Baseline(
            {text.name: 5.5}, {text.name: text.tokens}, {text.name: text.bytes}, {text.name: [5.5] * SAMPLES}
        )

    def _levels(self) -> LevelTable:
        magnitudes = self._random(1 << 12).abs()
        return LevelTable({str(b): list(Levels.learn(magnitudes, b).values) for b in MAGNITUDE_BITS.values()}, {})

    def _damage(self) -> PairDamage:
        damage = self._random(self._count, self._count, seed=6).abs()
        damage = (damage + damage.T).fill_diagonal_(0)
        weights = sum(matrix[0].numel() for matrix in self.layer.experts().matrices().values())
        formats = {name: damage * (1 + place) for place, name in enumerate((layout.EXPONENT, *MAGNITUDE_BITS))}
        few = {name: (bits + 3) * weights // 8 for name, bits in MAGNITUDE_BITS.items()}
        tokens, peak = torch.arange(1, self._count + 1), damage.amax(dim=1)
        return PairDamage(formats, tokens, peak, 10.0, weights, 2 * weights, {layout.EXPONENT: 2 * weights} | few)

    def _plan(self) -> MergePlan:
        """The pairs of `Groups` in every layer, in the format of `Packed`."""
        layers, sizes = {}, {}
        for number, world in self.every_layer().items():
            groups = world._groups()
            chosen = {"format": layout.EXPONENT, "pairs": groups.members, "alone": groups.alone}
            layers[str(number)] = {**chosen, "damage": [1.0] * len(groups.members)}
            sizes[str(number)] = [world._count, world._damage().weights]
        return MergePlan(layers, sizes)

    def _saved(self) -> Saved:
        """The model itself, as if a stage had written it with nothing changed."""
        return Saved.of(self.checkpoint.path, str(self.checkpoint.path), {}, leave_out=())
