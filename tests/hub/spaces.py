"""The /api routes of a Space beside its repository: variables, secrets, hardware, what runs, its logs.

A commit starts a build, which ends after some looks at the runtime, as `Space.stages` says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .accounts import HubError
from .routing import Answer, Call, route
from .store import Repo

API = r"/api/spaces/(?P<id>[^/]+/[^/]+)"
BUILD = ("BUILDING", "BUILDING", "APP_STARTING", "RUNNING")


@dataclass
class Space:
    """What a Space has beside files.

    Attributes:
        variables: {name: value}, which everybody reads.
        secrets: {name: value}, which nobody reads back.
        hardware: what it runs on.
        stages: what the looks at the runtime after a commit see, the last one for ever.
        late: looks after a commit that still see the stage of before, as the real Hub's do for a moment.
        log: lines of the build's and the app's log.
    """

    variables: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    hardware: str = "cpu-basic"
    stages: tuple[str, ...] = BUILD
    late: int = 0
    log: tuple[str, ...] = ()
    sleep: int | None = None
    restarts: int = 0
    _built: str | None = None
    _before: str = "NO_APP_FILE"
    _looks: int = 0

    def look(self, repo: Repo) -> tuple[str, str | None]:
        """Return the stage and the commit it is about, and move on by one."""
        head = repo.commit().oid
        if "app.py" not in repo.files():
            return "NO_APP_FILE", None
        if self._built != head:
            if self._looks < self.late:
                self._looks += 1
                return self._before, self._built
            self._built, self._looks = head, 0
        stage = self.stages[min(self._looks, len(self.stages) - 1)]
        self._looks += 1
        if self._looks >= len(self.stages):
            self._before = stage
            self._looks = len(self.stages)
        return stage, head

    def committed(self) -> None:
        """Count the looks of the next build from here."""
        self._looks = 0

    def runtime(self, repo: Repo) -> dict[str, Any]:
        """Return the runtime as the API writes it."""
        stage, sha = self.look(repo)
        return {
            "stage": stage,
            "hardware": {"current": self.hardware if stage == "RUNNING" else None, "requested": self.hardware},
            "gcTimeout": self.sleep,
            "storage": None,
            "devMode": False,
            **({"sha": sha} if sha else {}),
        }


def create_space(repo: Repo, sent: dict[str, Any]) -> None:
    """Take what `create_repo` sends for a Space; the sdk must be named."""
    if sent.get("sdk") not in {"gradio", "docker", "static", "streamlit"}:
        raise HubError(400, f'"sdk" must be one of gradio, docker, static, got {sent.get("sdk")!r}')
    repo.space = Space(
        variables={entry["key"]: entry["value"] for entry in sent.get("variables") or []},
        secrets={entry["key"]: entry["value"] for entry in sent.get("secrets") or []},
        hardware=sent.get("hardware") or "cpu-basic",
        sleep=sent.get("sleepTimeSeconds"),
    )


def space_of(call: Call, *, write: bool) -> Space:
    """Return the Space of the path; its variables are for those who may write."""
    call.parts["type"] = "space"
    repo = call.writable_repo() if write else call.repo()
    if repo.space is None:
        repo.space = Space()
    return repo.space


@route("GET", rf"{API}/variables")
def get_variables(call: Call) -> Answer:
    """List the variables."""
    space = space_of(call, write=True)
    return Answer.of_json({name: {"value": value} for name, value in space.variables.items()})


@route("POST", rf"{API}/variables")
def add_variable(call: Call) -> Answer:
    """Set a variable, which restarts the app."""
    space, sent = space_of(call, write=True), call.json()
    space.variables[sent["key"]] = sent["value"]
    space.restarts += 1
    return get_variables(call)


@route("DELETE", rf"{API}/variables")
def delete_variable(call: Call) -> Answer:
    """Remove a variable."""
    space_of(call, write=True).variables.pop(call.json()["key"], None)
    return get_variables(call)


@route("GET", rf"{API}/secrets")
def get_secrets(call: Call) -> Answer:
    """List the names of the secrets."""
    return Answer.of_json({name: {} for name in space_of(call, write=True).secrets})


@route("POST", rf"{API}/secrets")
def add_secret(call: Call) -> Answer:
    """Set a secret, which restarts the app."""
    space, sent = space_of(call, write=True), call.json()
    space.secrets[sent["key"]] = sent["value"]
    space.restarts += 1
    return Answer.of_json({})


@route("POST", rf"{API}/hardware")
def request_hardware(call: Call) -> Answer:
    """Change what it runs on; what costs money needs an account that pays, which these users have not."""
    space, sent = space_of(call, write=True), call.json()
    if not sent["flavor"].startswith(("cpu-basic", "zero-")):
        raise HubError(402, f"{sent['flavor']} needs a payment method on the account")
    space.hardware = sent["flavor"]
    call.parts["type"] = "space"
    return Answer.of_json(space.runtime(call.repo()))


@route("GET", rf"{API}/runtime")
def get_runtime(call: Call) -> Answer:
    """Say what the Space is doing."""
    space = space_of(call, write=False)
    return Answer.of_json(space.runtime(call.repo()))


@route("GET", rf"{API}/logs/(?P<log>build|run)")
def get_log(call: Call) -> Answer:
    """Send the log as server-sent events."""
    log = space_of(call, write=True).log
    events = [json.dumps({"data": line + "\n", "timestamp": "2026-01-01T00:00:00Z"}) for line in log]
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    return Answer(body, headers={"Content-Type": "text/event-stream"})
