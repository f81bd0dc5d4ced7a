"""The root command, and the conversion of errors to messages and exit codes."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Annotated

import typer

from minilora_hub.cli.combine import combine, experts
from minilora_hub.cli.compare import compare
from minilora_hub.cli.convert import export, import_
from minilora_hub.cli.demo import demo
from minilora_hub.cli.diff import diff
from minilora_hub.cli.discover import info, list_, pull
from minilora_hub.cli.evaluate import eval_, tasks
from minilora_hub.cli.options import Debug, say
from minilora_hub.cli.publish import card, push, verify
from minilora_hub.cli.quantize import quantize
from minilora_hub.cli.route import route
from minilora_hub.cli.serve import serve
from minilora_hub.cli.space import space
from minilora_hub.cli.train import sweep, train
from minilora_hub.errors import MiniLoraError
from minilora_hub.quiet import quiet_process

app = typer.Typer(
    name="minilora",
    help="MixLoRA and DoRA adapters that load from the Hugging Face Hub with one line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    ("demo", demo, "minilora demo ./my-adapter --base embedded --port 7860"),
    ("compare", compare, 'minilora compare ./my-adapter --base embedded --prompt "Why is the sky blue?"'),
    ("serve", serve, "minilora serve ./my-adapter me/my-dora --base embedded --port 8000"),
    ("tasks", tasks, "minilora tasks --out ./data --count 800"),
    (
        "train",
        train,
        "minilora train --method dora --base embedded --data rows.jsonl --out ./my-adapter; "
        "minilora train --from ./my-adapter --data more.jsonl --out ./my-next",
    ),
    ("quantize", quantize, "minilora quantize embedded --to int3 --out ./base-int3"),
    ("sweep", sweep, "minilora sweep --method dora --base embedded --data rows.jsonl --vary r=4,16 --out ./sweep"),
    ("eval", eval_, "minilora eval ./my-adapter --task dates --count 100"),
    ("diff", diff, "minilora diff measured.json --task dates --difficulty 3"),
    ("push", push, "minilora push ./my-adapter me/my-adapter --license apache-2.0 --dry-run"),
    ("verify", verify, "minilora verify me/my-adapter --revision v1"),
    ("card", card, "minilora card ./my-adapter --repo me/my-adapter"),
    ("info", info, "minilora info me/my-adapter --json"),
    ("list", list_, "minilora list --base HuggingFaceTB/SmolLM2-135M-Instruct --method mixlora"),
    ("pull", pull, "minilora pull me/my-adapter --out ./my-adapter"),
    ("import", import_, "minilora import ./their-adapter --base embedded --out ./my-adapter"),
    ("combine", combine, "minilora combine ./lora-a ./lora-b --method ties --weight 0.7 --weight 0.3 --out ./both"),
    ("export", export, "minilora export ./my-mixlora --to mixtral --out ./my-mixtral"),
)
for name, command, example in COMMANDS:
    app.command(name, epilog=f"Example: {example}")(command)
app.add_typer(experts, name="experts")
app.add_typer(route, name="route")
app.add_typer(space, name="space")


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"minilora {version('minilora_hub')}")
        except PackageNotFoundError:
            typer.echo("minilora, not installed: run from its source")
        raise typer.Exit


@app.callback()
def root(
    debug: Debug = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """MixLoRA and DoRA adapters that load from the Hugging Face Hub with one line."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 for success, 1 for a failure, 2 for wrong usage.

    130 after Ctrl-C and 143 after SIGTERM; in both cases a command removes its temporary files.

    Args:
        arguments: the command-line arguments. Default: those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one that cannot encode a character, as ASCII, gets its number
            stream.reconfigure(errors="backslashreplace")
    try:
        with quiet_process(), _signals_unwind():
            code = app(args=arguments, prog_name="minilora", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        code = _report(error, debug="--debug" in arguments)
    sys.exit(code or 0)


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Make Ctrl-C and SIGTERM raise an exception, so that a command removes its temporary folders."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores Ctrl-C
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; exit at once while a module is being imported.

    Modules and extensions that are being set up swallow exceptions: about one Ctrl-C in thirty was lost there.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


def _report(error: Exception, debug: bool) -> int:
    """Print an error and return the exit code."""
    show = getattr(error, "show", None)
    if show:  # a usage error, from click or from the copy of it inside newer typers
        error.message = error.message.removeprefix("Value error, ")  # type: ignore[attr-defined]  # pydantic's, in typer
        show()
        return getattr(error, "exit_code", 2)
    if debug:
        traceback.print_exception(error)
        return 1
    message = " ".join(str(error).split())
    if isinstance(error, (MiniLoraError, ValueError)):
        say(f"minilora: {message}")
    else:
        say(f"minilora: {type(error).__name__}: {message} (use --debug for the traceback)")
    return getattr(error, "exit_code", 1)
