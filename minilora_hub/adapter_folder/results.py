"""The schema of `results.json` (what was measured) and `verification.json` (how to prove that a copy works).

Both lie in every published repo. `results.json` is the one source of every number on a card; a field that nobody knows
is None, and the card says "unknown". `verification.json` holds what a model built from these files must compute. The
fields and types below are the whole schema; how they are read and written is in `json_documents`. Nothing here loads
torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from minilora_hub.documents import Document, Require, Scalar

RESULTS_FILE = "results.json"
VERIFICATION_FILE = "verification.json"
METHODS = ("mixlora", "dora", "lora")
TOP_LOGITS = 32

Interval = tuple[float, float]


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

    id: str
    revision: str | None = None
    fingerprint: str | None = None
    parameters: int | None = None
    license: str | None = None
    note: str | None = None

    def _check(self, require: Require) -> None:
        require(bool(self.id.strip()), "id", "the base's id on the Hub")
        require(self.parameters is None or self.parameters > 0, "parameters", "a number above 0, or null")


@dataclass(frozen=True)
class DataSource:
    """Data the adapter was trained on: its name, what it is, and how much of it."""

    name: str
    description: str | None = None
    items: int | None = None
    tokens: int | None = None
    license: str | None = None

    def _check(self, require: Require) -> None:
        for size in ("items", "tokens"):
            value = getattr(self, size)
            require(value is None or value >= 0, size, "a number of at least 0, or null")


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
    """

    data: tuple[DataSource, ...] = ()
    hyperparameters: dict[str, Scalar] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    hardware: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)
    loss: tuple[tuple[int, float], ...] = ()

    def _check(self, require: Require) -> None:
        require(self.steps is None or self.steps >= 0, "steps", "a number of at least 0, or null")
        require(self.seconds is None or self.seconds >= 0, "seconds", "a number of at least 0, or null")
        steps = [step for step, _ in self.loss]
        require(steps == sorted(set(steps)), "loss", "[step, loss] pairs with increasing steps")


@dataclass(frozen=True)
class Part:
    """The same number on a part of the items, e.g. those of one difficulty."""

    name: str
    n: int
    value: float
    interval: Interval | None = None
    base_value: float | None = None
    few_shot_value: float | None = None

    def _check(self, require: Require) -> None:
        require(self.n > 0, "n", "a number of items above 0")
        require(_around(self.interval, self.value), "interval", f"[low, high] around value={self.value}, or null")


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
    n: int | None = None
    interval: Interval | None = None
    command: str | None = None
    dataset: str | None = None
    benchmark_task: str | None = None
    note: str | None = None
    lower_is_better: bool = False
    base_interval: Interval | None = None
    few_shot: int | None = None
    few_shot_value: float | None = None
    few_shot_interval: Interval | None = None
    parts: tuple[Part, ...] = ()

    def _check(self, require: Require) -> None:
        require(self.n is None or self.n > 0, "n", "a number of items above 0, or null")
        for prefix in ("", "base_", "few_shot_"):
            value, interval = getattr(self, f"{prefix}value"), getattr(self, f"{prefix}interval")
            around = f"[low, high] around {prefix}value={value}, or null"
            require(_around(interval, value), f"{prefix}interval", around)
        shown = self.few_shot_value is None or (self.few_shot or 0) > 0
        require(shown, "few_shot", "a number of examples above 0 where few_shot_value is given")
        named = self.benchmark_task is None or self.dataset is not None
        require(named, "benchmark_task", "null where dataset is null")


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
    tokens: int
    load: tuple[tuple[float, ...], ...]
    entropy: tuple[float, ...]

    def _check(self, require: Require) -> None:
        require(self.tokens > 0, "tokens", "a number above 0")
        _check_load(self.load, "load", require)
        require(len(self.entropy) == len(self.load), "entropy", "as many entries as load")
        require(all(0 <= value <= 1 for value in self.entropy), "entropy", "numbers from 0 to 1")


def _check_load(load: tuple[tuple[float, ...], ...] | None, name: str, require: Require) -> None:
    for layer, shares in enumerate(load or ()):
        whole = len(shares) > 0 and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-2
        require(whole, f"{name}[{layer}]", "shares of at least 0 that sum to 1")


def _around(interval: Interval | None, value: float | None) -> bool:
    return interval is None or (value is not None and interval[0] <= value <= interval[1])


@dataclass(frozen=True)
class Sample:
    """A prompt and the two answers, as they came."""

    prompt: str
    base: str
    adapter: str

    def _check(self, require: Require) -> None:
        require(bool(self.prompt), "prompt", "the text that was asked")


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
    VERSION: ClassVar[int] = 2

    method: str
    base: Base
    parameters: int | None = None
    share: float | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    training: Training | None = None
    evaluation: tuple[Evaluation, ...] = ()
    samples: tuple[Sample, ...] = ()
    decoding: str | None = None
    expert_load: tuple[tuple[float, ...], ...] | None = None
    router: tuple[RouterUse, ...] = ()
    schema_version: int = VERSION

    def _check(self, require: Require) -> None:
        require(self.schema_version == self.VERSION, "schema_version", f"must be 1 to {self.VERSION}")
        require(self.method in METHODS, "method", f"one of {METHODS}")
        require(self.parameters is None or self.parameters > 0, "parameters", "a number above 0, or null")
        require(self.share is None or self.share > 0, "share", "a number above 0, or null")
        _check_load(self.expert_load, "expert_load", require)


@dataclass(frozen=True)
class Verification(Document):
    """What a model built from the repo's files must compute, and what those files are.

    Attributes:
        prompts: token ids, a list a prompt.
        top_tokens: per prompt, the tokens with the 32 largest logits at the last position, the largest first.
        top_logits: their logits.
        tolerance: by how much a logit may differ.
        sha256: path in the repo -> hex digest: the weights, every code file, and whatever else loading reads.
        libraries: package -> version, of the process that recorded this.
        base_fingerprint: of the base it was recorded on.
        dtype: in which the logits were computed, e.g. ``"float32"``.
    """

    FILE: ClassVar[str] = VERIFICATION_FILE
    VERSION: ClassVar[int] = 1

    prompts: tuple[tuple[int, ...], ...]
    top_tokens: tuple[tuple[int, ...], ...]
    top_logits: tuple[tuple[float, ...], ...]
    tolerance: float
    sha256: dict[str, str]
    base_fingerprint: str
    dtype: str
    libraries: dict[str, str] = field(default_factory=dict)
    schema_version: int = VERSION

    def _check(self, require: Require) -> None:
        require(self.schema_version == self.VERSION, "schema_version", f"must be {self.VERSION}")
        require(bool(self.prompts) and all(self.prompts), "prompts", "at least one prompt, none of them empty")
        require(self.tolerance > 0, "tolerance", "a number above 0")
        for name in ("top_tokens", "top_logits"):
            rows = getattr(self, name)
            fits = len(rows) == len(self.prompts) and all(0 < len(row) <= TOP_LOGITS for row in rows)
            require(fits, name, f"for each of {len(self.prompts)} prompts 1 to {TOP_LOGITS} entries")
        same = [len(row) for row in self.top_tokens] == [len(row) for row in self.top_logits]
        require(same, "top_logits", "as many entries as top_tokens")
        for path, digest in self.sha256.items():
            require(re.fullmatch(r"[0-9a-f]{64}", digest) is not None, f"sha256[{path!r}]", "64 hexadecimal digits")
