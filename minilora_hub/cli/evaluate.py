"""`minilora eval`: base and adapters on the tasks, as a table; the numbers go into the adapters' results.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minilora_hub.cli.options import AsJson, Debug, given, print_json, say

if TYPE_CHECKING:
    from rich.table import Table

    from minilora_hub.adapter_folder.results import Evaluation, Results
    from minilora_hub.evaluation.run import Progress
    from minilora_hub.evaluation.settings import Adapter

LINES = 20
"""How many lines of progress a run prints where there is no terminal."""

OURS = ("task", "split", "held_out", "few_shot", "perplexity", "text", "fresh")
"""Options that lm-eval's tasks do not have."""

FILE_WIDTH = 200
"""Characters of a line where the table goes into a file or a pipe."""


def eval_(
    context: typer.Context,
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER", help="Folders, or ids on the Hub, on one base.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="ID", help='"embedded", a folder or a Hub id. Default: the base the adapters name.'),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="T", help="dates, numbers, inflection or records; again for more. Default: all."
        ),
    ] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="train, validation, test or held_out.")] = "test",
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Items in formats that are not in training, too.")
    ] = False,
    count: Annotated[int | None, typer.Option(metavar="N", help="Items a task. Default: all.")] = None,
    few_shot: Annotated[
        int, typer.Option("--few-shot", metavar="K", help="Training items shown to the base; 0 for none.")
    ] = 4,
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Perplexity on general text, too.")] = False,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="That text. Default: Python's manual.")] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="float32, or bfloat16, which is quicker.")] = "float32",
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Rows of a batch at most.")] = 64,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval", metavar="T", help="A task of lm-eval's instead of ours (extra lm-eval); again for more."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="A folder with lm-eval tasks of your own.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write everything there as JSON, and leave the adapters' folders alone."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute everything anew, also what is known.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure adapters and their base on the tasks; write the numbers into each adapter's results.json."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out {str(out)!r}: must be a file in a folder that exists")
    common = {"base": base, "count": count, "dtype": dtype, "batch_size": batch_size}
    if lm_eval:
        ours = [name for name in given(context) if name in OURS]
        if ours:
            flag = "--" + ours[0].replace("_", "-")
            raise ValueError(f"{flag}: is about our own tasks: leave it out beside --lm-eval, or run it on its own")
        told = _lm_eval(adapters, lm_eval, include_path, **common)
    else:
        if include_path is not None:
            raise ValueError(f"--include-path {str(include_path)!r}: must come with --lm-eval")
        settings = {"split": split, "held_out": held_out, "few_shot": few_shot, "perplexity": perplexity, "text": text}
        told = _tasks(adapters, task, fresh, as_json, **common, **settings)
    from minilora_hub.evaluation.outputs import save_results

    written = []
    for _, adapter, _ in told.models:
        if out is None and adapter is not None and adapter.local:
            written.append(save_results(told.results(adapter), adapter.folder))
    if out is not None:
        _write_json(out, told.document)
        written.append(out)
    if as_json:
        print_json(told.document)
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(_table(told))
    for line in told.lines:
        say(line)
    for path in written:
        say(f"wrote {path}")
    fetched = [name for name, adapter, _ in told.models if adapter is not None and not adapter.local]
    if fetched and out is None:
        say(f"nothing is written for {', '.join(fetched)}, from the Hub: --out FILE keeps the numbers")


@dataclass(frozen=True)
class _Told:
    """What was measured, whoever did it.

    Attributes:
        models: name on screen, the adapter (None for the base), its numbers.
        results: an adapter's results.json with its numbers.
        document: all of it, for a script.
        lines: what else is said.
    """

    models: list[tuple[str, Adapter | None, tuple[Evaluation, ...]]]
    results: Callable[[Adapter], Results]
    document: dict[str, Any]
    lines: tuple[str, ...] = ()


def _tasks(adapters: list[str], task: list[str] | None, fresh: bool, as_json: bool, **settings: Any) -> _Told:
    from minilora_hub.evaluation.outputs import as_dict
    from minilora_hub.evaluation.report import evaluations, updated_results
    from minilora_hub.evaluation.run import evaluate

    with _Shown(not as_json) as shown:
        report = evaluate(adapters, tasks=task or None, cache=not fresh, progress=say, on_progress=shown, **settings)
    by_adapter = {model.adapter.name: model for model in report.models if model.adapter}
    return _Told(
        [(model.name, model.adapter, evaluations(report, model)) for model in report.models],
        lambda adapter: updated_results(report, by_adapter[adapter.name]),
        as_dict(report),
        (f"{report.seconds:.0f} s, {report.computed:,} rows computed",),
    )


def _lm_eval(adapters: list[str], tasks: list[str], include_path: Path | None, **settings: Any) -> _Told:
    from dataclasses import asdict

    from minilora_hub.evaluation.lm_eval_tasks import measure
    from minilora_hub.evaluation.report import known_results, with_numbers

    report = measure(adapters, tasks, include_path=include_path, progress=say, **settings)
    models = [(adapter.name if adapter else "base", adapter, rows) for adapter, rows in report.models]
    numbers = {name: rows for name, _, rows in models}

    def results(adapter: Adapter) -> Results:
        before = known_results(adapter, report.base, report.fingerprint, report.base_parameters)
        return with_numbers(before, numbers[adapter.name])

    document = {"models": [{"name": name, "numbers": [asdict(row) for row in rows]} for name, _, rows in models]}
    return _Told(models, results, document)


def _write_json(path: Path, value: Any) -> None:
    from minilora_hub.documents import write_whole

    write_whole(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def _table(told: _Told) -> Table:
    """A block for each task and metric, a line a model in it: its number with the 95% interval."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3, 0, 0))
    per_model = [(name, {(row.task, row.metric): row for row in rows}) for name, _, rows in told.models]
    for (task, metric), first in per_model[0][1].items():
        items = "" if first.n is None else f", {first.n:,} items"
        lower = ", lower is better" if first.lower_is_better else ""
        table.add_row(Text(f"{task}: {metric}{items}{lower}", style="bold"))
        for name, rows in per_model:
            row = rows.get((task, metric))
            if row is not None:
                between = "" if row.interval is None else f"{row.interval[0]:.3g} to {row.interval[1]:.3g}"
                table.add_row(Text(f"  {name}"), f"{row.value:.4g}", between)
    return table


class _Shown:
    """A bar with rows a second and the time left on a terminal, a line now and then elsewhere."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None
        self._next_line = 0

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """After each batch."""
        if not self._shown:
            return
        import time

        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        now = time.perf_counter()
        if self._bar is None and self._next_line == 0:
            self._started, self._known = now, (progress.done, progress.computed)
        seconds = max(now - self._started, 1e-9)
        rate = (progress.computed - self._known[1]) / seconds
        facts = f"{rate:.1f} rows/s" if rate else ""
        if console.is_terminal:
            if self._bar is None:
                self._bar = _bar(console)
                self._task = self._bar.add_task("", total=progress.total, facts="")
                self._bar.start()
            self._bar.update(self._task, completed=progress.done, facts=f"{facts}  {progress.what}")
        elif progress.done >= self._next_line:
            left = f"  {(progress.total - progress.done) / rate:.0f} s left" if rate else ""
            print(f"{progress.done}/{progress.total} rows  {facts}{left}  {progress.what}", file=sys.stderr)
            self._next_line = progress.done + max(1, progress.total // LINES)


def _bar(console: Any) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(TextColumn("Measuring"), *columns, TextColumn("{task.fields[facts]}"), console=console)
