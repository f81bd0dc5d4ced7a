"""Retry calls to the Hub, and convert their failures to one-line messages that say what to do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import errors

Result = TypeVar("Result")

ATTEMPTS = 5
LONGEST_WAIT = 60.0
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed."""

INCOMPLETE = (json.JSONDecodeError, UnicodeDecodeError)
FAILURES = (errors.HTTPError, errors.XetDownloadError, OSError, RuntimeError, *INCOMPLETE)
"""What the client raises when the Hub or the connection fails; its uploads wrap the cause in a RuntimeError."""


def patiently(
    call: Callable[[], Result],
    attempts: int = ATTEMPTS,
    recover: Callable[[BaseException], Result | None] = lambda error: None,
) -> Result:
    """Call a function, and call it again after statuses that say "later" and after broken connections.

    Args:
        call: the function.
        attempts: the largest number of calls.
        recover: for a call that must not be made twice: called with its failure, returns the result if the Hub did what
            was asked all the same and only the answer was lost, and None if it did not.

    Raises:
        Exception: what the last call raised, or what `recover` raises.
    """
    for attempt in range(attempts):
        try:
            return call()
        except FAILURES as error:
            if (result := recover(error)) is not None:
                return result
            if not is_passing(error) or attempt == attempts - 1:
                raise
            time.sleep(wait_after(error, attempt))
    raise AssertionError("unreachable")


def root_cause(error: BaseException) -> BaseException:
    """Return the failure of the connection or the Hub inside the client's own errors."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the Hub's answer, None where there was none."""
    cause = root_cause(error)
    return cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: the Hub is busy, or the connection broke."""
    status = status_of(error)
    if status is not None:
        return status in BUSY
    return isinstance(root_cause(error), (errors.HTTPError, *INCOMPLETE))


def wait_after(error: BaseException, attempt: int) -> float:
    """Return the seconds to wait before the next call: what the Hub asks for, else twice as long each time."""
    cause = root_cause(error)
    asked = cause.response.headers.get("Retry-After", "") if isinstance(cause, errors.HfHubHTTPError) else ""
    return min(float(asked) if asked.isdigit() else 2.0**attempt, LONGEST_WAIT)


def explain(error: BaseException, repo_id: str, doing: str) -> str:
    """Return a one-line message about what failed and what to do.

    Args:
        error: what the client raised.
        repo_id: the repo.
        doing: what was being done, e.g. ``"uploading the files"``.
    """
    cause, status = root_cause(error), status_of(error)
    if isinstance(cause, errors.RepositoryNotFoundError):
        what = f"{repo_id} is not on the Hub (any more), or this token may not see it: check the name and the token"
    elif isinstance(cause, errors.RevisionNotFoundError):
        what = f"{repo_id} has no such revision: check its branches and tags"
    elif status == 401:
        what = "the token is not valid (any more): make one at the Hub's settings, then `hf auth login` or set HF_TOKEN"
    elif status == 403:
        what = f"the token may not do this in {repo_id}: it needs the role write there ({server_message(cause)})"
    elif status == 429:
        what = "too many requests (HTTP 429): try again in some minutes"
    elif status is not None and status >= 500:
        what = f"the Hub failed (HTTP {status}): try again later"
    elif status is not None:
        what = f"the Hub refused it (HTTP {status}: {server_message(cause)})"
    elif isinstance(cause, errors.OfflineModeIsEnabled):
        what = "HF_HUB_OFFLINE is set, so the Hub cannot be reached: unset it"
    elif isinstance(cause, errors.HTTPError):
        what = f"the connection to the Hub broke ({type(cause).__name__}): check it and try again"
    elif isinstance(cause, INCOMPLETE):
        what = "the Hub's answer was incomplete: try again"
    else:
        what = f"{type(cause).__name__}: {cause}"
    return " ".join(f"{doing}: {what}".split())


def server_message(error: BaseException) -> str:
    """Return the Hub's own message about an error, in one line."""
    return " ".join((getattr(error, "server_message", None) or "no reason given").split())
