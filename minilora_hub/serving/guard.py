"""Check every HTTP request before the application sees it: the API key, and the size of its body."""

from __future__ import annotations

import contextlib
import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minilora_hub.serving.responses import error_body
from minilora_hub.serving.settings import MOST_BODY_BYTES

OPEN_PATHS = frozenset(("/health",))
MOST_DISCARDED_BYTES = 8 * MOST_BODY_BYTES
"""How much of a body that is too large is read and discarded before the connection is closed."""


class Guard:
    """ASGI middleware.

    Args:
        app: what answers the requests that pass.
        api_key: the key that clients must send as ``Authorization: Bearer KEY``; None: no key is needed.
    """

    def __init__(self, app: ASGIApp, api_key: str | None = None) -> None:
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 413, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            body = error_body(401, "Authorization: must be 'Bearer' and the server's API key", None, "invalid_api_key")
            await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MOST_BODY_BYTES:
            await too_large(scope, receive, send)
            return
        read, started, exceeded = 0, False, False

        async def counted() -> Message:
            nonlocal read, exceeded
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BODY_BYTES and not started:  # a body in pieces names no length
                exceeded = True
                raise BodyTooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            if not exceeded:  # the application may turn the exception into an answer of its own
                started = True
                await send(message)

        with contextlib.suppress(BodyTooLargeError):
            await self._app(scope, counted, noted)
        if exceeded:
            await too_large(scope, receive, send)

    def _knows(self, authorization: bytes) -> bool:
        if self._key is None:
            return True
        kind, _, given = authorization.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key.encode())


class BodyTooLargeError(Exception):
    """The body of a request is larger than `MOST_BODY_BYTES`."""


async def too_large(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 413, after discarding more of the body: many clients read no answer before they have sent theirs."""
    discarded, more = 0, True
    while more and discarded <= MOST_DISCARDED_BYTES:
        message = await receive()
        discarded += len(message.get("body", b""))
        more = message.get("more_body", False)  # absent where the client has left
    shown = f"the body of the request: must be at most {MOST_BODY_BYTES} bytes"
    await JSONResponse(error_body(413, shown), 413, {"Connection": "close"})(scope, receive, send)
