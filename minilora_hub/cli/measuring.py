"""What `minilora eval` measures, in one form: the built-in tasks, lm-eval's, or labelled rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.cli.options import say
from minilora_hub.progress_display import ProgressDisplay

if TYPE_CHECKING:
    from minilora_hub.adapter_folder.results import Evaluation, Results
    from minilora_hub.evaluation.classification import Classified
    from minilora_hub.evaluation.run import Progress
    from minilora_hub.evaluation.settings import Adapter


@dataclass(frozen=True)
class Measured:
    """The results of the built-in tasks or of lm-eval's tasks.

    Attributes:
        models: display name, adapter (None for the base) and results of each model.
        results: returns an adapter's results.json with its results.
        document: all results as JSON data.
        summary: a line to print below the table.
    """

    models: list[tuple[str, Adapter | None, tuple[Evaluation, ...]]]
    results: Callable[[Adapter], Results]
    document: dict[str, Any]
    summary: str = ""


def measure_tasks(adapters: list[str], task: list[str] | None, fresh: bool, as_json: bool, **settings: Any) -> Measured:
    """Measure the built-in tasks, `task` or all, anew where `fresh`. `settings`: of `evaluation.run.evaluate`."""
    from minilora_hub.evaluation.outputs import as_dict
    from minilora_hub.evaluation.report import evaluations, updated_results
    from minilora_hub.evaluation.run import evaluate

    shown = _Progress(not as_json)
    try:
        report = evaluate(adapters, tasks=task or None, cache=not fresh, progress=say, on_progress=shown, **settings)
    finally:
        shown.close()
    by_adapter = {model.adapter.name: model for model in report.models if model.adapter}
    return Measured(
        [(model.name, model.adapter, evaluations(report, model)) for model in report.models],
        lambda adapter: updated_results(report, by_adapter[adapter.name]),
        as_dict(report),
        f"{report.seconds:.0f} s, {report.computed:,} rows computed",
    )


def measure_lm_eval(adapters: list[str], tasks: list[str], include_path: Path | None, **settings: Any) -> Measured:
    """Measure tasks of lm-eval. `settings`: of `evaluation.lm_eval_tasks.measure`."""
    from minilora_hub.evaluation.lm_eval_tasks import measure
    from minilora_hub.evaluation.report import known_results, with_numbers

    report = measure(adapters, tasks, include_path=include_path, progress=say, **settings)
    models = [(adapter.name if adapter else "base", adapter, rows) for adapter, rows in report.models]
    numbers = {name: rows for name, _, rows in models}

    def results(adapter: Adapter) -> Results:
        before = known_results(adapter, report.base, report.fingerprint, report.base_parameters)
        return with_numbers(before, numbers[adapter.name])

    document = {"models": [{"name": name, "numbers": [asdict(row) for row in rows]} for name, _, rows in models]}
    return Measured(models, results, document)


def measure_rows(adapters: list[str], data: list[str], **settings: Any) -> Measured:
    """Measure labelled rows. `settings`: of `evaluation.classification.measure`."""
    import dataclasses

    from minilora_hub.evaluation.classification import measure
    from minilora_hub.evaluation.report import known_results, with_numbers

    report = measure(adapters, data, progress=say, **settings)
    models: list[tuple[str, Adapter | None, tuple[Evaluation, ...]]] = []
    for one in report.models:
        name = "base" if one.majority is None else f"always {one.majority!r}"
        beside = tuple(
            dataclasses.replace(row, value=row.base_value or 0.0, interval=row.base_interval, parts=())
            for row in one.rows
        )
        models += [(name, None, beside)] * (not models) + [(one.adapter.name, one.adapter, one.rows)]
    numbers = {one.adapter.name: one.rows for one in report.models}

    def results(adapter: Adapter) -> Results:
        before = known_results(adapter, report.base, report.fingerprint, report.base_parameters)
        return with_numbers(before, numbers[adapter.name])

    document = {
        "models": [
            {
                "name": one.adapter.name,
                "labels": one.labels,
                "confusion": one.confusion(),
                "numbers": [asdict(row) for row in one.rows],
            }
            for one in report.models
        ]
    }
    return Measured(models, results, document, "\n".join(_confusion(one) for one in report.models))


def _confusion(one: Classified) -> str:
    """Return the confusion of labels as lines: what each label was taken for."""
    lines = [f"{one.adapter.name}: label, and what it was taken for"]
    for label, row in zip(one.labels, one.confusion(), strict=True):
        taken = ", ".join(f"{name} {count}" for name, count in zip(one.labels, row, strict=True) if count)
        lines.append(f"  {label}: {taken or 'not in the rows'}")
    return "\n".join(lines)


class _Progress:
    """Shows rows, rows computed per second, and the current model and task."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._display: ProgressDisplay | None = None

    def __call__(self, progress: Progress) -> None:
        if self._display is None:
            total = {"total": progress.total, "done": progress.done}
            self._display = ProgressDisplay("Measuring", "row", shown=self._shown, **total)
            self._started, self._computed = time.perf_counter(), progress.computed
        seconds = max(time.perf_counter() - self._started, 1e-9)
        rate = (progress.computed - self._computed) / seconds
        self._display.update(progress.done, f"{rate:.1f} rows/s  {progress.what}")

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._display:
            self._display.close()
