"""One request, one answer, and the table of routes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from .accounts import Caller, HubError, check_writer
from .store import Commit, Repo

if TYPE_CHECKING:
    from .server import HubServer

REPO = r"(?P<id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<type>model|dataset|space)s/{REPO}"
REVISION = r"(?P<revision>refs/[^/]+/[^/]+|[^/]+)"


@dataclass
class Answer:
    """What a route answers with."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
        """Answer with a JSON value."""
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    @classmethod
    def of_error(cls, error: HubError) -> Answer:
        """Answer with an error, its message both in the body and in the header the client reads."""
        message = " ".join(error.message.split()).encode("ascii", "replace").decode()
        headers = {"X-Error-Message": message, **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        return cls.of_json({"error": error.message}, error.status, headers)


@dataclass
class Call:
    """One request as a route sees it: the hub, who calls, the path's parts, the query and the body."""

    hub: HubServer
    caller: Caller | None
    parts: dict[str, str]
    query: dict[str, list[str]]
    headers: Message
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"the body is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise HubError(400, f"the body must be a JSON object, got {type(value).__name__}")
        return value

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to something true."""
        return self.query.get(name, [""])[-1].lower() in {"1", "true"}

    @property
    def create_pr(self) -> bool:
        """Whether the commit is to open a pull request, on a Hub that knows what that is."""
        asked = self.flag("create_pr") and self.hub.pull_requests != "ignored"
        if asked and self.hub.pull_requests == "refused":
            raise HubError(403, "Pull requests are disabled for this repository")
        return asked

    def repo(self) -> Repo:
        """Return the repository of the path, if the caller may see it."""
        return self.hub.visible(self.parts.get("type") or "model", self.parts["id"], self.caller)

    def writable_repo(self) -> Repo:
        """Return the repository of the path, if the caller may write to it."""
        repo = self.repo()
        check_writer(self.caller, repo.namespace)
        return repo

    def proposable_repo(self) -> Repo:
        """Return the repository of the path, if the caller may open a pull request: any writer who sees it may."""
        repo = self.repo()
        check_writer(self.caller, self.caller.name if self.caller else "")
        return repo

    def commit(self, repo: Repo) -> Commit:
        """Return the commit that the path's revision names, main where it names none."""
        return repo.commit(self.parts.get("revision") or "main")


Route = Callable[[Call], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Register a function for a method and a pattern over the quoted path."""

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


def find(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """Return the route for a request and the unquoted parts of its path. HEAD is GET without a body."""
    method = "GET" if method == "HEAD" else method
    for registered, pattern, function in ROUTES:
        if registered == method and (found := pattern.fullmatch(path)):
            return function, {name: unquote(part) for name, part in found.groupdict().items() if part is not None}
    raise HubError(404, f"no route for {method} {unquote(path)}")
