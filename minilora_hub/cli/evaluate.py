"""`minilora eval`: measure base and adapters on the tasks. `minilora tasks`: write the items of the tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minilora_hub.cli.measuring import Measured, measure_lm_eval, measure_rows, measure_tasks
from minilora_hub.cli.options import AsJson, Debug, given, print_json, say
from minilora_hub.formatting import counted
from minilora_hub.whole_folders import require_writable

if TYPE_CHECKING:
    from rich.table import Table

BUILT_IN = ("task", "split", "held_out", "few_shot", "perplexity", "text", "fresh")
"""Options of the built-in tasks alone."""

FILE_WIDTH = 200
"""Width of the table in a file or a pipe."""


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
            "--task", metavar="T", help="dates, numbers, inflection or records; may be repeated. Default: all."
        ),
    ] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="train, validation, test or held_out.")] = "test",
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Also measure items in formats that are not in the training rows.")
    ] = False,
    count: Annotated[int | None, typer.Option(metavar="N", help="Items per task. Default: all.")] = None,
    few_shot: Annotated[
        int, typer.Option("--few-shot", metavar="K", help="Training items shown to the base; 0 for none.")
    ] = 4,
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Also measure perplexity on general text.")] = False,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text for the perplexity. Default: Python 3.11's manual.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or int8.")] = "float32",
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Maximum rows per batch.")] = 64,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval",
            metavar="T",
            help="An lm-eval task instead of the built-in ones (extra lm-eval); may be repeated.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="For classifiers: rows with labels, as minilora train takes them, or a data set on the Hub (--split).",
        ),
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="With --data: truncate longer rows.")] = False,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="A folder with your own lm-eval tasks.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write all results to this JSON file, and do not change the adapters' folders."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore cached answers and compute everything again.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure adapters and their base on the tasks; write the numbers into each adapter's results.json."""
    from minilora_hub.adapter_folder.results import RESULTS_FILE

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out {str(out)!r}: must be a file in a folder that exists")
    folders = [Path(name) for name in adapters if Path(name).is_dir()]
    if out is None:
        for folder in folders:
            require_writable(folder, "adapter")
    else:
        if out.resolve() in [folder.resolve() / RESULTS_FILE for folder in folders]:
            raise ValueError(f"--out {str(out)!r}: is written, in a form of its own, where --out is left out")
        require_writable(out.parent, "--out")
    common = {"base": base, "count": count, "dtype": dtype, "batch_size": batch_size}
    other = "--lm-eval" if lm_eval else "--data" if data else None
    surplus = [name for name in given(context) if name in BUILT_IN and not (data and name == "split")]
    if other and surplus:
        flag = "--" + surplus[0].replace("_", "-")
        raise ValueError(f"{flag}: only applies to the built-in tasks: leave it out with {other}, or run it separately")
    if lm_eval and data:
        raise ValueError("--data: leave it out with --lm-eval, or run it separately")
    if truncate and not data:
        raise ValueError("--truncate: must come with --data")
    from minilora_hub.evaluation.outputs import require_results

    for folder in folders if out is None else ():
        require_results(folder)
    if lm_eval:
        measured = measure_lm_eval(adapters, lm_eval, include_path, **common)
    elif data:
        measured = measure_rows(adapters, data, split=split, truncate=truncate, **common)
    else:
        if include_path is not None:
            raise ValueError(f"--include-path {str(include_path)!r}: must come with --lm-eval")
        settings = {"split": split, "held_out": held_out, "few_shot": few_shot, "perplexity": perplexity, "text": text}
        measured = measure_tasks(adapters, task, fresh, as_json, **common, **settings)
    written = _write(measured, out)
    if as_json:
        print_json(measured.document)
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(_table(measured))
    if measured.summary:
        say(measured.summary)
    for path in written:
        say(f"wrote {path}")
    fetched = [name for name, adapter, _ in measured.models if adapter is not None and not adapter.local]
    if fetched and out is None:
        say(f"nothing is written for {', '.join(fetched)}, from the Hub: --out FILE keeps the numbers")


def _write(measured: Measured, out: Path | None) -> list[Path]:
    """Write one JSON file, or the results.json of each adapter that is a folder."""
    from minilora_hub.documents import write_whole
    from minilora_hub.evaluation.outputs import save_results

    if out is not None:
        return [write_whole(out, json.dumps(measured.document, ensure_ascii=False, indent=1) + "\n")]
    local = [adapter for _, adapter, _ in measured.models if adapter is not None and adapter.local]
    return [save_results(measured.results(adapter), adapter.folder) for adapter in local]


def _table(measured: Measured) -> Table:
    """Make a block for each task and metric, with a row for each model: its number and the 95% interval."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3, 0, 0))
    per_model = [(name, {(row.task, row.metric): row for row in rows}) for name, _, rows in measured.models]
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


def tasks(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to; files are replaced.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="T", help="dates, numbers, inflection or records; may be repeated. Default: all."
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            "--split", metavar="S", help="train, validation, test or held_out. Default: train and validation."
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", metavar="N", min=1, help="The first N items of each task. Default: all.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the evaluation tasks' items as JSON lines, for minilora train --data: each task, and their mix."""
    from minilora_hub.evaluation.tasks.registry import write

    counts = write(out, tuple(task or ()), tuple(split or ("train", "validation")), count)
    if as_json:
        print_json({"out": str(out), "rows": counts})
        return
    for name, rows in counts.items():
        typer.echo(f"{out / name}: {counted(rows, 'row')}")
