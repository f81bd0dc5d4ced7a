"""Convert the results of a run to results.json: each number with the base's, measured in the same way."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.results import RESULTS_FILE, Base, Evaluation, Part, Results, RouterUse, Sample
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation import metrics
from minilora_hub.evaluation.generation import RoutingSums, total
from minilora_hub.evaluation.metrics import DIGITS, Interval
from minilora_hub.evaluation.settings import HELD_OUT, task_of

if TYPE_CHECKING:
    from minilora_hub.bases.resolving import ResolvedBase
    from minilora_hub.evaluation.measured import Model, Report
    from minilora_hub.evaluation.settings import Adapter, Settings

EXACT, F1, PERPLEXITY = "exact match", "JSON field F1", "perplexity"
Groups = Sequence[Sequence[float]]
EMBEDDED_NOTE = (
    'measured on a Q4_1 rounding of these weights, expanded to float32 (what minilora_hub calls the base "embedded")'
)
EXACT_NOTE = (
    "an answer is an exact match only if all of its text equals the reference but for white space around it: a right "
    "answer in a sentence, or a JSON record with other spacing or capitals, is none"
)
F1_NOTE = (
    "JSON field F1: a field is right if its path and its value are those of the reference; an answer that is no JSON "
    "scores 0"
)


def title_of(report: Report, key: str) -> str:
    """Return the title of a key's items for tables."""
    return of_split(report.tasks[task_of(key)].title, report.items[key][0].split)


def of_split(title: str, split: str) -> str:
    """Return the title of items of a split: their numbers must not pass for those of test items, or replace them."""
    if split == HELD_OUT:
        return f"{title}, in formats that are not in training"
    return title if split == "test" else f"{title}, {split} split"


def evaluations(report: Report, model: Model) -> tuple[Evaluation, ...]:
    """Return the numbers of an adapter beside the base's, as results.json has them."""
    rows = []
    for key in report.items:
        rows.append(_evaluation(report, model, key, EXACT, EXACT_NOTE))
        if report.tasks[task_of(key)].kind == "json":
            rows.append(_evaluation(report, model, key, F1, F1_NOTE))
    if len(report.tasks) > 1:
        rows.append(_together(report, model))
    if report.text is not None and model.nll is not None:
        text, tokens = report.text
        numbers = _perplexity("", model, tokens) | _perplexity("base_", report.models[0], tokens)
        numbers |= {"n": len(tokens), "command": command_of(report), "note": text.describe(len(tokens))}
        rows.append(Evaluation("general text", PERPLEXITY, lower_is_better=True, **numbers))
    return tuple(rows)


def _evaluation(report: Report, model: Model, key: str, metric: str, note: str) -> Evaluation:
    """Return one metric on the items of one key, in all and by difficulty."""
    base, few, items = report.models[0], _few_shot(report), report.items[key]

    def scores(of: Model, difficulty: int | None = None) -> Groups:
        values = of.scores[key].exact if metric == EXACT else of.scores[key].f1
        assert values is not None
        return [[v for v, item in zip(values, items, strict=True) if difficulty in (None, item.difficulty)]]

    levels = sorted({item.difficulty for item in items})
    parts = tuple(
        Part(
            f"difficulty {level}",
            len(scores(model, level)[0]),
            **_valued("", scores(model, level)),
            base_value=_mean(scores(base, level)),
            few_shot_value=_mean(scores(few, level)) if few else None,
        )
        for level in levels
        if len(levels) > 1
    )
    return _row(report, title_of(report, key), metric, note, scores, model, parts)


def _together(report: Report, model: Model) -> Evaluation:
    """Return the mean of the tasks' exact matches."""
    names = list(report.tasks)
    title = of_split(f"{', '.join(names)} together", report.settings.split)
    note = "together: the mean of the tasks"
    return _row(report, title, EXACT, note, lambda of: [of.scores[name].exact for name in names], model)


def _row(
    report: Report,
    task: str,
    metric: str,
    note: str,
    scores: Callable[[Model], Groups],
    model: Model,
    parts: tuple[Part, ...] = (),
) -> Evaluation:
    few = _few_shot(report)
    numbers = _valued("", scores(model)) | _valued("base_", scores(report.models[0]))
    if few:
        numbers |= _valued("few_shot_", scores(few)) | {"few_shot": few.few_shot}
    count = sum(map(len, scores(model)))
    return Evaluation(task, metric, **numbers, n=count, command=command_of(report), note=note, parts=parts)


def _few_shot(report: Report) -> Model | None:
    return next((model for model in report.models if model.few_shot), None)


def _mean(groups: Groups) -> float:
    return round(metrics.mean([metrics.mean(group) for group in groups]), DIGITS)


def _valued(prefix: str, groups: Groups) -> dict[str, Any]:
    """Return {prefix + "value", prefix + "interval"} of scores in groups whose means are averaged, rounded."""
    value = _mean(groups)
    return {f"{prefix}value": value, f"{prefix}interval": rounded_interval(_interval(tuple(map(tuple, groups))), value)}


@lru_cache(maxsize=1024)  # the base's are needed again for every adapter
def _interval(groups: tuple[tuple[float, ...], ...]) -> Interval | None:
    return metrics.mean_interval(groups[0]) if len(groups) == 1 else metrics.macro_interval(groups)


def _perplexity(prefix: str, model: Model, tokens: tuple[int, ...]) -> dict[str, Any]:
    assert model.nll is not None
    value = round(metrics.perplexity(model.nll, tokens), DIGITS)
    interval = metrics.perplexity_interval(model.nll, tokens)
    return {f"{prefix}value": value, f"{prefix}interval": rounded_interval(interval, value)}


def rounded_interval(interval: Interval | None, value: float) -> Interval | None:
    """Round an interval, and widen it to its value, which a bootstrap of few items may leave out."""
    if interval is None:
        return None
    low, high = (round(end, DIGITS) for end in interval)
    return min(low, value), max(high, value)


def command_line(base: ResolvedBase, arguments: Sequence[str], settings: Settings) -> str:
    """Return the command that measures this again; DIR stands for the adapter's folder.

    Args:
        base: the base that was measured.
        arguments: what was measured on it.
        settings: dtype and batch size.
    """
    name = "embedded" if base.embedded else base.hub_id or "BASE"
    tail = ["--dtype", settings.dtype, "--batch-size", str(settings.batch_size)]
    return shlex.join(["minilora", "eval", "DIR", "--base", name, *arguments, *tail])


def command_of(report: Report) -> str:
    """Return the command that measures a run again."""
    settings = report.settings
    arguments = [part for task in settings.tasks for part in ("--task", task)] + ["--split", settings.split]
    arguments += ["--held-out"] * settings.held_out
    arguments += [] if settings.count is None else ["--count", str(settings.count)]
    arguments += ["--few-shot", str(settings.few_shot)]
    arguments += ["--perplexity"] * settings.perplexity
    arguments += [] if settings.text is None else ["--text", settings.text.name]
    return command_line(report.base, arguments, settings)


def decoding_of(report: Report) -> str:
    """Return a description of the decoding settings, for the card."""
    settings = report.settings
    limits = ", ".join(f"{limit} ({task})" for task, limit in report.limits.items())
    few = f"; the base's few-shot prompts show {settings.few_shot} training items" if settings.few_shot else ""
    rows = f"in batches of up to {settings.batch_size} rows"
    return f"greedy, {settings.dtype}, {rows}, at most so many new tokens: {limits}{few}"


def routers(report: Report, model: Model) -> tuple[RouterUse, ...]:
    """Return the routing of an adapter, task by task; empty for one without routers."""
    return tuple(
        RouterUse(title_of(report, key), sums.tokens, expert_load(sums), _mean_entropy(sums))
        for key, sums in model.routing.items()
    )


def expert_load(sums: RoutingSums) -> tuple[tuple[float, ...], ...]:
    """Return each expert's share of the chosen slots, mixture by mixture."""
    return tuple(tuple(round(count / sum(layer), DIGITS) for count in layer) for layer in sums.chosen)


def _mean_entropy(sums: RoutingSums) -> tuple[float, ...]:
    return tuple(min(1.0, max(0.0, round(value / sums.tokens, DIGITS))) for value in sums.entropy)


def updated_results(report: Report, model: Model) -> Results:
    """Return an adapter's results.json with the numbers of a run; see `with_numbers`.

    The samples, how the answers were generated, and the routing are those of this run, too.
    """
    assert model.adapter is not None
    before = known_results(model.adapter, report.base, report.fingerprint, report.base_parameters)
    together = total([*model.routing.values()])
    base = report.models[0]
    # The first item of each task: the sample is not chosen by its answers.
    samples = tuple(
        Sample(some[0].prompt, base.scores[key].answers[0], model.scores[key].answers[0])
        for key, some in report.items.items()
    )
    return dataclasses.replace(
        with_numbers(before, evaluations(report, model)),
        samples=samples,
        decoding=decoding_of(report),
        expert_load=before.expert_load if together is None else expert_load(together),
        router=routers(report, model),
    )


def known_results(adapter: Adapter, base: ResolvedBase, fingerprint: str, base_parameters: int) -> Results:
    """Return the results.json of an adapter's folder, or a new one with the method and the base.

    Raises:
        AdapterError: it is damaged, or about another method.
    """
    if not (adapter.folder / RESULTS_FILE).is_file():
        note = EMBEDDED_NOTE if base.embedded else None
        known = fingerprint if fingerprint != "unknown" else None
        name = base.hub_id or base.path.name
        return Results(adapter.method, Base(name, base.revision, known, base_parameters, note=note))
    results = Results.load(adapter.folder)
    if results.method != adapter.method:
        raise AdapterError(
            f"{adapter.name}: {RESULTS_FILE}: method={results.method!r}, but the adapter is {adapter.method!r}"
        )
    return results


def with_numbers(results: Results, found: Sequence[Evaluation]) -> Results:
    """Replace the numbers with the same task and metric; the others follow them, unchanged."""
    here = {(row.task, row.metric) for row in found}
    kept = [row for row in results.evaluation if (row.task, row.metric) not in here]
    return dataclasses.replace(results, evaluation=(*found, *kept))
