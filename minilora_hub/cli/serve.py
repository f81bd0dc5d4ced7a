"""`minilora serve`: an OpenAI-compatible server over the base and adapters on it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from minilora_hub.cli.demo import free_port
from minilora_hub.cli.options import Debug, Dtype, say
from minilora_hub.errors import MissingExtraError

KEY = "MINILORA_API_KEY"


def serve(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER",
            help="Folders, or ids on the Hub. Default: the adapters shipped here, on the embedded base; else none.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help='"embedded", a folder or a Hub id. Default: the base the adapters name, else embedded.'),
    ] = None,
    adapter_dir: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A folder of adapter folders, each read when asked for. Repeatable."),
    ] = None,
    adapter_memory: Annotated[
        int | None,
        typer.Option(
            metavar="MIB", min=1, help="Keep at most this much of adapters in memory. Default: all used ones."
        ),
    ] = None,
    route: Annotated[
        Path | None,
        typer.Option(
            metavar="INDEX",
            help='An index of `minilora route build`: the model "auto" is the adapter that it chooses for the prompt.',
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY,
            show_default=False,
            help="The key that clients must send. An argument is visible to other users of the machine: prefer the "
            "variable.",
        ),
    ] = None,
    allow_loading: Annotated[
        bool,
        typer.Option(
            "--allow-loading", help="Let clients load adapters from this machine's folders or the Hub, and unload them."
        ),
    ] = False,
    max_rows: Annotated[int, typer.Option(min=1, help="The most answers that are computed together.")] = 32,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="The most answers that wait; a request beyond them gets status 429.")
    ] = 256,
    max_cache_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of all answers for which the key/value cache has room.")
    ] = 16384,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens of a chat answer where the request doesn't say.")
    ] = 512,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Serve the base and adapters of any kind to OpenAI's clients, in one batch behind one address."""
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "serve")
    api_key = os.environ.get(KEY) if api_key is None else api_key  # typer takes an empty variable for an unset one
    if api_key is not None and not api_key.strip():
        raise ValueError("--api-key '': must hold some text; leave it and MINILORA_API_KEY out to need no key")
    port = free_port(host, port)
    say("Starting: the first time takes a while …")

    from minilora_hub.bases.resolving import EMBEDDED
    from minilora_hub.compare.found_adapters import base_for, shipped_adapters
    from minilora_hub.serving.run import build_server, run
    from minilora_hub.serving.settings import ServerLimits

    shipped = base in (None, EMBEDDED) and not adapter_dir
    server = build_server(
        base_for(base, adapters, say) if adapters else base or EMBEDDED,
        adapters or (shipped_adapters() if shipped else []),
        adapter_folders=adapter_dir or (),
        adapter_bytes=None if adapter_memory is None else adapter_memory * 2**20,
        limits=ServerLimits(max_rows, max_waiting, max_cache_tokens, max_tokens),
        allow_loading=allow_loading,
        route=route,
        dtype=dtype,
        progress=say,
    )
    shown = "localhost" if host in ("0.0.0.0", "::") else host  # noqa: S104
    typer.echo(f"Serving {len(server.models.all())} models at http://{shown}:{port}/v1 (Ctrl-C ends it)")
    run(server, host, port, None if api_key is None else api_key.strip())
