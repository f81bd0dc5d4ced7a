"""The command line: parse, delegate, print. Heavy imports happen inside the commands, so that `--help` is instant."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from minilora_hub.errors import MiniLoraError

FIRST_PORT, LAST_PORT = 7860, 7959

app = typer.Typer(
    name="minilora",
    help="MixLoRA and DoRA adapters that load from the Hugging Face Hub with one line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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


@app.command(epilog="Example: minilora demo ./my-adapter --base embedded --port 7860")
def demo(
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(metavar="ADAPTER", help="Adapter folders. Default: the ones shipped here."),
    ] = None,
    base: Annotated[str, typer.Option(help='The base: "embedded", a folder, or an id on the Hub.')] = "embedded",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help=f"The port. Default: the first free one from {FIRST_PORT} on.")
    ] = None,
    browser: Annotated[
        bool | None, typer.Option("--browser/--no-browser", help="Open a browser. Default: where there is a screen.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare the base and adapters on it, side by side, on a page served from this machine."""
    port = _free_port(host, port)
    _say("Starting: the first time takes a while …")

    from minilora_hub.compare.columns import shipped_adapters
    from minilora_hub.compare.engine import CompareEngine
    from minilora_hub.demo.ui import build_demo, launch

    engine = CompareEngine(base, adapters or shipped_adapters(), progress=_say)
    shown = "localhost" if host in ("0.0.0.0", "::") else host  # noqa: S104
    typer.echo(f"Open http://{shown}:{port} (Ctrl-C ends it)")
    launch(build_demo(engine), host=host, port=port, open_browser=_has_screen() if browser is None else browser)


def _free_port(host: str, wanted: int | None) -> int:
    """Check the port before the models are loaded, and find one where none was asked for."""
    for port in [wanted] if wanted else range(FIRST_PORT, LAST_PORT + 1):
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                return port
        except socket.gaierror as error:
            raise ValueError(f"host={host!r}: no such address ({error.strerror})") from None
        except OSError as error:
            reason = error.strerror
    if wanted:
        raise MiniLoraError(
            f"port {wanted} on {host} cannot be used ({reason}): pass another --port, or none to get a free one"
        )
    raise MiniLoraError(f"no free port on {host} from {FIRST_PORT} to {LAST_PORT} ({reason}): pass --port")


def _has_screen() -> bool:
    if "CI" in os.environ or "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _say(line: str) -> None:
    typer.echo(line, err=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 for success, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C.

    Args:
        arguments: what follows the program's name. Default: the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=arguments, prog_name="minilora", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        code = _report(error, debug="--debug" in arguments)
    sys.exit(code or 0)


def _report(error: Exception, debug: bool) -> int:
    """Print an error and return the exit code."""
    show = getattr(error, "show", None)
    if show:  # a usage error, from click or from the copy of it inside newer typers
        show()
        return getattr(error, "exit_code", 2)
    if debug:
        traceback.print_exception(error)
        return 1
    message = " ".join(str(error).split())
    if isinstance(error, (MiniLoraError, ValueError)):
        _say(f"minilora: {message}")
    else:
        _say(f"minilora: {type(error).__name__}: {message} (--debug shows where)")
    return 1


if __name__ == "__main__":
    main()
