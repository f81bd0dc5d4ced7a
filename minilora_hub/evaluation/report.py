"""What a run says: its numbers, each with what was measured in the same way on the base, as results.json has them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.results import RESULTS_FILE, Base, Evaluation, Part, Results, RouterUse, Sample
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation import metrics
from minilora_hub.evaluation.metrics import DIGITS, Interval
from minilora_hub.evaluation.settings import HELD_OUT, task_of

if TYPE_CHECKING:
    from minilora_hub.bases.resolving import ResolvedBase
    from minilora_hub.evaluation.generation import RoutingSums
    from minilora_hub.evaluation.run import Model, Report
    from minilora_hub.evaluation.settings import Adapter
    from minilora_hub.evaluation.tasks.items import Item

EXACT, F1, PERPLEXITY = "exact match", "JSON field F1", "perplexity"
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


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of a table: a metric on some items of one task, or of all.

    Attributes:
        task: what it is called.
        metric: how answers count.
        scores: the scores of a model, in groups whose means are averaged; None where it has none.
        note: what a reader must know.
    """

    task: str
    metric: str
    scores: Callable[[Model], Sequence[Sequence[float]] | None]
    note: str
    parts: tuple[Measure, ...] = ()


def measures(report: Report) -> list[Measure]:
    """What the run measures of each model with answers, in the order of tables."""
    found: list[Measure] = []
    for key, items in report.items.items():
        task = report.tasks[task_of(key)]
        levels = sorted({item.difficulty for item in items})
        for metric, note in [(EXACT, EXACT_NOTE), *([(F1, F1_NOTE)] if task.kind == "json" else [])]:
            parts = [
                _measure(key, f"difficulty {level}", metric, _lines(items, level), note)
                for level in levels
                if len(levels) > 1
            ]
            found.append(_measure(key, title_of(report, key), metric, range(len(items)), note, tuple(parts)))
    names = list(report.tasks)
    if len(names) > 1:

        def together(model: Model) -> list[Sequence[float]]:
            return [model.scores[name].exact for name in names]

        found.append(Measure(f"{', '.join(names)} together", EXACT, together, "together: the mean of the tasks"))
    return found


def title_of(report: Report, key: str) -> str:
    """What a key of the items is called in tables."""
    title = report.tasks[task_of(key)].title
    held_out = report.items[key][0].split == HELD_OUT
    return f"{title}, in formats that are not in training" if held_out else title


def _lines(items: Sequence[Item], difficulty: int) -> list[int]:
    return [line for line, item in enumerate(items) if item.difficulty == difficulty]


def _measure(
    key: str, title: str, metric: str, lines: Sequence[int], note: str, parts: tuple[Measure, ...] = ()
) -> Measure:
    def scores(model: Model) -> list[list[float]]:
        mine = model.scores[key]
        values = mine.exact if metric == EXACT else mine.f1
        assert values is not None
        return [[values[line] for line in lines]]

    return Measure(title, metric, scores, note, parts)


def evaluations(report: Report, model: Model) -> tuple[Evaluation, ...]:
    """The numbers of an adapter beside the base's, as results.json has them."""
    base = report.models[0]
    few = next((one for one in report.models if one.few_shot), None)
    command = command_of(report)
    rows = []
    for measure in measures(report):
        mine = measure.scores(model)
        assert mine is not None
        rows.append(
            Evaluation(
                task=measure.task,
                metric=measure.metric,
                **_valued("", mine),
                **_valued("base_", measure.scores(base)),
                n=sum(map(len, mine)),
                command=command,
                note=measure.note,
                few_shot=few.few_shot if few else None,
                **(_valued("few_shot_", measure.scores(few)) if few else {}),
                parts=tuple(_part(part, model, base, few) for part in measure.parts),
            )
        )
    if report.text is not None and model.nll is not None:
        text, tokens = report.text
        rows.append(
            Evaluation(
                task="general text",
                metric=PERPLEXITY,
                lower_is_better=True,
                **_perplexity("", model, tokens),
                **_perplexity("base_", base, tokens),
                n=len(tokens),
                command=command,
                note=text.describe(len(tokens)),
            )
        )
    return tuple(rows)


def _part(measure: Measure, model: Model, base: Model, few: Model | None) -> Part:
    mine = measure.scores(model)
    assert mine is not None
    return Part(
        measure.task,
        sum(map(len, mine)),
        **_valued("", mine),
        base_value=_valued("", measure.scores(base))["value"],
        few_shot_value=_valued("", measure.scores(few))["value"] if few else None,
    )


def _valued(prefix: str, groups: Sequence[Sequence[float]] | None) -> dict[str, Any]:
    """{prefix + "value", prefix + "interval"} of scores, rounded."""
    assert groups
    value = round(metrics.mean([metrics.mean(group) for group in groups]), DIGITS)
    interval = _interval(tuple(map(tuple, groups)))
    return {f"{prefix}value": value, f"{prefix}interval": _rounded(interval, value)}


@lru_cache(maxsize=1024)  # the base's stand beside every adapter's
def _interval(groups: tuple[tuple[float, ...], ...]) -> Interval | None:
    return metrics.mean_interval(groups[0]) if len(groups) == 1 else metrics.macro_interval(groups)


def _perplexity(prefix: str, model: Model, tokens: tuple[int, ...]) -> dict[str, Any]:
    assert model.nll is not None
    value = round(metrics.perplexity(model.nll, tokens), DIGITS)
    return {
        f"{prefix}value": value,
        f"{prefix}interval": _rounded(metrics.perplexity_interval(model.nll, tokens), value),
    }


def _rounded(interval: Interval | None, value: float) -> Interval | None:
    """To the digits that are reported; it holds the value, also where a bootstrap of few items does not."""
    if interval is None:
        return None
    low, high = (round(end, DIGITS) for end in interval)
    return min(low, value), max(high, value)


def command_of(report: Report) -> str:
    """What measures this again; DIR stands for the adapter's folder."""
    settings = report.settings
    base = "embedded" if report.base.embedded else report.base.hub_id or "BASE"
    parts = ["minilora", "eval", "DIR", "--base", base]
    for task in settings.tasks:
        parts += ["--task", task]
    parts += ["--split", settings.split]
    if settings.held_out:
        parts += ["--held-out"]
    if settings.count is not None:
        parts += ["--count", str(settings.count)]
    parts += ["--few-shot", str(settings.few_shot)]
    if settings.perplexity:
        parts += ["--perplexity"]
    if settings.text is not None:
        parts += ["--text", settings.text.name]
    parts += ["--dtype", settings.dtype, "--batch-size", str(settings.batch_size)]
    return shlex.join(parts)


def decoding_of(report: Report) -> str:
    """How the answers were generated, for the card."""
    limits = ", ".join(f"{limit} ({task})" for task, limit in report.limits.items())
    few = f"; the base's few-shot prompts show {report.settings.few_shot} training items" * bool(
        report.settings.few_shot
    )
    return (
        f"greedy, {report.settings.dtype}, in batches of up to {report.settings.batch_size} rows, at most so many new "
        f"tokens: {limits}{few}"
    )


def routers(report: Report, model: Model) -> tuple[RouterUse, ...]:
    """What an adapter's routers did, task by task; empty for one without."""
    return tuple(
        RouterUse(title_of(report, key), sums.tokens, expert_load(sums), _mean_entropy(sums))
        for key, sums in model.routing.items()
    )


def expert_load(sums: RoutingSums) -> tuple[tuple[float, ...], ...]:
    """Each expert's share of the chosen slots, mixture by mixture."""
    return tuple(tuple(round(count / sum(layer), DIGITS) for count in layer) for layer in sums.chosen)


def _mean_entropy(sums: RoutingSums) -> tuple[float, ...]:
    return tuple(min(1.0, max(0.0, round(value / sums.tokens, DIGITS))) for value in sums.entropy)


def samples(report: Report, model: Model) -> tuple[Sample, ...]:
    """The first item of each task with both answers: not chosen by what was said."""
    base = report.models[0]
    return tuple(
        Sample(some[0].prompt, base.scores[task].answers[0], model.scores[task].answers[0])
        for task, some in report.items.items()
    )


def updated_results(report: Report, model: Model) -> Results:
    """An adapter's results.json with what a run has measured; see `with_numbers`.

    The answers shown, how they were generated, and what the routers did are those of this run, too.
    """
    assert model.adapter is not None
    before = known_results(model.adapter, report.base, report.fingerprint, report.base_parameters)
    together: RoutingSums | None = None
    for sums in model.routing.values():
        together = sums if together is None else together + sums
    return dataclasses.replace(
        with_numbers(before, evaluations(report, model)),
        samples=samples(report, model),
        decoding=decoding_of(report),
        expert_load=before.expert_load if together is None else expert_load(together),
        router=routers(report, model),
    )


def known_results(adapter: Adapter, base: ResolvedBase, fingerprint: str, base_parameters: int) -> Results:
    """The results.json that lies in an adapter's folder, or where none does, what the run knows of it.

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
    """Put numbers in the place of those with the same task and metric; the others stay, after them."""
    here = {(row.task, row.metric) for row in found}
    kept = [row for row in results.evaluation if (row.task, row.metric) not in here]
    return dataclasses.replace(results, evaluation=(*found, *kept))
