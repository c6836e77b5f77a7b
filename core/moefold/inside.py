"""What a report tells of each layer and each expert of one saved checkpoint, gathered from the steps behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property

from moefold.artifact import Json

Facts = Mapping[str, Mapping[str, Json]]


class Inside:
    """One saved checkpoint of a report: its layers by number, as text, as the report has them."""

    def __init__(self, report: Mapping[str, Json], step: str) -> None:
        self.report = report
        self.step = step
        self.method: Mapping[str, Json] = report["methods"][step]
        self.own: list[str] = self.method["own"]

    def _of(self, kind: str, steps: list[str] | None = None) -> Facts:
        """Facts by layer of the last of the checkpoint's own steps that makes such results; none, if none does."""
        given = self.report.get(kind, {})
        named = [step for step in (self.own if steps is None else steps) if step in given]
        return given[named[-1]] if named else {}

    @cached_property
    def activity(self) -> Facts:
        """Of the model's own experts: the activity of the most experts."""
        found = [self._of("activity", [step]) for step in [*self.method["calibration"], *self.own]]
        return max(found, key=lambda layers: max((len(f["tokens"]) for f in layers.values()), default=0), default={})

    @cached_property
    def packed(self) -> Facts:
        """Format, pairs and counts."""
        return self._of("packed")

    @cached_property
    def reduced(self) -> Facts:
        """Merged or pruned experts."""
        return self._of("reduced")

    @cached_property
    def quantized(self) -> Facts:
        """Experts of fewer bits."""
        return self._of("quantized")

    @cached_property
    def similarity(self) -> Facts:
        """What the choice was made by."""
        return self._of("similarity")

    @cached_property
    def measured(self) -> dict[str, Mapping[str, Json]]:
        """Rows of `evaluate.layers`, dense layers among them."""
        rows = [
            row
            for step in self.method["metrics"]
            for facts in self.report["metrics"].get(step, {}).values()
            for row in facts["rows"]
            if "output_error" in row
        ]
        return {str(row["layer"]): row for row in rows}

    @cached_property
    def planned(self) -> Mapping[str, Json]:
        """What a plan said of each layer, and what came of it."""
        told: Mapping[str, Json] = self.report.get("sensitivity", {}).get(self.step, {"layers": {}})["layers"]
        return told

    @cached_property
    def layers(self) -> list[str]:
        """All that something is told of, in order."""
        saved = self.report["saved"][self.step]["all"].get("experts", {})
        found = {*self.activity, *self.packed, *self.reduced, *self.quantized, *self.measured, *saved}
        return sorted(found, key=int)

    def spent(self, layer: str) -> tuple[float, int, int]:
        """Seconds, peak memory of the host and of the device, over the checkpoint's steps at a layer."""
        tasks = self.report.get("tasks", {})
        took = [
            tasks[step][layer]
            for step in (*self.method["calibration"], *self.own)
            if step in tasks and layer in tasks[step]
        ]
        return sum(t[0] for t in took), max((t[1] for t in took), default=0), max((t[2] for t in took), default=0)

    def seconds(self, most: int = 5) -> dict[str, list[float]]:
        """Seconds by step and layer, of the steps that run once a layer; the shortest of many as one."""
        tasks = self.report.get("tasks", {})
        steps = [
            step for step in (*self.method["calibration"], *self.own) if step in tasks and "all" not in tasks[step]
        ]
        found: dict[str, list[float]] = {
            step: [tasks[step].get(layer, [0.0])[0] for layer in self.layers] for step in steps
        }
        if len(found) <= most:
            return found
        longest = sorted(found, key=lambda step: -sum(found[step]))[: most - 1]
        others = [math.fsum(times) for times in zip(*(found[s] for s in found if s not in longest), strict=True)]
        return {step: found[step] for step in found if step in longest} | {"others": others}

    def format(self, layer: str) -> str | None:
        """How the layer's experts are stored; None: as they were."""
        if layer in self.quantized:
            scheme, group = self.quantized[layer]["scheme"], self.quantized[layer]["group"]
            return f"{scheme}, groups of {group}" if group else str(scheme)
        found = self.packed.get(layer, {})
        return str(found["format"]) if found.get("pairs") and found.get("format") else None

    def threshold(self) -> float | None:
        """PuzzleMoE's, which decides what mask shares to expect."""
        for stage in self.report["pipeline"].get("stages", ()):
            if stage["id"] in self.own and stage["uses"] == "puzzlemoe":
                return float(stage["with"]["threshold"])
        return None

    def experts(self) -> Iterator[dict[str, Json]]:
        """For the page: each layer with experts, a list a column, an entry an expert of the model."""
        saved = self.report["saved"][self.step]["all"].get("experts", {})
        for layer in self.layers:
            seen = self.activity.get(layer)
            before = len(seen["tokens"]) if seen else saved.get(layer, [0])[0]
            if before:
                yield self._experts(layer, before, seen)

    def _experts(self, layer: str, before: int, seen: Mapping[str, Json] | None) -> dict[str, Json]:
        merged = self._merged(layer, before)
        partner = self._partners(layer)
        kept = self.measured.get(layer, {}).get("kept")
        tokens = seen["tokens"] if seen else [None] * before
        total = sum(t or 0 for t in tokens)
        saliency = self.reduced.get(layer, {}).get("figures", {}).get("saliency")
        saliency = saliency or (seen or {}).get("activation") or [None] * before
        starved = set(seen["starved"]) if seen else set()
        flags = {
            expert: ["dead"] if tokens[expert] == 0 else ["few tokens"] if expert in starved else []
            for expert in range(before)
        }
        return {
            "number": int(layer),
            "tokens": tokens,
            "share": [None if t is None or not total else round(t * before / total, 4) for t in tokens],
            "saliency": [None if s is None else float(f"{s:.4g}") for s in saliency],
            "kept": [None if m is None or not kept else kept[m] for m in merged],
            **self._masks(layer, merged),
            "group": [self._named(layer, merged, partner, expert) for expert in range(before)],
            "groups": self._groups(layer, partner),
            "flags": {expert: told for expert, told in flags.items() if told},
            "note": self._note(layer, before, seen, flags),
        }

    def _merged(self, layer: str, before: int) -> list[int | None]:
        """The expert of the saved layer that each of the model's own became; None: pruned."""
        facts = self.reduced.get(layer)
        if not facts:
            return list(range(before))
        place = {expert: number for number, group in enumerate(facts["groups"]) for expert in group}
        return [place.get(expert) for expert in range(before)]

    def _masks(self, layer: str, merged: list[int | None]) -> dict[str, Json]:
        """For each of the model's own experts, of the expert that it became: what the positions of its pair hold.

        `shared`: three shares, of what both read, it alone, and its partner alone; `clipped`, `flushed`: positions.
        """
        shares, clipped, flushed = dict[int, Json](), dict[int, int](), dict[int, int]()
        facts = self.packed.get(layer, {})
        for number, pair in enumerate(facts.get("pairs", ())):
            for slot, expert in enumerate(pair):
                shares[expert] = self._shares(layer, number, slot)
                for name, counts in (("clipped", clipped), ("flushed", flushed)):
                    if name in (facts.get("pair_counts") or {}):
                        counts[expert] = facts["pair_counts"][name][number]
        told = (("masks", shares), ("clipped", clipped), ("flushed", flushed))
        return {name: [None if m is None else found.get(m) for m in merged] for name, found in told if found}

    def _shares(self, layer: str, number: int, slot: int) -> list[float] | None:
        """Of one slot of a pair; without counts of each pair they follow from what each of the two keeps."""
        facts = self.packed[layer]
        if counts := facts.get("pair_counts"):
            weights = counts["weights"][number]
            names = ("shared", "own", "other") if slot == 0 else ("shared", "other", "own")
            return [round(counts[name][number] / weights, 4) for name in names]
        kept = self.measured.get(layer, {}).get("kept")
        if not kept or facts.get("counts", {}).get("zero"):
            return None
        own, other = kept[facts["pairs"][number][slot]], kept[facts["pairs"][number][1 - slot]]
        return [round(own + other - 1, 4), round(1 - other, 4), round(1 - own, 4)]

    def _partners(self, layer: str) -> dict[int, int]:
        """Of each packed expert, the one that it shares words with."""
        pairs = self.packed.get(layer, {}).get("pairs", [])
        return {a: b for pair in pairs for a, b in (pair, pair[::-1])}

    def _groups(self, layer: str, partner: Mapping[int, int]) -> list[list[int]]:
        """The model's own experts that became one, or that share words; for the similarity map."""
        facts = self.reduced.get(layer)
        if facts:
            return [group for group in facts["groups"] if len(group) > 1]
        return [[a, b] for a, b in partner.items() if a < b]

    def _named(self, layer: str, merged: list[int | None], partner: Mapping[int, int], expert: int) -> str:
        number = merged[expert]
        if number is None:
            return "pruned"
        with_others = [e for e, m in enumerate(merged) if m == number and e != expert]
        parts = [f"merged with {', '.join(map(str, with_others))}"] if with_others else []
        if number in partner:
            which = "" if not self.reduced.get(layer) else "merged "
            parts.append(f"shares words with {which}{partner[number]}")
        return "; ".join(parts) or "alone"

    @staticmethod
    def _note(layer: str, before: int, seen: Mapping[str, Json] | None, flags: Mapping[int, list[str]]) -> str:
        if not seen:
            return f"Layer {layer}: {before} experts; tokens were not counted."
        dead, few = (sum(flag in told for told in flags.values()) for flag in ("dead", "few tokens"))
        return (
            f"Layer {layer}: {before} experts, {seen['total']:,} tokens entered; {dead} dead (no token), "
            f"{few} more under-sampled (fewer than {seen['minimum']} tokens)."
        )
