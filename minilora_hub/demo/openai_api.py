"""Serve OpenAI's API of `minilora serve` beside the page, on the same models: ``MINILORA_OPENAI=1``.

Its requests are rows of the page's scheduler, beside those of its visitors. The page's limits bound them too. Clients
cannot load adapters.
"""

from __future__ import annotations

import os
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from minilora_hub.demo.runs.limits import flag
from minilora_hub.serving.app import Server, build_app
from minilora_hub.serving.metrics import Metrics
from minilora_hub.serving.models import Models
from minilora_hub.serving.scheduler import Scheduler

SWITCH, KEY = "MINILORA_OPENAI", "MINILORA_API_KEY"


class OpenAiPaths:
    """ASGI middleware that answers the API's paths, and passes everything else on to the page.

    Args:
        app: the page.
        api: the API.
    """

    def __init__(self, app: ASGIApp, api: ASGIApp) -> None:
        self._app, self._api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Choose by the path."""
        path = scope.get("path", "")
        ours = scope["type"] == "http" and (path.startswith("/v1/") or path in ("/health", "/metrics"))
        await (self._api if ours else self._app)(scope, receive, send)


def openai_arguments(scheduler: Scheduler, api_key: str | None = None) -> dict[str, Any]:
    """Return the arguments for the page's FastAPI application that add the API to it.

    Args:
        scheduler: from `page_scheduler`; it is started.
        api_key: the key that clients of the API must send; None: none.
    """
    engine = scheduler.engine
    models = Models(engine, [column.name for column in engine.columns[1:]])
    api = build_app(Server(engine, scheduler, models, Metrics()), api_key)
    scheduler.start()  # it stops with the process
    return {"middleware": [Middleware(OpenAiPaths, api=api)]}


def openai_from_environment(scheduler: Scheduler | None) -> dict[str, Any] | None:
    """Return the arguments of `openai_arguments` if MINILORA_OPENAI is 1, with the key of MINILORA_API_KEY.

    Args:
        scheduler: of the page; None on ZeroGPU.

    Raises:
        ValueError: MINILORA_OPENAI is neither 0 nor 1, MINILORA_API_KEY is blank, or this is a Space on ZeroGPU.
    """
    if not flag(SWITCH):
        return None
    if scheduler is None:
        raise ValueError(f"{SWITCH}=1: must be 0 on ZeroGPU, which lends a GPU to single calls of the page only")
    key = os.environ.get(KEY)
    if key is not None and not key.strip():
        raise ValueError(f"{KEY}={key!r}: must hold some text; leave it out to need no key")
    return openai_arguments(scheduler, None if key is None else key.strip())
