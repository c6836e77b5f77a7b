"""What a report.json holds, field by field: the definition that docs, readers and tests go by.

`moefold schema report` prints it as a JSON schema. Readers take fields that they do not know: a field may be added
without a new version, and may be missing from a report of before.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moefold.artifact import Json

VERSION = 2
"""Of the report's schema; raised when a field changes its meaning, and not when one is added."""

T = TypeVar("T")
At = dict[str, T]
"""By the number of a decoder layer, or under `all`."""
Steps = dict[str, At[T]]
"""By the id of a step of the pipeline, then `At`."""
Interval = tuple[float, float] | None
"""The ends of a 95 % confidence interval; null where fewer than two samples are known."""
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]


class Part(BaseModel):
    """An object of the report."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, populate_by_name=True)


class Bytes(Part):
    """What the same tensors take."""

    before: int
    after: int


class StepOfPipeline(Part):
    """One stage of the resolved pipeline."""

    id: str
    uses: str
    options: Annotated[dict[str, Json], Field(alias="with")]
    """Every option, defaults among them."""
    needs: dict[str, str | list[str]] = {}
    """The steps that its inputs are taken from."""


class ResolvedPipeline(Part):
    """The pipeline with nothing left to defaults: as YAML it loads to the same pipeline."""

    model: str | dict[str, str]
    stages: list[StepOfPipeline]


class Model(Part):
    """The uncompressed model."""

    name: str
    fingerprint: str | None
    """Digest of config.json and of every shard's header, size and modification time (--strict: contents)."""
    expert_weights: int | None
    """Weights of all routed experts; null where nothing was saved."""


class MethodStep(Part):
    """One step of a method, with the options that are not the defaults."""

    id: str
    uses: str
    options: Annotated[dict[str, Json], Field(alias="with")]


class Method(Part):
    """How a saved checkpoint was made; all but `steps` are ids of steps."""

    steps: list[MethodStep]
    through: list[str]
    """The compressed experts through which later layers were calibrated."""
    own: list[str]
    calibration: list[str]
    texts: list[str]
    """What was calibrated on."""
    metrics: list[str]
    baselines: list[str]


class Text(Part):
    """A tokenised text."""

    name: str
    samples: int
    length: int
    """Tokens in a sample."""
    bytes: int | None = None
    """Of the text in UTF-8."""
    digest: str
    sources: list[dict[str, Json]] = []
    """What it was made of: `samples` that were found of those `wanted`."""


class Activity(Part):
    """What a layer's experts saw in calibration."""

    tokens: list[int]
    """Routed to each expert."""
    activation: list[float] = []
    """Root mean square length of each expert's hidden activations."""
    total: int
    """Tokens that entered the layer."""
    minimum: int
    """Tokens with which an expert has statistics of its own."""
    starved: list[int]
    """Experts that saw fewer."""


class Merged(Part):
    """A layer's pairs as a merge that rounds to a format itself has left them."""

    format: str
    pairs: list[Pair]
    alone: list[int]
    """Experts left alone."""
    figures: dict[str, Json]
    """Of the merge: each expert's tokens, `damage` of the pairs, how often an expert's damping was `raised` tenfold,
    how many magnitudes were `clipped`."""


class Packed(Part):
    """A layer's pairs in a packed format."""

    format: str = ""
    pairs: list[Pair]
    dense: list[int]
    """Experts left alone."""
    counts: dict[str, int]
    """Positions by what they hold, over all pairs and matrices: weights, shared, own, other, zero, clipped, flushed."""
    pair_counts: dict[str, list[int]] = {}
    """The same of each pair; empty where all pairs were packed in one pass on a GPU."""
    settings: dict[str, Json] = {}
    """What decoding needs, by matrix."""
    route: list[int] | None = None
    """The expert that each router output means; null: its own."""
    bytes: int = 0


class Reduced(Part):
    """A layer with fewer experts."""

    groups: list[list[int]]
    """The model's own experts that each of those that remain stands for."""
    figures: dict[str, Json]
    """Of the stage that made it, such as saliency of each expert, or the fit of each group."""
    experts: int = 0
    outputs: int | None = None
    """Of the router; null: as many as experts."""
    pruned: bool | list[int] = False
    bytes: int = 0


class Quantized(Part):
    """A layer whose experts have fewer bits."""

    scheme: str
    group: int | None
    """Columns that share a scale."""
    experts: int
    route: list[int] | None
    bytes: int
    figures: dict[str, Json] = {}
    """Of the quantisation, where it works with moments: how often an expert's damping was `raised` tenfold."""


class Saved(Part):
    """A checkpoint directory, and what is in it."""

    path: str
    files: dict[str, int]
    """Bytes of each file."""
    experts: dict[str, tuple[int, int]] = {}
    """Routed experts of each layer, before and after."""
    expert_bytes: Bytes | None = None
    checkpoint_bytes: Bytes | None = None
    needs_moefold: bool = True
    """Whether loading it takes moefold, or moefold_kernels."""
    masks: dict[str, float] | None = None
    """Share of the packed positions by what they hold."""


class Baseline(Part):
    """How well the uncompressed model predicts each text."""

    losses: dict[str, float | None] = {}
    """Nats per token."""
    bytes: dict[str, int | None] = {}
    digests: dict[str, str] = {}


class Metrics(Part):
    """A table that a stage measured; a plugin's has columns of its own."""

    title: str
    rows: list[dict[str, Json]]


class Took(Part):
    """What a step took: in this run, and (`stored_...`) whenever its results were made."""

    tasks: int
    to_run: int
    ran: int
    seconds: float
    peak_bytes: int
    peak_device_bytes: int
    stored_seconds: float
    stored_peak_bytes: int
    stored_peak_device_bytes: int


class Chosen(Part):
    """Which experts of a layer go together."""

    members: list[list[int]]
    alone: list[int]


class PlannedLayer(Part):
    """What a plan says of a layer."""

    format: str | None
    """Null where nothing merges."""
    pairs: list[Pair]
    alone: list[int]
    damage: list[float | None]
    """Predicted for each pair: squared error relative to what the layer gives."""


class Planned(Part):
    """A plan over all layers."""

    layers: dict[str, PlannedLayer]
    budget: dict[str, Json]
    """What was asked, the bytes that this is, expert bytes before and after, the formats to choose from, all layers'
    damage, and what it would have been with all formats."""
    protected: dict[str, list[int]]
    """Experts of each layer that were not to be merged."""


class PredictedLayer(Part):
    """What a layer was foretold to lose, and what was measured: errors of its output relative to its length."""

    format: str | None
    pairs: int
    alone: int
    predicted: float | None
    """By a plan, before anything was merged."""
    expected: float | None = None
    """By the merge, on calibration tokens, when it had made up for what it could."""
    measured: float | None
    """On the evaluated text."""


class Sensitivity(Part):
    """What layers were foretold to lose, and whether that put them into the right order."""

    planned: bool = True
    """Whether a plan decided what merges."""
    layers: dict[str, PredictedLayer]
    rank_correlation: float | None
    """Spearman's of `predicted`, or without a plan of `expected`, with `measured`; null: fewer than three layers are
    known, or all are alike."""


class Map(Part):
    """How alike the experts of a layer are, or what it would cost to put two together, as 256 shades."""

    metric: str
    count: int
    low: float
    """What the shade 0 stands for."""
    high: float
    """What the shade 255 stands for."""
    levels: str
    """Base64 of count × count bytes, row by row; the diagonal is 255."""
    scale: Literal["linear", "log10"] = "linear"
    """Whether shades stand for the values, or for their logarithms."""
    better: Literal["more", "less"] = "more"
    """Which values speak for putting two experts together."""


class Event(Part):
    """A start or an end of a run of this very plan in this work directory."""

    when: str
    event: Literal["started", "failed", "finished"]
    to_run: dict[str, int] | None = None
    """Of a start: tasks by step that were not stored."""
    tasks: int | None = None
    why: str | None = None
    """Of a failure."""


class LostOn(Part):
    """What a checkpoint lost on one text."""

    text: str
    tokens: int
    samples: int | None
    loss_before: float | None
    """Nats per token; null: not a number."""
    loss_after: float | None
    loss_increase: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    loss_before_interval: Interval
    loss_after_interval: Interval
    loss_increase_interval: Interval
    """Of the differences on the same samples."""
    recovery: float | None
    """Perplexity before / after."""
    gate: float | None
    """The largest increase with which the run passes; null: none was stated."""
    passed: bool | None
    random_increase: float | None
    """That of the run's random baseline at equal bytes; null: it has none."""
    beyond_random: float | None
    """The share of the random baseline's increase that the method avoids."""


class Verdict(Part):
    """What a saved checkpoint comes to."""

    path: str
    random: bool
    """Whether it is a random baseline."""
    expert_bytes: Bytes | None
    checkpoint_bytes: Bytes | None
    passed: bool | None
    """Null: no gate was stated."""
    texts: list[LostOn]


class Report(Part):
    """Everything that moefold tells of a run."""

    version: Literal[2]
    """Of this schema."""
    pipeline: ResolvedPipeline
    source: str
    """Where the pipeline was read from."""
    model: Model
    methods: dict[str, Method]
    """By the step of each saved checkpoint: how it was made."""
    device: str
    """cpu or cuda."""
    machine: str = ""
    """The GPU's name, or the processor's kind."""
    versions: dict[str, str | None]
    """Of moefold, libraries, Python; null: not installed."""
    texts: Steps[Text]
    activity: Steps[Activity]
    merged: Steps[Merged] = {}
    packed: Steps[Packed]
    reduced: Steps[Reduced]
    quantized: Steps[Quantized] = {}
    saved: Steps[Saved]
    baselines: Steps[Baseline]
    metrics: Steps[Metrics]
    stages: dict[str, Took]
    """By step."""
    stage_versions: dict[str, int] = {}
    """By the name of the stage."""
    groups: Steps[Chosen] = {}
    plans: Steps[Planned] = {}
    sensitivity: dict[str, Sensitivity] = {}
    """By the step of each saved checkpoint that a plan decided."""
    similarity: Steps[Map] = {}
    """Not in the copy that lies in a saved checkpoint."""
    tasks: Steps[tuple[float, int, int]] = {}
    """Seconds, peak bytes of the host, peak bytes of the device."""
    events: list[Event] = []
    verdicts: dict[str, Verdict]
    """By the step of each saved checkpoint."""
    warnings: list[str]
    """Sentences."""


def problems(report: Json) -> list[str]:
    """What of a report does not follow the schema, each as `place: what`; none for a good one."""
    try:
        Report.model_validate(report)
    except ValidationError as error:
        return [f"{'.'.join(map(str, found['loc'])) or 'report'}: {found['msg']}" for found in error.errors()]
    return []


def json_schema() -> dict[str, Any]:
    """The definition as a JSON schema (draft 2020-12)."""
    made = Report.model_json_schema(by_alias=True)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"moefold report, version {VERSION}"}
    return head | {key: value for key, value in made.items() if key != "title"}
