"""Where a run's numbers go: into an adapter's results.json, beside what is known of it, or into a report of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minilora_hub.errors import AdapterError
from minilora_hub.evaluation.report import command_of, decoding_of, evaluations, expert_load, routers, samples
from minilora_hub.results import RESULTS_FILE, Base, Evaluation, Results

if TYPE_CHECKING:
    from minilora_hub.bases import ResolvedBase
    from minilora_hub.evaluation.generation import RoutingSums
    from minilora_hub.evaluation.run import Model, Report
    from minilora_hub.evaluation.setup import Adapter

EMBEDDED_NOTE = (
    'measured on a Q4_1 rounding of these weights, expanded to float32 (what minilora_hub calls the base "embedded")'
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


def as_dict(report: Report) -> dict[str, Any]:
    """All of a run for a script: settings, numbers, and every answer with its scores."""
    models = []
    for model in report.models:
        numbers = [
            {
                "task": row.task,
                "metric": row.metric,
                "value": row.value,
                "interval": row.interval,
                "n": row.n,
                "parts": [
                    {"name": part.name, "n": part.n, "value": part.value, "interval": part.interval}
                    for part in row.parts
                ],
            }
            for row in evaluations(report, model)
        ]
        models.append(
            {
                "name": model.name,
                "method": model.adapter.method if model.adapter else None,
                "adapter_sha256": model.adapter.digest if model.adapter else None,
                "few_shot": model.few_shot,
                "numbers": numbers,
                "router": [dataclasses.asdict(use) for use in routers(report, model)],
                "answers": {
                    task: [
                        {"text": text, "exact": exact, **({} if scores.f1 is None else {"f1": scores.f1[line]})}
                        for line, (text, exact) in enumerate(zip(scores.answers, scores.exact, strict=True))
                    ]
                    for task, scores in model.scores.items()
                },
                "negative_log_likelihoods": model.nll,
            }
        )
    settings = dataclasses.asdict(report.settings)
    return {
        "command": command_of(report),
        "settings": settings | {"text": None if report.settings.text is None else report.settings.text.name},
        "base": {
            "name": "embedded" if report.base.embedded else report.base.hub_id or report.base.path.name,
            "fingerprint": report.fingerprint,
        },
        "limits": report.limits,
        "items": {
            task: [
                {
                    "prompt": item.prompt,
                    "reference": item.completion,
                    "difficulty": item.difficulty,
                    "entity": item.entity,
                    "labels": item.labels,
                }
                for item in items
            ]
            for task, items in report.items.items()
        },
        "general_text": None
        if report.text is None
        else {"name": report.text[0].name, "sha256": report.text[0].sha256, "predicted_tokens": report.text[1]},
        "models": models,
        "seconds": report.seconds,
        "rows_computed": report.computed,
    }
