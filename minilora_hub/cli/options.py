"""Options and output that several commands use."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit. Default: main.")]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help='Base to load instead of the named one: "embedded", a folder, an id.'),
]


def given(context: typer.Context) -> dict[str, Any]:
    """Return the parameters of a command that the user gave, by name, also those whose value is the default's."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    # By name: newer typers bring a copy of click, and its sources are others than click's.
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def say(line: str) -> None:
    """Print a line for people, on stderr."""
    typer.echo(line, err=True)


def print_json(value: Any) -> None:
    """Print a value for scripts, on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
