"""Measure adapters and their base: the base without and with examples, and adapters on it, over one loaded base.

    report = evaluate(["./my-adapter", "author/other"], tasks=["dates"], count=100)
    report.models[0].scores["dates"].exact        # a number for each item

A batch holds rows of one model on one task, sorted by length; which ones depends on the task's items and the settings
only. So an adapter's answers are the same whether it is measured alone or beside others, and after an interruption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora_hub.bases.loading import load_base, load_tokenizer
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.engine import context_length
from minilora_hub.compare.found_adapters import common_base
from minilora_hub.compare.prompting import Prompting, Promptings
from minilora_hub.evaluation.answer_cache import AnswerCache, default_folder
from minilora_hub.evaluation.generation import RoutingSums, generate, total
from minilora_hub.evaluation.measured import Model, Report, TaskScores
from minilora_hub.evaluation.metrics import exact_match, json_field_f1, require_library
from minilora_hub.evaluation.perplexity import ROWS, negative_log_likelihoods, read_text, windows_of
from minilora_hub.evaluation.prompts import Prompts
from minilora_hub.evaluation.settings import (
    Adapter,
    Settings,
    find_adapters,
    find_items,
    find_tasks,
    require_generating,
    task_of,
)
from minilora_hub.recording.recorded_base import base_inputs, why_not_reproducible
from minilora_hub.remote_code.few_rows import plain_products

MARGIN = 8
"""Tokens that an answer may have beyond the longest reference of its task and split."""

BATCH_TOKENS = 16_384
"""Prompt and answer tokens of a batch at most, whose keys and values lie in memory: 0.75 GB on SmolLM2-135M in fp32."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run: rows (answers, and windows of text) done and in all, and how many of them were computed."""

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
        cache: folder of cached answers. True: the user's; False or None: none.
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
    folder = default_folder() if cache is True else cache or None
    return _Run(asked, adapters, base, folder, progress, on_progress).execute()


class _Run:
    def __init__(
        self,
        settings: Settings,
        adapters: Sequence[str | Path],
        base: str | Path | None,
        cache: Path | None,
        progress: Callable[[str], None],
        on_progress: Callable[[Progress], None],
    ) -> None:
        """Find everything that is measured; nothing is loaded."""
        self._settings, self._say, self._on_progress = settings, progress, on_progress
        self._tasks = find_tasks(settings)
        self._adapters = find_adapters(adapters)
        require_generating(self._adapters)
        self._base, self._fingerprint = common_base(base, self._adapters)
        # Answers are cached only where everything that determines the base's answers is in the key.
        self._cache = None if why_not_reproducible(self._base, self._fingerprint) else cache
        self._base_inputs = base_inputs(self._base, self._fingerprint)
        self._items = find_items(self._tasks, settings)
        self._text = read_text(settings.text) if settings.perplexity else None
        self._done = self._computed = self._total = 0

    def execute(self) -> Report:
        """Load the models and measure them."""
        started, settings = time.perf_counter(), self._settings
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
        self._windows = windows_of(tokenizer, self._text) if self._text else []
        for window in self._windows:
            promptings.base.known(window)
        plan = [Model(None), *[Model(None, settings.few_shot)] * (settings.few_shot > 0), *map(Model, self._adapters)]
        # All prompts are made before the first is answered, so that one that cannot be made stops the run early.
        prompts = [self._prompts.of(self._items, one.few_shot, self._prompting_of(one)) for one in plan]
        measured = sum(not one.few_shot for one in plan)
        self._total = len(plan) * sum(map(len, self._items.values())) + measured * len(self._windows)
        return Report(
            settings=settings,
            base=self._base,
            fingerprint=self._fingerprint,
            base_parameters=sum(parameter.numel() for parameter in model.parameters()),
            tasks=self._tasks,
            items=self._items,
            limits=self._prompts.limits,
            models=tuple(self._measure(one, rows) for one, rows in zip(plan, prompts, strict=True)),
            text=(self._text, tuple(len(window) - 1 for window in self._windows)) if self._text else None,
            seconds=round(time.perf_counter() - started, 1),
            computed=self._computed,
        )

    def _prompting_of(self, model: Model) -> Prompting:
        return self._promptings[model.adapter.name if model.adapter else None]

    def _measure(self, model: Model, prompts: dict[str, list[list[int]]]) -> Model:
        """Measure one model: the tasks, and the general text."""
        adapter, bank = model.adapter, self._bank
        cache = AnswerCache(
            self._cache,
            {
                "base": self._base_inputs,
                "adapter": adapter and adapter.digest,
                "dtype": self._settings.dtype,
                "device": next(bank.model.parameters()).device.type,
            },
        )
        scores, routing, nll = {}, {}, None
        # Another process may find another way of multiplying few rows fastest, and would round differently.
        with bank.use([adapter.name if adapter else None]), plain_products():
            for key in self._items:
                scores[key], sums = self._measure_task(model, key, prompts[key], cache)
                if sums is not None:
                    routing[key] = sums
            if self._windows and not model.few_shot:
                nll = tuple(self._perplexity(adapter, cache, model.name))
        return Model(adapter, model.few_shot, scores, routing, nll)

    def _measure_task(
        self, model: Model, key: str, prompts: list[list[int]], cache: AnswerCache
    ) -> tuple[TaskScores, RoutingSums | None]:
        name = model.adapter.name if model.adapter else None
        limit, prompting = self._prompts.limits[key], self._prompting_of(model)
        texts: dict[int, str] = {}
        routing: list[RoutingSums] = []
        for places in self._batches(key, prompts):
            asked = [prompts[place] for place in places]

            def answer(asked: list[list[int]] = asked) -> dict[str, Any]:
                generated = generate(self._bank, name, asked, limit, prompting.ends)
                return {"tokens": generated.tokens, "routing": generated.routing and vars(generated.routing)}

            work = {"prompts": asked, "limit": limit, "ends": sorted(prompting.ends)}
            value = self._cached(cache, work, answer, len(places), f"{model.name}: {key}")
            for place, tokens in zip(places, value["tokens"], strict=True):
                texts[place] = str(prompting.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            if value["routing"]:
                routing.append(RoutingSums(**value["routing"]))
        items = self._items[key]
        answers = tuple(texts[place] for place in range(len(items)))
        pairs = [(answer, item.completion) for answer, item in zip(answers, items, strict=True)]
        f1 = None
        if self._tasks[task_of(key)].kind == "json":
            f1 = tuple(json_field_f1(*pair) for pair in pairs)
        return TaskScores(answers, tuple(exact_match(*pair) for pair in pairs), f1), total(routing)

    def _batches(self, key: str, prompts: list[list[int]]) -> Iterator[tuple[int, ...]]:
        """Split the items of a task into batches of similar length, so that few rows wait for others."""
        lengths = self._prompts.reference_lengths(self._items[key])
        order = sorted(range(len(prompts)), key=lambda place: (lengths[place], len(prompts[place]), place))
        while order:
            longest, count = 0, 0
            for place in order[: self._settings.batch_size]:
                longest = max(longest, len(prompts[place]) + self._prompts.limits[key])
                if count and (count + 1) * longest > BATCH_TOKENS:
                    break
                count += 1
            yield tuple(order[:count])
            order = order[count:]

    def _perplexity(self, adapter: Adapter | None, cache: AnswerCache, name: str) -> list[float]:
        sums: list[float] = []
        row_of = adapter.name if adapter else None
        for start in range(0, len(self._windows), ROWS):
            windows = self._windows[start : start + ROWS]

            def measure(windows: list[list[int]] = windows) -> list[float]:
                return negative_log_likelihoods(self._bank, row_of, windows)

            sums += self._cached(cache, {"windows": windows}, measure, len(windows), f"{name}: general text")
        return sums

    def _cached(
        self, cache: AnswerCache, work: dict[str, Any], compute: Callable[[], Any], rows: int, what: str
    ) -> Any:
        """Return the cached result of `work`, or compute and cache it; report the progress either way."""
        key = cache.key(work)
        value = cache.get(key)
        computed = value is None
        if computed:
            value = compute()
            cache.put(key, value)
        self._done += rows
        self._computed += rows * computed
        self._on_progress(Progress(self._done, self._total, self._computed, what))
        return value
