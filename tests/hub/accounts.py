"""Users, tokens, and the errors the Hub answers with."""

from __future__ import annotations

import secrets
from dataclasses import dataclass


class HubError(Exception):
    """An error answer: a status, a message and, where the client looks for one, an `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        """Keep what the answer carries."""
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True)
class Caller:
    """Whoever holds a token: a user name, the organisations it belongs to, and the token's role."""

    name: str
    role: str
    organizations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        """Whether repositories under `namespace` are this caller's."""
        return namespace == self.name or namespace in self.organizations


class Accounts:
    """The tokens handed out so far. Tokens are random, never logged and never part of an answer."""

    def __init__(self) -> None:
        """Start without users."""
        self._callers: dict[str, Caller] = {}

    def add(self, name: str, role: str = "write", organizations: tuple[str, ...] = ()) -> str:
        """Return a new token of the user `name`, whose role is "read" or "write"."""
        if role not in {"read", "write"}:
            raise ValueError(f"role must be 'read' or 'write', got {role!r}")
        token = "hf_" + secrets.token_hex(17)
        self._callers[token] = Caller(name, role, tuple(organizations))
        return token

    def expire(self, token: str) -> None:
        """Make `token` unknown from now on."""
        del self._callers[token]

    def caller(self, authorization: str | None) -> Caller | None:
        """Return who sent this Authorization header, None for nobody; an unknown token is refused with 401."""
        if not authorization:
            return None
        caller = self._callers.get(authorization.removeprefix("Bearer ").strip())
        if caller is None:
            # The client tells a bad token from a hidden repository by this exact message.
            raise HubError(401, "Invalid credentials in Authorization header")
        return caller


def repo_not_found(caller: Caller | None) -> HubError:
    """Return what the Hub says of a missing repository and of one the caller may not see: the same thing."""
    if caller is None:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


def check_writer(caller: Caller | None, namespace: str) -> None:
    """Refuse a caller who may not write under `namespace`."""
    if caller is None:
        raise HubError(401, "Invalid username or password.")
    if caller.role != "write":
        raise HubError(403, f"the token of {caller.name} may only read; writing needs a token with the role write")
    if not caller.owns(namespace):
        raise HubError(403, f"{caller.name} may not write under {namespace}")
