"""HubServer: the sockets, the request log, and the surface that tests use.

with HubServer() as hub:
    token = hub.add_user("ana")
    api = HfApi(endpoint=hub.endpoint, token=token)          # in process
    subprocess.run(..., env={**os.environ, **hub.environment(token, cache_dir=tmp_path)})
    hub.repo("ana/adapter").files("main")                    # what arrived
    hub.faults.add(kind="status", status=429, headers={"Retry-After": "0"}, path_regex="/preupload/")
    hub.requests                                             # what was sent
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import socket
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest

from . import api, downloads, refs, spaces, trees, uploads  # noqa: F401  importing them registers their routes
from .accounts import Accounts, Caller, HubError, repo_not_found
from .faults import Fault, Faults, corrupted
from .routing import Answer, Call, find
from .store import REPO_TYPES, Clock, Repo


@dataclass
class RequestRecord:
    """One request in the log: never its token, nor its query. A dropped one has status 0."""

    method: str
    path: str
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    user: str | None = None
    range: str | None = None


class HubServer:
    """A Hub on a free port of 127.0.0.1, for as long as the `with` block lasts."""

    def __init__(self, lfs_threshold: int = 10 * 2**20) -> None:
        """Prepare an empty Hub; files above `lfs_threshold` bytes go through LFS whatever their name.

        Attributes:
            pull_requests: "open" where commits may open them; "refused" where they are turned off; "ignored" on a Hub
                that does not know them: it makes the commit on the branch itself.
            searches_tags: whether a search by tag is one; else it answers with every model.
        """
        self.lfs_threshold = lfs_threshold
        self.pull_requests: Literal["open", "refused", "ignored"] = "open"
        self.searches_tags = True
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[RequestRecord] = []
        self.failures: list[str] = []
        self.faults = Faults()
        self.closing = threading.Event()
        self.lock = threading.RLock()
        self._accounts = Accounts()
        self._clock = Clock()
        self._key = secrets.token_bytes(16)

    def __enter__(self) -> HubServer:
        """Start to serve."""
        self._server = _Server(("127.0.0.1", 0), _Handler, self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Stop, close every connection, and raise if a route failed by a mistake of its own."""
        self.closing.set()
        self._server.stop()
        self._thread.join()
        if self.failures and error is None:
            raise AssertionError("the test Hub itself failed:\n" + "\n".join(self.failures))

    def add_user(self, name: str, role: str = "write", organizations: tuple[str, ...] = ()) -> str:
        """Return a new token of the user `name`; `role` is "read" or "write". One user may have several."""
        return self._accounts.add(name, role, organizations)

    def expire(self, token: str) -> None:
        """Make a token invalid from now on."""
        self._accounts.expire(token)

    def add_repo(
        self,
        repo_id: str,
        type: str = "model",
        *,
        files: Mapping[str, bytes] | None = None,
        private: bool = False,
        sdk: str | None = None,
    ) -> Repo:
        """Create a repository without a request, with `files` in it."""
        if type not in REPO_TYPES or repo_id.count("/") != 1:
            raise HubError(400, f"expected namespace/name and a type of {REPO_TYPES}, got {repo_id!r} and {type!r}")
        with self.lock:
            repo = self.repos[(type, repo_id)] = Repo(type, repo_id, self._clock, private=private, sdk=sdk)
            if files:
                repo.push(files, "first files")
        return repo

    def repo(self, repo_id: str, type: str = "model") -> Repo:
        """Return a repository as it is stored; KeyError where there is none."""
        return self.repos[(type, repo_id)]

    def environment(self, token: str | None = None, cache_dir: str | Path | None = None) -> dict[str, str]:
        """Return the variables that make a subprocess's Hugging Face libraries use this Hub and `cache_dir`.

        Without a token the process is anonymous, whatever it would inherit.
        """
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        if cache_dir is not None:
            variables |= {"HF_HOME": str(cache_dir), "HF_HUB_CACHE": str(Path(cache_dir, "hub"))}
            variables |= {"HF_MODULES_CACHE": str(Path(cache_dir, "modules"))}
        return variables

    def use_in_process(self, monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
        """Make the client in this process use this Hub and `cache_dir`, without Xet and progress bars."""
        settings = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
            "HF_HUB_CACHE": str(cache_dir / "hub"),
            "HF_TOKEN_PATH": str(cache_dir / "token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)

    def sent(self, method: str | None = None, path_regex: str = "") -> list[RequestRecord]:
        """Return the logged requests of a method whose path matches."""
        log = list(self.requests)
        return [record for record in log if method in {None, record.method} and re.search(path_regex, record.path)]

    def sees(self, caller: Caller | None, repo: Repo) -> bool:
        """Whether a caller may read a repository."""
        return not repo.private or (caller is not None and caller.owns(repo.namespace))

    def visible(self, type: str, repo_id: str, caller: Caller | None) -> Repo:
        """Return a repository the caller may read; a hidden one and a missing one answer alike."""
        repo = self.repos.get((type, repo_id))
        if repo is None or not self.sees(caller, repo):
            raise repo_not_found(caller)
        return repo

    def sign(self, repo: Repo, oid: str) -> str:
        """Return the signature that permits the upload of an object to a repository."""
        return hmac.new(self._key, f"{repo.type} {repo.id} {oid}".encode(), hashlib.sha256).hexdigest()

    def answer(self, method: str, target: str, headers: Any, body: bytes, record: RequestRecord) -> Answer:
        """Answer one request; HubErrors become error answers, anything else a 500 that the test will see."""
        url = urlsplit(target)
        try:
            with self.lock:
                caller = self._accounts.caller(headers.get("Authorization"))
                record.user = caller.name if caller else None
                function, parts = find(method, url.path)
                query = parse_qs(url.query, keep_blank_values=True)
                return function(Call(self, caller, parts, query, headers, body))
        except HubError as error:
            return Answer.of_error(error)
        except Exception:
            self.failures.append(f"{method} {record.path}\n{traceback.format_exc()}")
            return Answer.of_error(HubError(500, f"the test Hub failed on {method} {record.path}"))


class _Server(ThreadingHTTPServer):
    """Threads that are joined, and connections that end with the server."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], hub: HubServer) -> None:
        """Bind, and remember the Hub the handlers serve."""
        self.hub = hub
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Keep the connection in sight while a thread serves it."""
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close the connection."""
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def stop(self) -> None:
        """Stop listening, hang up on clients that keep their connection alive, and join their threads."""
        self.shutdown()
        with self._open_lock:
            for connection in self._open:
                hang_up(connection)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note a failure of the connection's own code for the test to see."""
        self.hub.failures.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, lets faults strike, writes answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def handle(self) -> None:
        """Serve until the connection ends; a client that leaves early is no failure."""
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def serve(self) -> None:
        """Serve one request."""
        hub, body = self.server.hub, self._read_body()
        path = unquote(urlsplit(self.path).path)
        record = RequestRecord(self.command, path, bytes_in=len(body), range=self.headers.get("Range"))
        fault = hub.faults.take(self.command, path)
        if fault and fault.kind == "slow":
            hub.closing.wait(fault.delay)
        if fault and fault.kind == "corrupt" and body:
            body = corrupted(body)
        skipped = fault is not None and fault.kind in {"status", "drop"} and not fault.applied
        answer = Answer() if skipped else hub.answer(self.command, self.path, self.headers, body, record)
        self._send(answer, fault, record)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _send(self, answer: Answer, fault: Fault | None, record: RequestRecord) -> None:
        """Log the request and write its answer, as the fault leaves it."""
        kind = fault.kind if fault else None
        if fault and kind == "status":
            answer = Answer.of_error(HubError(fault.status, "an injected fault", headers=fault.headers))
        if kind == "drop":
            self.server.hub.requests.append(record)
            self._drop()
            return
        body = answer.body if self.command != "HEAD" else b""
        sent = corrupted(body) if kind == "corrupt" and not record.bytes_in else body
        sent = sent[: len(sent) // 2] if kind == "truncate" else sent
        record.status, record.bytes_out = answer.status, len(sent)
        self.server.hub.requests.append(record)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(sent)
        if kind == "truncate":
            self._drop()

    def _drop(self) -> None:
        """End the connection here and now."""
        self.close_connection = True
        hang_up(self.connection)

    def _read_body(self) -> bytes:
        """Read the whole body, so that the next request of the connection starts where it should."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError(f"the client sent {len(body)} of {length} bytes")
        return body


def hang_up(connection: socket.socket) -> None:
    """Shut a connection down in both directions, if it still is one."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
