"""`minilora diff`: the items on which two measured models differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minilora_hub.cli.options import AsJson, Debug, print_json, say

if TYPE_CHECKING:
    from minilora_hub.evaluation.differences import Differences


def diff(
    measured: Annotated[Path, typer.Argument(metavar="FILE", help="What minilora eval --out FILE has written.")],
    first: Annotated[
        str | None, typer.Option(metavar="NAME", help="A model in it. Default: the first adapter.")
    ] = None,
    second: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another. Default: the second adapter, else the base.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="T", help="Only this task; may be repeated.")
    ] = None,
    difficulty: Annotated[int | None, typer.Option(min=1, max=3, help="Only items of this difficulty.")] = None,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="Items shown that only one of the two passes.")] = 10,
    comparator: Annotated[
        Path | None,
        typer.Option("--llm-comparator", metavar="FILE", help="Also write all items as JSON for LLM Comparator."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the items that one of two measured models passes and the other fails, with the base's answer."""
    from minilora_hub.documents import write_whole
    from minilora_hub.evaluation.differences import compare_measured, llm_comparator, read_measured

    found = compare_measured(read_measured(measured), first, second, tuple(task or ()), difficulty)
    if comparator is not None:
        text = json.dumps(llm_comparator(found), ensure_ascii=False, indent=1)
        say(f"wrote {write_whole(comparator, text + chr(10))}")
    if as_json:
        print_json(found.to_dict())
        return
    typer.echo(found.summary())
    for name, tasks in found.routing.items():
        for where, shares in tasks.items():
            loads = ", ".join(f"{chr(65 + expert)} {share:.0%}" for expert, share in enumerate(shares))
            typer.echo(f"experts of {name} in {where!r}: {loads}")
    for name in (found.first, found.second):
        _show(found, name, limit)


def _show(found: Differences, name: str, limit: int) -> None:
    from minilora_hub.formatting import one_line

    items = found.only(name)
    if not items[:limit]:
        return
    typer.echo(f"\nonly {name} is right{f', the first {limit} of {len(items)}' if len(items) > limit else ''}:")
    for item in items[:limit]:
        typer.echo(f"\n  {item.task}, difficulty {item.difficulty}: {one_line(item.prompt)}")
        typer.echo(f"    right answer: {one_line(item.reference)}")
        for model, answer in item.answers.items():
            typer.echo(f"    {'✓' if item.right[model] else '✗'} {model}: {one_line(answer)}")
