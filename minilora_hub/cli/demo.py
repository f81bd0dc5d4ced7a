"""`minilora demo`: the page that shows base and adapters side by side, served from this machine."""

from __future__ import annotations

import errno
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from minilora_hub.cli.options import Debug, Dtype, say
from minilora_hub.errors import MiniLoraError, MissingExtraError

FIRST_PORT, LAST_PORT = 7860, 7959


def demo(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER", help="Folders, or ids on the Hub. Default: the adapters shipped here."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help='"embedded", a folder or a Hub id. Default: the base the adapters name.')
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help=f"The port. Default: the first free one from {FIRST_PORT} on.")
    ] = None,
    browser: Annotated[
        bool | None, typer.Option("--browser/--no-browser", help="Open a browser. Default: if there is a display.")
    ] = None,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Also serve the comparison as a tool for MCP clients (extra mcp).")
    ] = False,
    allow_local: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="A folder of adapter folders that visitors may choose from, by name. Repeatable."
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="What minilora eval --out FILE wrote: the page shows where adapters differ.",
        ),
    ] = None,
    route: Annotated[
        Path | None,
        typer.Option(
            metavar="INDEX",
            exists=True,
            dir_okay=False,
            help="Add a column that the adapter which this index chooses answers: see `minilora route build`.",
        ),
    ] = None,
    allow_training: Annotated[
        bool,
        typer.Option(
            "--allow-training",
            help="Store prompts and answers that you vote on, on this machine only, and show how to train on them.",
        ),
    ] = False,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Serve a page that compares the base and adapters side by side.

    Votes and shared comparisons are stored in $MINILORA_DATA, or in the user's data folder. With MINILORA_OPENAI=1 the
    models also answer OpenAI's clients at /v1, with the key in MINILORA_API_KEY if it is set.
    """
    port = free_port(host, port)
    say("Starting: the first time takes a while …")

    from minilora_hub.bases.resolving import resolve_base
    from minilora_hub.compare.engine import CompareEngine
    from minilora_hub.compare.found_adapters import base_for, shipped_adapters
    from minilora_hub.demo.adapters.from_hub import LinkedAdapters
    from minilora_hub.demo.openai_api import openai_from_environment
    from minilora_hub.demo.runs.limits import PageLimits
    from minilora_hub.demo.runs.scheduled import page_scheduler
    from minilora_hub.demo.ui.app import build_demo, data_folder, launch
    from minilora_hub.demo.votes.voted_answers import VotedAnswersFile

    if mcp and find_spec("mcp") is None:
        raise MissingExtraError("mcp", "mcp")
    limits = PageLimits.from_environment()
    named = adapters or shipped_adapters()
    limits.check_columns(1 + len(named) + (route is not None))
    base = base_for(base, named, say)
    voted = None
    if allow_training:
        named_base = Path(base).expanduser()  # the command that the page shows is run in any folder
        absolute = str(named_base.absolute()) if named_base.is_dir() else base
        voted = VotedAnswersFile(data_folder().absolute() / "training", absolute, host)
    engine = CompareEngine(base, named, dtype=dtype, keep_bare_logits=True, progress=say)
    scheduler = page_scheduler(engine, limits)
    openai = openai_from_environment(scheduler)
    shown = "localhost" if host in ("0.0.0.0", "::") else host  # noqa: S104
    page = build_demo(
        engine,
        links=LinkedAdapters(engine, resolve_base(base), limits),
        limits=limits,
        allowed=allow_local or (),
        measured=measured,
        route=route,
        voted=voted,
        scheduler=scheduler,
    )
    screen = _has_screen() if browser is None else browser
    launch(
        page,
        host=host,
        port=port,
        open_browser=screen,
        mcp=mcp,
        openai=openai,
        engine=engine,
        ready=lambda: typer.echo(f"Open http://{shown}:{port} (press Ctrl-C to stop)"),
    )


def free_port(host: str, wanted: int | None) -> int:
    """Check the wanted port, or find a free one, before the models are loaded."""
    for port in [wanted] if wanted else range(FIRST_PORT, LAST_PORT + 1):
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                return port
        except OSError as error:
            # create_server raises the error of a host that cannot be resolved as an OSError with the same number.
            reason = str(error.strerror).partition(" (while ")[0]
            if isinstance(error, socket.gaierror) or (error.errno or 0) < 0 or error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(f"host={host!r}: is not an address of this machine ({reason})") from None
    if wanted:
        raise MiniLoraError(
            f"port {wanted} on {host} cannot be used ({reason}): pass another --port, or none to get a free one"
        )
    raise MiniLoraError(f"no free port on {host} from {FIRST_PORT} to {LAST_PORT} ({reason}): pass --port")


def _has_screen() -> bool:
    if "CI" in os.environ or "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
