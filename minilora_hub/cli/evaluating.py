"""`minilora eval`: base and adapters on the tasks, as a table; the numbers go into the adapters' results.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minilora_hub.cli.shared import AsJson, Debug, print_json, say

if TYPE_CHECKING:
    from rich.table import Table

    from minilora_hub.evaluation.run import Progress, Report

LINES = 20
"""How many lines of progress a run prints where there is no terminal."""

FILE_WIDTH = 200
"""Characters of a line where the table goes into a file or a pipe."""


def eval_(
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
    from minilora_hub.evaluation.report import as_dict, updated_results
    from minilora_hub.evaluation.run import evaluate

    with _Shown(not as_json) as shown:
        report = evaluate(
            adapters,
            base=base,
            tasks=task or None,
            split=split,
            held_out=held_out,
            count=count,
            few_shot=few_shot,
            perplexity=perplexity,
            text=text,
            dtype=dtype,
            batch_size=batch_size,
            cache=not fresh,
            progress=say,
            on_progress=shown,
        )
    written = []
    for model in report.models:
        if out is None and model.adapter is not None and model.adapter.local:
            written.append(updated_results(report, model).save(model.adapter.folder))
    if out is not None:
        _write_json(out, as_dict(report))
        written.append(out)
    if as_json:
        print_json(as_dict(report))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(_table(report))
    say(f"{report.seconds:.0f} s, {report.computed:,} rows computed")
    for path in written:
        say(f"wrote {path}")
    fetched = [model.name for model in report.models if model.adapter is not None and not model.adapter.local]
    if fetched and out is None:
        say(f"nothing is written for {', '.join(fetched)}, from the Hub: --out FILE keeps the numbers")


def _write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _table(report: Report) -> Table:
    """A block for each task and metric, a line a model in it: its number with the 95% interval."""
    from rich.table import Table
    from rich.text import Text

    from minilora_hub.evaluation.report import evaluations

    table = Table.grid(padding=(0, 3, 0, 0))
    names = [model.name for model in report.models]
    per_model = [{(row.task, row.metric): row for row in evaluations(report, model)} for model in report.models]
    for (task, metric), first in per_model[0].items():
        lower = ", lower is better" if first.lower_is_better else ""
        table.add_row(Text(f"{task}: {metric}, {first.n:,} items{lower}", style="bold"))
        for name, rows in zip(names, per_model, strict=True):
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
