"""`minilora info`, `minilora list` and `minilora pull`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from minilora_hub.cli.options import Adapter, AsJson, Debug, Revision, print_json, print_table, say
from minilora_hub.formatting import UNKNOWN, counted, duration, size

Sort = Literal["downloads", "likes", "last_modified", "created_at", "trending_score"]
Method = Literal["mixlora", "mixdora", "dora", "lora"]


LAYOUTS = {
    "auto": "AutoModel with its own code",
    "peft": "PEFT format",
    "peft-mixlora": "PEFT format, a method of minilora_hub",
    "reference": "format of the mixlora package: convert it with minilora import",
    "checkpoint": "a whole model, not an adapter",
}


def info(
    adapter: Adapter,
    revision: Revision = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Describe an adapter without loading it."""
    from minilora_hub.publish.find import info as describe

    found = describe(adapter, revision=revision, progress=not as_json)
    if as_json:
        print_json(found.to_dict())
        return
    rows = [
        ("adapter", f"{found.name}{f' at {found.revision}' if found.revision else ''}"),
        ("method", f"{found.method}, {LAYOUTS[found.layout]}"),
        ("base", f"{found.base or UNKNOWN} at {found.base_revision or 'no fixed revision'}"),
        *((name, str(value)) for name, value in found.settings.items()),
        (
            "parameters",
            f"{found.parameters:,}" if found.parameters is not None else "unknown: the weights are a pickle",
        ),
        ("size", f"{size(found.bytes)} in {counted(len(found.files), 'file')}"),
        ("code", "none" if found.code is None else f"minilora_hub, {found.code}" if found.code != UNKNOWN else UNKNOWN),
        ("license", found.license or UNKNOWN),
        ("trained on", ", ".join(found.data) or UNKNOWN),
        ("steps", f"{found.steps:,}" if found.steps is not None else UNKNOWN),
        ("training time", duration(found.seconds)),
    ]
    for row in found.evaluation:
        base = f" (base {row.base_value:g})" if row.base_value is not None else ""
        rows.append((row.task, f"{row.metric} {row.value:g}{base}"))
    rows += [("warning", warning) for warning in found.warnings]
    print_table(rows)


def list_(
    base: Annotated[
        str | None, typer.Option("--base", metavar="ID", help='Id of the base, or "embedded". Default: any.')
    ] = None,
    method: Annotated[Method | None, typer.Option(help="Only this method.")] = None,
    sort: Annotated[Sort, typer.Option(help="Sort order, largest or newest first.")] = "downloads",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Maximum number of adapters.")] = 50,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List adapters on the Hub."""
    from minilora_hub.publish.listing import list_adapters

    found = list_adapters(base, method=method, sort=sort, limit=limit)
    if as_json:
        print_json([asdict(row) for row in found])
        return
    if not found:
        typer.echo("No adapter was found.")
        return
    dated = "created" if sort == "created_at" else "updated"
    heads = ("adapter", "method", "downloads", "likes", dated, "license")
    rows = [
        (row.id, row.method or "", str(row.downloads), str(row.likes), getattr(row, dated) or "", row.license or "")
        for row in found
    ]
    print_table([heads, *rows])


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The adapter's id on the Hub.")],
    revision: Revision = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="A new folder. Default: the Hub's cache.")] = None,
    debug: Debug = False,
) -> None:
    """Download an adapter, and print its folder."""
    from minilora_hub.publish.find import code_warnings
    from minilora_hub.publish.find import pull as fetch

    folder = fetch(repo, revision=revision, out=out)
    for warning in code_warnings(folder):
        say(f"warning: {warning}")
    typer.echo(str(folder))
