"""One measurement: the base, as it is and with examples, and adapters on it, over one loaded base.

    report = evaluate(["./my-adapter", "author/other"], tasks=["dates"], count=100)
    report.models[0].scores["dates"].exact        # a number for each item

Batches are made of one model's rows on one task, sorted by length; what they hold depends on the task's items and the
settings only. So an adapter gets the same answers whether it is measured alone or beside others, and after a stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minilora_hub.bases.loading import load_base, load_tokenizer
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.engine import context_length
from minilora_hub.compare.prompting import Prompting, Promptings
from minilora_hub.evaluation.answer_cache import AnswerCache, default_folder
from minilora_hub.evaluation.generation import RoutingSums, generate
from minilora_hub.evaluation.metrics import exact_match, json_field_f1, require_library
from minilora_hub.evaluation.perplexity import ROWS, GeneralText, negative_log_likelihoods, read_text, windows_of
from minilora_hub.evaluation.prompts import Prompts
from minilora_hub.evaluation.settings import (
    Adapter,
    Settings,
    common_base,
    find_adapters,
    find_items,
    find_tasks,
    task_of,
)
from minilora_hub.recording.recorded_base import base_inputs, why_not_reproducible

if TYPE_CHECKING:
    from minilora_hub.bases.resolving import ResolvedBase
    from minilora_hub.evaluation.tasks.items import Item, Task

MARGIN = 8
"""Tokens that an answer may have beyond the longest reference of its task and split."""

BATCH_TOKENS = 16_384
"""Prompt and answer tokens of a batch at most, whose keys and values lie in memory: 0.75 GB on SmolLM2-135M in fp32."""


@dataclass(frozen=True)
class TaskScores:
    """What one model said on one task, item by item.

    Attributes:
        answers: the texts, without white space around them.
        exact: 1 where the answer is the reference, else 0.
        f1: JSON field F1; None for a task that is no JSON.
    """

    answers: tuple[str, ...]
    exact: tuple[float, ...]
    f1: tuple[float, ...] | None


@dataclass(frozen=True)
class Model:
    """One measured model.

    Attributes:
        adapter: None for the bare base.
        few_shot: how many examples it was shown before each question.
        scores: key of the items -> what it said.
        routing: key of the items -> what its routers decided, for a MixLoRA.
        nll: per window of general text, the sum of -ln p (nats); None where that was not measured.
    """

    adapter: Adapter | None
    few_shot: int = 0
    scores: dict[str, TaskScores] = field(default_factory=dict)
    routing: dict[str, RoutingSums] = field(default_factory=dict)
    nll: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """What a table calls it."""
        if self.adapter is not None:
            return self.adapter.name
        return f"base, {self.few_shot} examples" if self.few_shot else "base"


@dataclass(frozen=True)
class Report:
    """Everything that a run has measured.

    Attributes:
        settings: how.
        base: on which base.
        fingerprint: of its weights.
        base_parameters: how many it has.
        tasks: name -> task.
        items: the items, in the order of the scores, by task, and those of the held-out format by
            `setup.held_out_key`.
        limits: key of the items -> the most tokens of an answer.
        models: the base, the base with examples if there are any, then each adapter.
        text: the general text, and how many tokens of each of its windows were predicted; None where not measured.
        seconds: wall time.
        computed: rows that were computed; the others were known.
    """

    settings: Settings
    base: ResolvedBase
    fingerprint: str
    base_parameters: int
    tasks: dict[str, Task]
    items: dict[str, tuple[Item, ...]]
    limits: dict[str, int]
    models: tuple[Model, ...]
    text: tuple[GeneralText, tuple[int, ...]] | None
    seconds: float
    computed: int


@dataclass(frozen=True)
class Progress:
    """How far a run is: rows (answers, and windows of text) done and in all, and how many of them were computed."""

    done: int
    total: int
    computed: int
    what: str = ""


def evaluate(
    adapters: Sequence[str | Path] = (),
    *,
    base: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    cache: Path | bool | None = True,
    progress: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **settings: Any,
) -> Report:
    """Measure adapters and their base.

    Args:
        adapters: folders or Hub ids, all on one base.
        base: that base: ``"embedded"``, a folder or a Hub id. Default: the one the adapters name.
        tasks: names of tasks. Default: all.
        cache: folder of what was computed before. True: the user's; False or None: nothing is kept or looked up.
        progress: called with a line at each step of loading.
        on_progress: called after each batch.
        **settings: the other fields of `Settings`.

    Raises:
        MiniLoraError: the base or an adapter cannot be found or read, does not fit, or computes NaN; a library is
            missing.
        ValueError: a setting is out of range, or a task has no items; nothing is loaded then.
    """
    if tasks is None:
        from minilora_hub.evaluation.tasks.registry import TASKS

        tasks = tuple(TASKS)
    asked = Settings(tasks=tuple(tasks), **settings)
    require_library()
    found_tasks = find_tasks(asked)
    found = find_adapters(adapters)
    resolved, fingerprint = common_base(base, found)
    folder = default_folder() if cache is True else cache or None
    run = _Run(asked, found_tasks, found, resolved, fingerprint, folder, progress, on_progress)
    return run.execute()


class _Run:
    def __init__(
        self,
        settings: Settings,
        tasks: dict[str, Task],
        adapters: tuple[Adapter, ...],
        base: ResolvedBase,
        fingerprint: str,
        cache: Path | None,
        progress: Callable[[str], None],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._settings, self._tasks, self._adapters = settings, tasks, adapters
        self._base, self._fingerprint = base, fingerprint
        # Kept only where everything that determines the base's answers is in the key.
        self._cache = None if why_not_reproducible(base, fingerprint) else cache
        self._base_inputs = base_inputs(base, fingerprint)
        self._say, self._on_progress = progress, on_progress
        self._items = find_items(tasks, settings)
        self._text: GeneralText | None = None
        if settings.perplexity:
            self._text = read_text(settings.text)
        self._done = self._computed = self._total = 0

    def execute(self) -> Report:
        started = time.perf_counter()
        settings = self._settings
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_base(self._base, dtype=settings.dtype, device=device, progress=self._say)
        tokenizer = load_tokenizer(self._base)
        promptings = Promptings(model, tokenizer)
        self._promptings: dict[str | None, Prompting] = {None: promptings.base}
        self._say(f"  answers end at {' '.join(promptings.base.end_names) or 'no token: at the limit only'}")
        self._prompts = Prompts(tokenizer, self._tasks, self._items, settings, context_length(model), MARGIN)
        self._bank = AdapterBank(model)
        for adapter in self._adapters:
            prompting = self._promptings[adapter.name] = promptings.of(adapter.folder)
            facts = self._bank.load(adapter.name, adapter.folder).facts
            detail = ", ".join([facts.detail, *prompting.differs_from(promptings.base)])
            self._say(f"  + {adapter.name}: {facts.kind}, {detail}")
        self._windows: list[list[int]] = []
        if self._text is not None:
            self._windows = windows_of(tokenizer, self._text)
            for window in self._windows:
                promptings.base.known(window)
        plan = [Model(None), *([Model(None, settings.few_shot)] if settings.few_shot else [])]
        plan += [Model(adapter) for adapter in self._adapters]
        # A row that cannot be asked is told before the first is computed.
        prompts = [self._prompts.of(self._items, one.few_shot, self._prompting_of(one)) for one in plan]
        measured = [one for one in plan if not one.few_shot]
        self._total = len(plan) * sum(map(len, self._items.values())) + len(measured) * len(self._windows)
        models = tuple(self._measure(one, rows, self._bank) for one, rows in zip(plan, prompts, strict=True))
        text = None
        if self._text is not None:
            text = (self._text, tuple(len(window) - 1 for window in self._windows))
        return Report(
            settings=settings,
            base=self._base,
            fingerprint=self._fingerprint,
            base_parameters=sum(parameter.numel() for parameter in model.parameters()),
            tasks=self._tasks,
            items=self._items,
            limits=self._prompts.limits,
            models=models,
            text=text,
            seconds=round(time.perf_counter() - started, 1),
            computed=self._computed,
        )

    def _prompting_of(self, model: Model) -> Prompting:
        return self._promptings[model.adapter.name if model.adapter else None]

    def _measure(self, model: Model, prompts: dict[str, list[list[int]]], bank: AdapterBank) -> Model:
        """Everything about one model."""
        adapter = model.adapter
        cache = AnswerCache(
            self._cache,
            {
                "base": self._base_inputs,
                "adapter": adapter and adapter.digest,
                "dtype": self._settings.dtype,
                "device": next(bank.model.parameters()).device.type,
            },
        )
        scores, routing = {}, {}
        with bank.use([adapter.name if adapter else None]):
            for key in self._items:
                scores[key], routing[key] = self._measure_task(model, key, prompts[key], cache)
            nll = None
            if self._windows and not model.few_shot:
                nll = tuple(self._perplexity(adapter, cache, model.name))
        known = {key: sums for key, sums in routing.items() if sums is not None}
        return Model(adapter, model.few_shot, scores, known, nll)

    def _measure_task(
        self, model: Model, key: str, prompts: list[list[int]], cache: AnswerCache
    ) -> tuple[TaskScores, RoutingSums | None]:
        name = model.adapter.name if model.adapter else None
        limit = self._prompts.limits[key]
        prompting = self._prompting_of(model)
        texts: dict[int, str] = {}
        routing: RoutingSums | None = None
        for lines in self._batches(key, prompts):
            asked = [prompts[line] for line in lines]
            place = cache.key({"prompts": asked, "limit": limit, "ends": sorted(prompting.ends)})
            value = cache.get(place)
            computed = value is None
            if value is None:
                generated = generate(self._bank, name, asked, limit, prompting.ends)
                sums = generated.routing
                value = {"tokens": generated.tokens, "routing": sums and vars(sums)}
                cache.put(place, value)
            for line, tokens in zip(lines, value["tokens"], strict=True):
                texts[line] = str(prompting.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            if value["routing"]:
                sums = RoutingSums(**value["routing"])
                routing = sums if routing is None else routing + sums
            self._advance(len(lines), computed, f"{model.name}: {key}")
        items = self._items[key]
        answers = tuple(texts[line] for line in range(len(items)))
        pairs = [(answer, item.completion) for answer, item in zip(answers, items, strict=True)]
        f1 = None
        if self._tasks[task_of(key)].kind == "json":
            f1 = tuple(json_field_f1(answer, reference) for answer, reference in pairs)
        return TaskScores(answers, tuple(exact_match(*pair) for pair in pairs), f1), routing

    def _batches(self, key: str, prompts: list[list[int]]) -> Iterator[tuple[int, ...]]:
        """Lines of the task that are computed together: of like length, so that few rows wait for others."""
        lengths = self._prompts.reference_lengths(self._items[key])
        order = sorted(range(len(prompts)), key=lambda line: (lengths[line], len(prompts[line]), line))
        while order:
            longest, count = 0, 0
            for line in order[: self._settings.batch_size]:
                longest = max(longest, len(prompts[line]) + self._prompts.limits[key])
                if count and (count + 1) * longest > BATCH_TOKENS:
                    break
                count += 1
            yield tuple(order[:count])
            order = order[count:]

    def _perplexity(self, adapter: Adapter | None, cache: AnswerCache, name: str) -> list[float]:
        sums: list[float] = []
        for start in range(0, len(self._windows), ROWS):
            windows = self._windows[start : start + ROWS]
            key = cache.key({"windows": windows})
            value = cache.get(key)
            computed = value is None
            if value is None:
                value = negative_log_likelihoods(self._bank, adapter.name if adapter else None, windows)
                cache.put(key, value)
            sums += value
            self._advance(len(windows), computed, f"{name}: general text")
        return sums

    def _advance(self, rows: int, computed: bool, what: str) -> None:
        self._done += rows
        self._computed += rows * computed
        self._on_progress(Progress(self._done, self._total, self._computed, what))
