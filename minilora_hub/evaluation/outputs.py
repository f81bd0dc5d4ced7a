"""Write the results of a run: results.json in an adapter's folder, or one JSON file with every answer and score."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.results import RESULTS_FILE, Results
from minilora_hub.adapter_folder.verification import VERIFICATION_FILE, Verification
from minilora_hub.evaluation.report import command_of, evaluations, routers

if TYPE_CHECKING:
    from minilora_hub.evaluation.measured import Model, Report

# {name in the JSON: name of the attribute}
NUMBER = {name: name for name in ("task", "metric", "value", "interval", "n")}
PART = {name: name for name in ("name", "n", "value", "interval")}
ITEM = {"prompt": "prompt", "reference": "completion"} | {name: name for name in ("difficulty", "entity", "labels")}


def save_results(results: Results, folder: Path) -> Path:
    """Write results.json into an adapter's folder, and update its hash in verification.json.

    A verification.json with another hash than the old file's stays as it is: `minilora verify` then reports the change.
    """
    verification = Verification.load(folder) if (folder / VERIFICATION_FILE).is_file() else None
    recorded = verification.sha256.get(RESULTS_FILE) if verification else None
    known = recorded is not None and (folder / RESULTS_FILE).is_file() and recorded == _sha256(folder / RESULTS_FILE)
    path = results.save(folder)
    if verification is not None and known:
        sha256 = verification.sha256 | {RESULTS_FILE: _sha256(path)}
        dataclasses.replace(verification, sha256=sha256).save(folder)
    return path


def require_results(folder: Path) -> None:
    """Read what `save_results` will change, before anything is measured.

    Raises:
        AdapterError: a file is damaged.
    """
    for name, document in ((RESULTS_FILE, Results), (VERIFICATION_FILE, Verification)):
        if (folder / name).is_file():
            document.load(folder)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_dict(report: Report) -> dict[str, Any]:
    """Return a run as JSON."""
    base, settings, text = report.base, dataclasses.asdict(report.settings), report.text
    items = {key: [_chosen(item, ITEM) for item in some] for key, some in report.items.items()}
    return {
        "command": command_of(report),
        "settings": settings | {"text": None if report.settings.text is None else report.settings.text.name},
        "base": {
            "name": "embedded" if base.embedded else base.hub_id or base.path.name,
            "fingerprint": report.fingerprint,
        },
        "limits": report.limits,
        "items": items,
        "general_text": text and {"name": text[0].name, "sha256": text[0].sha256, "predicted_tokens": text[1]},
        "models": [_model(report, model) for model in report.models],
        "seconds": report.seconds,
        "rows_computed": report.computed,
    }


def _model(report: Report, model: Model) -> dict[str, Any]:
    adapter = model.adapter
    return {
        "name": model.name,
        "method": adapter and adapter.method,
        "adapter_sha256": adapter and adapter.digest,
        "few_shot": model.few_shot,
        "numbers": [
            _chosen(row, NUMBER) | {"parts": [_chosen(part, PART) for part in row.parts]}
            for row in evaluations(report, model)
        ],
        "router": [dataclasses.asdict(use) for use in routers(report, model)],
        "answers": {
            task: [
                {"text": text, "exact": exact, **({} if scores.f1 is None else {"f1": scores.f1[place]})}
                for place, (text, exact) in enumerate(zip(scores.answers, scores.exact, strict=True))
            ]
            for task, scores in model.scores.items()
        },
        "negative_log_likelihoods": model.nll,
    }


def _chosen(value: Any, names: dict[str, str]) -> dict[str, Any]:
    return {shown: getattr(value, name) for shown, name in names.items()}
