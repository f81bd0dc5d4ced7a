"""The HTTP application: OpenAI's paths, loading and unloading of adapters, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.errors import ServingError
from minilora_hub.serving.answering import Answering, Work
from minilora_hub.serving.guard import Guard
from minilora_hub.serving.metrics import Metrics
from minilora_hub.serving.models import Models
from minilora_hub.serving.requests import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest
from minilora_hub.serving.responses import error_body
from minilora_hub.serving.scheduler import Scheduler

T = TypeVar("T")
ANSWERS = CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CLIENT_LEFT = 499
"""Status in the metrics of a request whose client left before its answer."""


@dataclass(frozen=True)
class Server:
    """The parts of a server.

    Attributes:
        engine: the models.
        scheduler: runs their rows.
        models: their names.
        metrics: what was measured.
        allow_loading: whether clients may load and unload adapters.
    """

    engine: CompareEngine
    scheduler: Scheduler
    models: Models
    metrics: Metrics
    allow_loading: bool = False


class EventStream(StreamingResponse):
    """A stream of events whose rows are cancelled when it ends for any reason, before its first event included."""

    media_type = "text/event-stream"

    def __init__(self, work: Work, events: AsyncGenerator[str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._work, self._events = work, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._work.cancel()
            await self._events.aclose()


def build_app(server: Server, api_key: str | None = None) -> FastAPI:
    """Return the application; its scheduler starts and stops with it.

    Args:
        server: its parts.
        api_key: see `Guard`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.scheduler.start()
        yield
        await asyncio.to_thread(server.scheduler.stop)

    app = FastAPI(title="minilora serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_key=api_key)
    _add_errors(app, server.metrics)
    _add_answers(app, server)
    _add_models(app, server)
    _add_state(app, server)
    return app


def _is_field(part: str | int) -> bool:
    """Return whether a part of an error's place is a field or an index, and not one of the types of a field."""
    return isinstance(part, int) or not (part == "str" or "[" in part)


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ServingError)
    async def refused(request: Request, error: ServingError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error_body(error.status, str(error), error.param, error.code), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Where a field may be of several types there is an error for each: the deepest is of the type that was meant.
        worst = max(error.errors(), key=lambda one: len(one["loc"]))
        broken = worst["type"] == "json_invalid"  # then the place is a character of the body
        param = None if broken else ".".join(map(str, filter(_is_field, worst["loc"][1:]))) or None
        shown = f"{param or 'the body of the request'}: {worst['msg'].removeprefix('Value error, ')}"
        kind = request.headers.get("content-type", "")
        if "json" not in kind:  # then the body was not read
            shown = f"Content-Type={kind[:100]!r}: must be application/json"
        if request.url.path in ANSWERS:
            metrics.request(request.url.path, "", 400)
        return JSONResponse(error_body(400, shown, param), 400)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, f"the server failed: {type(error).__name__}"), 500)


def _add_answers(app: FastAPI, server: Server) -> None:
    answering = Answering(server.engine, server.scheduler, server.models, server.metrics)

    async def answer(request: Request, body: ChatRequest | CompletionRequest) -> Response:
        endpoint, model, status = request.url.path, "", 500
        try:
            model = server.models.adapter(body.model) or server.models.base
            work = await (answering.chat(body) if isinstance(body, ChatRequest) else answering.complete(body))
            model = work.model
            if body.stream:
                status = 200
                return EventStream(work, work.events(body.usage_in_stream))
            try:
                result = await unless_disconnected(request, work.response())
            finally:
                work.cancel()
            status = 200 if result is not None else CLIENT_LEFT
            return JSONResponse(result) if result is not None else Response(status_code=CLIENT_LEFT)
        except ServingError as error:
            status = error.status
            raise
        finally:
            server.metrics.request(endpoint, model, status)

    @app.post(CHAT)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await answer(request, body)

    @app.post(COMPLETIONS)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await answer(request, body)


def _add_models(app: FastAPI, server: Server) -> None:
    def shown(model: Any) -> dict[str, Any]:
        card = {"id": model.name, "object": "model", "created": 0, "owned_by": "minilora_hub", "root": model.name}
        return card | {"parent": model.parent, "kind": model.kind, "detail": model.detail, "loaded": model.loaded}

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [shown(model) for model in server.models.all()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        wanted = name if server.models.is_auto(name) else server.models.adapter(name) or server.models.base
        return JSONResponse(next(shown(model) for model in server.models.all() if model.name == wanted))

    def require_allowed() -> None:
        if not server.allow_loading:
            raise ServingError(403, "adapters of this server are fixed: it runs without --allow-loading")

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest) -> PlainTextResponse:
        require_allowed()
        await server.models.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadRequest) -> PlainTextResponse:
        require_allowed()
        await server.models.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _add_state(app: FastAPI, server: Server) -> None:
    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return Response(status_code=200 if server.scheduler.running else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        text = server.metrics.render(server.scheduler.load(), server.engine.bank)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of `work`, which is cancelled when the client leaves; None then."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        both: list[asyncio.Future[Any]] = [task, watch]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()
