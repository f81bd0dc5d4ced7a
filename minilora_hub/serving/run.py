"""Build a server from a base and adapters, and run it until Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from minilora_hub.bases.resolving import resolve_base
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.compare.prompt_index import AdapterIndex
from minilora_hub.formatting import counted
from minilora_hub.remote_code.adapter_files import base_fingerprint
from minilora_hub.serving.app import Server, build_app
from minilora_hub.serving.metrics import Metrics
from minilora_hub.serving.models import Models, require_folder
from minilora_hub.serving.scheduler import Scheduler
from minilora_hub.serving.settings import ServerLimits

GRACE_SECONDS = 5
"""How long open connections may take to send what they have after Ctrl-C."""


def build_server(
    base: str,
    adapters: Sequence[str | Path],
    *,
    adapter_folders: Sequence[Path] = (),
    adapter_bytes: int | None = None,
    limits: ServerLimits | None = None,
    allow_loading: bool = False,
    route: Path | None = None,
    dtype: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Server:
    """Load a base and its adapters.

    Args:
        base: its name; see `minilora_hub.bases`.
        adapters: folders or Hub ids of adapters, which are loaded now.
        adapter_folders: folders whose folders are adapters, which are read when they are asked for.
        adapter_bytes: the most bytes of adapter tensors to keep in memory; see `AdapterBank`.
        limits: bounds of the server.
        allow_loading: whether clients may load and unload adapters.
        route: file of an index that chooses the adapter where a client asks for the model ``"auto"``.
        dtype: of the base, or ``"int8"``; see `load_base`.
        progress: called with a line of text at each step.

    Raises:
        MiniLoraError: the base, an adapter or the index cannot be found or read, or they do not fit each other.
        ValueError: two adapters have the same name.
    """
    index = None if route is None else AdapterIndex.load(route)
    for folder in adapter_folders:  # before the base is loaded
        require_folder(folder)
    engine = CompareEngine(base, adapters, dtype=dtype, memory_limit=adapter_bytes, progress=progress)
    scheduler = Scheduler(engine, limits or ServerLimits())
    if scheduler.row_by_row is not None:
        progress(f"  ! rows of this base are computed one after the other: {scheduler.row_by_row}")
    resolved = resolve_base(base)
    names = {base, *([resolved.hub_id] if resolved.hub_id else [])}
    models = Models(engine, adapters, names)
    for folder in adapter_folders:
        count, refused = models.register_folder(folder)
        progress(f"  + {counted(count, 'adapter')} of {folder}, read when asked for")
        for line in refused:
            progress(f"  ! {line}")
    if index is not None:
        index.require_base(base_fingerprint(str(resolved.path)))
        models.choose_with(index)
    return Server(engine, scheduler, models, Metrics(), allow_loading)


def run(server: Server, host: str, port: int, api_key: str | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM, which ends open answers with an error.

    Args:
        server: its parts.
        host: the address to listen on.
        port: the port.
        api_key: the key that clients must send; None: none.
    """
    app = build_app(server, api_key)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    _Uvicorn(config, server.scheduler).run()


class _Uvicorn(uvicorn.Server):
    """A server that ends open answers at the first signal, instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the signal, and let the scheduler end its rows after the present step."""
        self._scheduler.stop_soon()
        super().handle_exit(sig, frame)
