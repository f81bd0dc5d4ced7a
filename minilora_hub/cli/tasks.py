"""`minilora tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minilora_hub.cli.options import AsJson, Debug, print_json


def tasks(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder; its files are replaced.")],
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
    from minilora_hub.evaluation.tasks.training_files import write

    counts = write(out, tuple(task or ()), tuple(split or ("train", "validation")), count)
    if as_json:
        print_json({"out": str(out), "rows": counts})
        return
    for name, rows in counts.items():
        typer.echo(f"{out / name}: {rows} rows")
