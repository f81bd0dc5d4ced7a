"""Options and output shared by several commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from minilora_hub.formatting import one_line, size, visible

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit. Default: main.")]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help='Base to load instead of the named one: "embedded", a folder, an id.'),
]


def _known_dtype(dtype: str | None) -> str | None:
    """Check it before anything is read or said."""
    from minilora_hub.bases.loading import require_dtype

    require_dtype(dtype)
    return dtype


Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        callback=_known_dtype,
        help="float32, bfloat16 or int8 (half the memory of bfloat16; CPU). Default: float32 on a CPU, else the "
        "checkpoint's own.",
    ),
]
Adapter = Annotated[str, typer.Argument(metavar="REPO_OR_DIR", help="An id on the Hub, or a folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")]
Public = Annotated[bool, typer.Option("--public", help="Make it public. Default: private.")]


def given(context: typer.Context) -> dict[str, Any]:
    """Return the parameters that the user gave on the command line, by name, even if they equal the default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    # Compared by name: newer versions of typer contain a copy of click with sources of its own.
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def refuse_unused(context: typer.Context, names: Collection[str], what: str) -> None:
    """Refuse those of the named parameters that the user gave, though they have no effect on `what`."""
    for name, value in given(context).items():
        if name in names:
            option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise ValueError(f"{option}: has no effect on {what}: leave it out")


def say(line: str) -> None:
    """Print a message on stderr; a terminal does not act on what strangers wrote into it."""
    typer.echo(visible(line), err=True)


def show(line: str) -> None:
    """Print a line on stdout, as `say`."""
    typer.echo(visible(line))


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    utf8 = "utf" in (sys.stdout.encoding or "").lower()
    typer.echo(json.dumps(value, indent=2, ensure_ascii=not utf8))


def print_notes(notes: Sequence[str]) -> None:
    """Print notes on stderr."""
    for note in notes:
        say(f"note: {note}")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in aligned columns, on stdout; a cell that strangers wrote cannot break them."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells).rstrip())


def local_folder(source: str, revision: str | None = None) -> Path:
    """Return the folder of an adapter; one on the Hub is downloaded into the Hub's cache. No code in it is run."""
    from minilora_hub.hub.client import fetch, require_no_revision

    if Path(source).is_dir() or source.startswith((".", "/", "~")):
        require_no_revision(source, revision)
        return Path(source).expanduser()
    return fetch(source, revision=revision, token=None, progress=True)[0]


def print_written(folder: Path, facts: dict[str, Any], notes: Sequence[str], as_json: bool) -> None:
    """Print the written folder, its size, and further facts."""
    count = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print_notes(notes)
    if as_json:
        print_json({"folder": str(folder), "bytes": count} | facts | {"notes": list(notes)})
    else:
        typer.echo(f"{folder} ({size(count)})")
