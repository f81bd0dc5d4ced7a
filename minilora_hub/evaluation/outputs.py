"""Where a run goes: results.json of an adapter's folder, or all of it for a script, every answer with its scores."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.results import RESULTS_FILE, VERIFICATION_FILE, Results, Verification
from minilora_hub.evaluation.report import command_of, evaluations, routers

if TYPE_CHECKING:
    from minilora_hub.evaluation.run import Report


def save_results(results: Results, folder: Path) -> Path:
    """Write results.json into an adapter's folder; a verification.json that knew the file before knows it after.

    One that recorded another file is left alone: something else has changed it, which `minilora verify` then tells.
    """
    verification = Verification.load(folder) if (folder / VERIFICATION_FILE).is_file() else None
    recorded = verification.sha256.get(RESULTS_FILE) if verification else None
    known = recorded is not None and (folder / RESULTS_FILE).is_file() and recorded == _sha256(folder / RESULTS_FILE)
    path = results.save(folder)
    if verification is not None and known:
        sha256 = verification.sha256 | {RESULTS_FILE: _sha256(path)}
        dataclasses.replace(verification, sha256=sha256).save(folder)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_dict(report: Report) -> dict[str, Any]:
    """A run as JSON."""
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
