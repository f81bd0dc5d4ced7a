"""`minilora space push`: the comparison page as a Space on the Hub."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from minilora_hub.cli.options import AsJson, Debug, DryRun, Public, print_json
from minilora_hub.formatting import counted, size

if TYPE_CHECKING:
    from minilora_hub.publish.space.push import SpacePush

space = typer.Typer(help="Deploy the comparison page as a Space.", no_args_is_help=True, rich_markup_mode=None)


@space.callback()
def _root() -> None:
    """Deploy the comparison page as a Space."""


@space.command(
    "push", epilog="Example: minilora space push me/compare me/my-dora me/my-mixlora --hardware cpu-basic --dry-run"
)
def push(
    name: Annotated[str, typer.Argument(metavar="SPACE", help="owner/name on the Hub, or name under your own user.")],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER", help="Ids on the Hub. Default: the adapters shipped with minilora_hub."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="ID", help='The base: "embedded" or an id. Default: what the adapters name.')
    ] = None,
    title: Annotated[str | None, typer.Option(help="Its headline on the Hub. Default: its name.")] = None,
    hardware: Annotated[
        str | None, typer.Option(metavar="FLAVOR", help="E.g. cpu-basic, zero-a10g, t4-small. Default: unchanged.")
    ] = None,
    public: Public = False,
    mcp: Annotated[bool, typer.Option("--mcp", help="Also serve a tool for MCP clients.")] = False,
    variable: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A variable for app.py, e.g. MINILORA_MAX_TOKENS=128. May be repeated."
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Send this variable of your environment as a secret. May be repeated."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Hub token. Default, and safer: HF_TOKEN or `hf auth login`.", show_default=False),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Maximum seconds to wait until it runs; 0 does not wait.")
    ] = 1800.0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Stage the page, this package and its requirements, send them in one commit, wait until the Space runs."""
    variables = _pairs(variable or [])
    secrets = {key: _from_environment(key) for key in secret or []}

    from minilora_hub.publish.space.push import push_space

    done = push_space(
        name,
        adapters or [],
        base=base,
        title=title,
        hardware=hardware,
        private=not public,
        mcp=mcp,
        variables=variables,
        secrets=secrets,
        token=token,
        dry_run=dry_run,
        wait=wait,
        progress=not as_json,
    )
    if as_json:
        print_json(done.to_dict())
    elif dry_run:
        _print(done)
        typer.echo("\nNothing was sent.")
    else:
        typer.echo(f"{done.url} (commit {(done.commit or '')[:12]}{f', {done.stage}' if done.stage else ''})")


def _pairs(texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise typer.BadParameter(f"{text[:3]!r}…: must read NAME=VALUE", param_hint="--variable")
        if name in found:
            raise typer.BadParameter(f"{name} is given twice", param_hint="--variable")
        found[name] = value
    return found


def _from_environment(name: str) -> str:
    if "=" in name:
        raise typer.BadParameter(
            f"{name.partition('=')[0]}: only its name is given, its value is read from the environment",
            param_hint="--secret",
        )
    if not os.environ.get(name):
        raise typer.BadParameter(
            f"{name} is not set in the environment, from which its value is read", param_hint="--secret"
        )
    return os.environ[name]


def _print(plan: SpacePush) -> None:
    seen = "private" if plan.private else "PUBLIC"
    new = "a new Space" if plan.creates else "an existing Space"
    typer.echo(f"{plan.space} ({new}, {seen}), hardware: {plan.hardware or 'unchanged'}")
    for path, count in plan.files.items():
        typer.echo(f"  + {path:<60} {size(count):>10}")
    for path in plan.deletes:
        typer.echo(f"  - {path}")
    typer.echo(f"{counted(len(plan.files), 'file')} ({size(sum(plan.files.values()))})")
    for name, value in plan.variables.items():
        typer.echo(f"variable: {name}={value}")
    for name in plan.secrets:
        typer.echo(f"secret: {name}")
    typer.echo(f"\nrequirements.txt:\n\n{plan.requirements}\nREADME.md:\n\n{plan.card}", nl=False)
