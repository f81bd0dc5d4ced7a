"""The schema of `results.json`: what was measured.

It is part of every published repo, and the only source of the numbers on a card; a field that is not known is None, and
the card says "unknown". How the file is read and written is in `documents`. Torch is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field

from minilora_hub.documents import Document, Scalar, need

RESULTS_FILE = "results.json"
METHODS = {"mixlora": "MixLoRA", "dora": "DoRA", "lora": "LoRA"}
"""{method: its name in prose}."""
Text = Annotated[str, need("must not be blank", lambda text, _: bool(text.strip()))]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Shares = Annotated[
    tuple[float, ...],
    need(
        "must be shares of at least 0 that sum to 1",
        lambda shares, _: bool(shares) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-2,
    ),
]
"""Of the experts of one mixture."""
Interval = tuple[float, float]


def _around(name: str) -> Any:
    return need(
        f"must be [low, high] around {name}, or null",
        lambda interval, data: data.get(name) is not None and interval[0] <= data[name] <= interval[1],
    )


def _increasing(loss: tuple[tuple[int, float], ...], _: Any) -> bool:
    steps = [step for step, _ in loss]
    return steps == sorted(set(steps))


KNOWN_METHOD = need(f"must be one of {tuple(METHODS)}", lambda method, _: method in METHODS)
WITH_DATASET = need("must be null where dataset is null", lambda _, data: data.get("dataset") is not None)
WITH_EXAMPLES = need("needs few_shot, the number of examples, above 0", lambda _, data: bool(data.get("few_shot")))
PER_MIXTURE = need("must have as many entries as load", lambda rows, data: len(rows) == len(data.get("load", rows)))


@dataclass(frozen=True)
class Base:
    """The model the adapter was trained on.

    Attributes:
        id: its id on the Hub.
        revision: the commit.
        fingerprint: hash of its checkpoint files, ``"sha256:…"``.
        parameters: how many it has.
        license: its licence on the Hub.
        note: what a reader must know about the weights, e.g. that they are a rounding of the ones under `id`.
    """

    id: Text
    revision: str | None = None
    fingerprint: str | None = None
    parameters: Positive | None = None
    license: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class DataSource:
    """Data the adapter was trained on: its name, what it is, and how much of it."""

    name: str
    description: str | None = None
    items: Count | None = None
    tokens: Count | None = None
    license: str | None = None


@dataclass(frozen=True)
class Parent:
    """The adapter that a training continued from.

    Attributes:
        adapter: its id on the Hub, or its folder's name.
        revision: the commit; None for a folder.
        weights_sha256: hash of its weights file.
        learned: what changed: ``"all"``, ``"router"``, ``"experts"`` or ``"attention"``; the rest is the parent's.
    """

    adapter: Text
    revision: str | None = None
    weights_sha256: str | None = None
    learned: str = "all"


@dataclass(frozen=True)
class Training:
    """How the adapter was trained.

    Attributes:
        data: what it was trained on.
        hyperparameters: name -> value, as the training took them.
        steps: optimizer steps.
        seconds: wall time.
        hardware: what it ran on, without the machine's name.
        libraries: package -> version.
        loss: (step, training loss), in order.
        parent: the adapter it continued from; None where it began anew.
    """

    data: tuple[DataSource, ...] = ()
    hyperparameters: dict[str, Scalar] = field(default_factory=dict)
    steps: Count | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None
    hardware: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)
    loss: Annotated[
        tuple[tuple[int, float], ...], need("must be [step, loss] pairs with increasing steps", _increasing)
    ] = ()
    parent: Parent | None = None


@dataclass(frozen=True)
class Part:
    """The same number on a part of the items, e.g. those of one difficulty."""

    name: str
    n: Positive
    value: float
    interval: Annotated[Interval, _around("value")] | None = None
    base_value: float | None = None
    few_shot_value: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One measured number, beside the base's.

    Attributes:
        task: what was asked of the model.
        metric: how an answer counts, e.g. ``"exact match"``.
        value: the adapter's.
        base_value: the base's, measured in the same way.
        n: how many items.
        interval: (low, high) of `value`, 95%.
        command: what reproduces it.
        dataset: id on the Hub of the data, if it has one.
        benchmark_task: the task's id in `dataset`, where that is a benchmark registered on the Hub.
        note: what a reader must know to take the number rightly.
        lower_is_better: as for perplexity.
        base_interval: (low, high) of `base_value`, 95%.
        few_shot: how many examples the base was shown for `few_shot_value`.
        few_shot_value: the base's, with those examples before each question.
        few_shot_interval: (low, high) of `few_shot_value`, 95%.
        parts: the same by difficulty.
    """

    task: str
    metric: str
    value: float
    base_value: float | None = None
    n: Positive | None = None
    interval: Annotated[Interval, _around("value")] | None = None
    command: str | None = None
    dataset: str | None = None
    benchmark_task: Annotated[str, WITH_DATASET] | None = None
    note: str | None = None
    lower_is_better: bool = False
    base_interval: Annotated[Interval, _around("base_value")] | None = None
    few_shot: Count | None = None
    few_shot_value: Annotated[float, WITH_EXAMPLES] | None = None
    few_shot_interval: Annotated[Interval, _around("few_shot_value")] | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class RouterUse:
    """What the routers of a MixLoRA did on one task, over prompts and answers, without padding.

    Attributes:
        task: as in `Evaluation`.
        tokens: how many tokens were routed.
        load: per mixture, in the order of the layers, each expert's share of the chosen slots.
        entropy: per mixture, the mean over the tokens of the entropy of the router's softmax, divided by
            ln(experts): 0 is a router that is always certain, 1 one that never prefers an expert.
    """

    task: str
    tokens: Positive
    load: tuple[Shares, ...]
    entropy: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], PER_MIXTURE]


@dataclass(frozen=True)
class Sample:
    """A prompt and the two answers, as they came."""

    prompt: Annotated[str, Field(min_length=1)]
    base: str
    adapter: str


@dataclass(frozen=True)
class Results(Document):
    """What is known about an adapter.

    Attributes:
        method: ``"mixlora"``, ``"dora"`` or ``"lora"``. Rank, experts and the like are in config.json.
        base: the model it was trained on.
        parameters: values in the adapter.
        share: `parameters` over the base's.
        license: the adapter's licence, as the Hub spells it; `license_name` and `license_link` for ``"other"``.
        language: language codes.
        datasets: ids on the Hub of the data it was trained on.
        training: None where nothing is known of it.
        decoding: how the answers in `samples` and `evaluation` were generated.
        expert_load: per layer, each expert's share of the routed tokens; None where there are no experts.
        router: the same and more, task by task.
    """

    FILE: ClassVar[str] = RESULTS_FILE
    VERSION: ClassVar[int] = 3

    method: Annotated[str, KNOWN_METHOD]
    base: Base
    parameters: Positive | None = None
    share: Annotated[float, Field(gt=0)] | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    training: Training | None = None
    evaluation: tuple[Evaluation, ...] = ()
    samples: tuple[Sample, ...] = ()
    decoding: str | None = None
    expert_load: tuple[Shares, ...] | None = None
    router: tuple[RouterUse, ...] = ()
    schema_version: int = VERSION
