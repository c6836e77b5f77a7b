"""The report of one run as a page, in reading order: verdict, layers, experts, similarity, samples, provenance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from moefold import pictures
from moefold.artifact import Json
from moefold.html import Page, badge, card, paragraph, raw, table
from moefold.inside import Inside
from moefold.inside_page import experts, layers, similarity
from moefold.provenance_page import moment, provenance
from moefold.report import size

_HOW_TO_READ = (
    "Loss in nats per token, below it the 95 % interval over samples; neighbouring samples of one text are not quite "
    "independent, so the true interval is a little wider. Recovery: perplexity before / after."
)
_BEYOND = " Beyond random: the share of the random baseline's increase, at equal bytes, that the method avoids."
_KNOWN = ("loss_after", "output_error", "same_tokens")


def page(report: Mapping[str, Json]) -> Page:
    """The page of a report; what a report does not tell (an older one, a copy from a checkpoint) is left out."""
    made = Page(f"moefold: {report['model']['name']}")
    verdicts = report.get("verdicts", {})
    made.head = _head(report)
    made.add("verdict", "Verdict", _verdict(made, report, verdicts))
    main = [step for step, one in verdicts.items() if not one["random"]] or list(verdicts)
    if main:
        inside = Inside(report, main[0])
        if len(verdicts) > 1:
            made.head += paragraph(f"Layers and experts below are of the checkpoint of the stage {main[0]}.")
        for add in (layers, experts, similarity):
            add(made, inside)
    _samples(made, report)
    provenance(made, report)
    _loading(made, report)
    return made


def _head(report: Mapping[str, Json]) -> str:
    last = next((e["when"] for e in reversed(report.get("events", ())) if e["event"] == "finished"), None)
    when = f", finished {moment(last)}" if last else ""
    device = report.get("machine") or report["device"]
    source = Path(report["source"]).name
    return paragraph(f"{source} on {device}{when}, with moefold {report['versions'].get('moefold')}.")


# -- verdict


def _verdict(made: Page, report: Mapping[str, Json], verdicts: Mapping[str, Json]) -> str:
    parts = [_checkpoint(step, one, len(verdicts) > 1) for step, one in verdicts.items()]
    if any(one["texts"] for one in verdicts.values()):
        chance = any(row["random_increase"] is not None for one in verdicts.values() for row in one["texts"])
        parts.append(paragraph(_HOW_TO_READ + (_BEYOND if chance else "")))
    if not verdicts:
        parts.append(paragraph("This run saved no checkpoint; below is what it measured."))
        losses = [
            (name, f"{loss:.4f}", f"{math.exp(loss):.3f}")
            for layers in report["baselines"].values()
            for facts in layers.values()
            for name, loss in facts["losses"].items()
        ]
        parts.append(table(("text", "loss", "perplexity"), losses))
    rows = [(step, row) for step, one in verdicts.items() for row in one["texts"]]
    if rows:
        names = [row["text"] if len(verdicts) == 1 else f"{row['text']}, {step}" for step, row in rows]
        found = pictures.increases([row for _, row in rows], names)
        caption = "Increase of the loss, with the 95 % confidence interval over samples (Student's t, paired)."
        parts.append(made.figure("increases-plot", found, caption))
    parts += _other_metrics(report)
    if report["warnings"]:
        lines = "".join(f"<li>{escape(line)}</li>" for line in report["warnings"][:12])
        more = len(report["warnings"]) - 12
        tail = f"<li>and {more} more, under Provenance</li>" if more > 0 else ""
        parts.append(f'<h3>Warnings</h3><ul class="warnings">{lines}{tail}</ul>')
    return "".join(parts)


def _checkpoint(step: str, one: Mapping[str, Json], named: bool) -> str:
    cards = []
    for name, key in (("Expert bytes", "expert_bytes"), ("Whole checkpoint", "checkpoint_bytes")):
        if sizes := one.get(key):
            ratio = sizes["after"] / sizes["before"] if sizes["before"] else math.nan
            more = f'<div class="soft">{size(sizes["before"])} → {size(sizes["after"])}</div>'
            cards.append(card(name, f"{ratio:.3f}×", more))
    for row in one["texts"]:
        span = row["loss_increase_interval"]
        half = f" <small>± {(span[1] - span[0]) / 2:.4f}</small>" if span else ""
        more = (
            f'<div class="soft">perplexity {row["perplexity_before"]:.3f} → {row["perplexity_after"]:.3f}</div>'
            f"<div>{_gate(row)}</div>"
        )
        cards.append(card(f"Loss on {row['text']}", f"{row['loss_increase']:+.4f}{half}", more))
    heading = f"<h3>{escape(step)}{' (random baseline)' if one['random'] else ''}</h3>" if named else ""
    stated = {True: ("passes its gate", "good"), False: ("misses its gate", "bad"), None: ("no gate stated", "none")}
    line = f"<p>{badge(*stated[one['passed']])}</p>"
    return f'{heading}{line}<div class="cards">{"".join(cards)}</div>{_losses(one["texts"])}'


def _gate(row: Mapping[str, Json]) -> raw:
    """Judged by the mean; says where the interval holds the gate, and another sample might have decided otherwise."""
    if row["gate"] is None:
        return raw("")
    span = row["loss_increase_interval"]
    doubt = ", within noise" if span and span[0] <= row["gate"] <= span[1] else ""
    word = "pass" if row["passed"] else "fail"
    return badge(f"{word}: at most {row['gate']:+.4f}{doubt}", "good" if row["passed"] else "bad")


def _losses(rows: list[Mapping[str, Json]]) -> str:
    columns = ["text", "tokens", "loss before", "after", "increase", "perplexity before", "after", "recovery"]
    chance = any(row["random_increase"] is not None for row in rows)
    lines = []
    for row in rows:
        line = [
            row["text"],
            raw(f"{row['tokens']:,}" + (f"<small>{row['samples']} samples</small>" if row["samples"] else "")),
            _span(row["loss_before"], row["loss_before_interval"]),
            _span(row["loss_after"], row["loss_after_interval"]),
            _span(row["loss_increase"], row["loss_increase_interval"], "+.4f"),
            _perplexity(row, "before"),
            _perplexity(row, "after"),
            f"{row['recovery']:.1%}",
        ]
        if chance:
            random, beyond = row["random_increase"], row["beyond_random"]
            line += [None if random is None else f"{random:+.4f}", None if beyond is None else f"{beyond:.1%}"]
        lines.append(line)
    return table([*columns, *(("random", "beyond random") if chance else ())], lines)


def _span(value: float, interval: list[float] | None, form: str = ".4f") -> raw:
    """A figure, and its interval below it."""
    return raw(f"{value:{form}}" + (f"<small>{interval[0]:{form}} … {interval[1]:{form}}</small>" if interval else ""))


def _perplexity(row: Mapping[str, Json], when: str) -> raw:
    span = row[f"loss_{when}_interval"]
    ends = [math.exp(min(end, 700)) for end in span] if span else None
    return _span(row[f"perplexity_{when}"], ends, ".3f")


def _other_metrics(report: Mapping[str, Json]) -> Iterator[str]:
    """Figures of a plugin (speed, benchmarks): its own table under its own title."""
    for layers_ in report["metrics"].values():
        for facts in layers_.values():
            rows = facts["rows"]
            if rows and not any(name in rows[0] for name in _KNOWN):
                cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
                yield f"<h3>{escape(facts['title'])}</h3>{table(list(rows[0]), cells)}"


# -- samples, loading


def _samples(made: Page, report: Mapping[str, Json]) -> None:
    rows = [r for step in report["metrics"].values() for f in step.values() for r in f["rows"] if "same_tokens" in r]
    if not rows:
        return
    told = paragraph("Greedy: at each step the most likely token; one that differs changes all that follow.")
    made.add("samples", "Generation samples", told + "".join(map(_sample, rows)))


def _sample(row: Mapping[str, Json]) -> str:
    sides = "".join(
        f'<div><h4>{title}</h4><pre class="wrap">{escape(row[name])}</pre></div>'
        for name, title in (("prompt", "prompt"), ("before", "uncompressed"), ("after", "compressed"))
    )
    same = f"the first {row['same_tokens']} of {row['new_tokens']} tokens are the same"
    return f'<div class="sample"><h3>{escape(row["text"])}: {same}</h3><div class="sides">{sides}</div></div>'


def _loading(made: Page, report: Mapping[str, Json]) -> None:
    parts = []
    for step, layers_ in report["saved"].items():
        for facts in layers_.values():
            if len(report["saved"]) > 1:
                random = report["verdicts"].get(step, {}).get("random")
                parts.append(f"<h3>{escape(step)}{' (random baseline)' if random else ''}</h3>")
            moefold = facts.get("needs_moefold", True)
            imports = "import moefold, transformers  # pip install moefold" if moefold else "import transformers"
            path = Path(facts["path"]).absolute()
            parts.append(
                '<pre class="load">'
                + escape(f'{imports}\n\nmodel = transformers.AutoModelForCausalLM.from_pretrained("{path}")')
                + "</pre>"
            )
    if parts:
        made.add("loading", "How to load", "".join(parts))
