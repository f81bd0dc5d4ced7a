"""`minilora push`, `minilora verify` and `minilora card`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from minilora_hub.cli.options import (
    Adapter,
    AsJson,
    Base,
    Debug,
    DryRun,
    Public,
    Revision,
    print_json,
    print_notes,
    say,
    show,
)
from minilora_hub.errors import MiniLoraError
from minilora_hub.formatting import counted, size

if TYPE_CHECKING:
    from minilora_hub.publish.push.push import PushPlan
    from minilora_hub.publish.verify.report import VerifyReport

MARKS = {"add": "+", "change": "~", "keep": " ", "delete": "-"}


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The trained adapter.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub, or name under your own user.")],
    public: Public = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    tag: Annotated[str | None, typer.Option(metavar="TAG", help="Tag the commit.")] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="The branch. Default: main.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The commit's message.")] = None,
    layout: Annotated[
        Literal["auto", "peft"], typer.Option(help="peft: PEFT's own format, without code (LoRA and DoRA).")
    ] = "auto",
    base: Base = None,
    base_id: Annotated[
        str | None, typer.Option(metavar="ID", help="The base's id on the Hub, where the adapter names a folder.")
    ] = None,
    license: Annotated[str | None, typer.Option(metavar="ID", help="The adapter's licence, e.g. apache-2.0.")] = None,
    space: Annotated[
        str | None,
        typer.Option(metavar="ID", help='The Space that the card\'s "try it" link opens. Default: unchanged.'),
    ] = None,
    endpoint: Annotated[
        bool | None,
        typer.Option(
            "--endpoint/--no-endpoint", help="Add what an Inference Endpoint of the repo runs. Default: unchanged."
        ),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not verify the repo afterwards.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Publish an adapter: build, check, send in one commit, verify."""
    if as_json and not (yes or dry_run):
        raise typer.BadParameter("does not ask for confirmation: also pass --yes or --dry-run", param_hint="--json")
    if not (yes or dry_run or sys.stdin.isatty()):
        raise typer.BadParameter(
            "stdin is not a terminal, so confirmation is not possible: pass --yes to send", param_hint="--yes"
        )

    from minilora_hub.publish.push.push import push as publish

    result = publish(
        folder,
        repo,
        private=not public,
        dry_run=dry_run,
        create_pr=create_pr,
        tag=tag,
        revision=revision,
        message=message,
        layout=layout,
        base_model=base,
        base_id=base_id,
        license=license,
        space=space,
        endpoint=endpoint,
        verify=not no_verify,
        progress=not as_json,
        confirm=None if dry_run else _tell if yes else _ask,
    )
    if as_json:
        print_json(result.to_dict())
    elif dry_run:
        _print_plan(result.plan)
        typer.echo(f"\nREADME.md:\n\n{result.plan.card}")
        typer.echo("Nothing was sent.")
    elif result.dry_run:
        typer.echo("Nothing was sent.")
    else:
        typer.echo(f"{result.url} (commit {(result.commit or '')[:12]})")
        if result.verification:
            _print_report(result.verification)
    if not result.ok:
        assert result.verification is not None
        raise MiniLoraError(f"the files are in the repo, but do not verify: {result.verification.problem}")


def _tell(plan: PushPlan) -> bool:
    print_notes(plan.notes)
    return True


def _ask(plan: PushPlan) -> bool:
    _print_plan(plan)
    return typer.confirm("Send it?", default=False)


def _print_plan(plan: PushPlan) -> None:
    seen = "private" if plan.private else "PUBLIC"
    new = "a new repo" if plan.creates else "an existing repo"
    show(f"{plan.repo_id} ({new}, {seen}), {'a pull request to ' if plan.create_pr else ''}{plan.revision}")
    for file in plan.files:
        digest = (file.sha256 or "deleted")[:12]
        show(f"  {MARKS[file.action]} {file.path:<40} {size(file.size):>10}  {digest}")
    sent = sum(file.size for file in plan.sends if file.action != "delete")
    kept = sum(file.action == "keep" for file in plan.files)
    show(f"{counted(len(plan.sends), 'file')} to send ({size(sent)}), {kept} unchanged")
    show(f"reference logits: {'reused' if plan.recording.reused else 'recorded now'}, {plan.recording.reason}")
    if plan.tag:
        show(f"tag: {plan.tag}")
    for note in plan.notes:
        show(f"note: {note}")


def verify(
    adapter: Adapter,
    revision: Revision = None,
    base: Base = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that is not a release of minilora_hub.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Load an adapter in an isolated process, and compare it with its recorded logits."""
    from minilora_hub.publish.verify.verify import verify as verify_adapter

    report = verify_adapter(
        adapter, revision=revision, base_model=base, trust_remote_code=trust_remote_code, progress=not as_json
    )
    if as_json:
        print_json(report.to_dict())
    else:
        _print_report(report)
    if not report.ok:
        raise MiniLoraError(f"{report.name} does not verify: {report.problem}")


def _print_report(report: VerifyReport) -> None:
    for step in report.steps:
        show(f"  {'✓' if step.ok else '✗'} {step.name}: {step.detail}")
    if report.ok:
        show(f"{report.name}{f' at {report.revision[:12]}' if report.revision else ''} computes the recorded logits.")


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter with its results.json.")],
    repo: Annotated[str | None, typer.Option(metavar="ID", help="The repo that the card names.")] = None,
    revision: Revision = None,
    space: Annotated[str | None, typer.Option(metavar="ID", help='The Space that "try it" opens.')] = None,
    write: Annotated[bool, typer.Option("--write", help="Write README.md; its free text is kept.")] = False,
    debug: Debug = False,
) -> None:
    """Show the card that a push would write."""
    from huggingface_hub import constants

    from minilora_hub.publish.card.free_text import read_card
    from minilora_hub.publish.card.render import render_card, settings_of, write_card

    previous = read_card(folder)
    before = (settings_of(previous) if previous else None) or {}
    repo, revision = repo or before.get("repo_id"), revision or before.get("revision")
    space, hub = space or before.get("space"), constants.ENDPOINT
    if write:
        say(f"Written: {write_card(folder, repo_id=repo, revision=revision, space=space, hub=hub)}")
    else:
        card = render_card(folder, repo_id=repo, revision=revision, space=space, hub=hub, previous=previous)
        typer.echo(card, nl=False)
