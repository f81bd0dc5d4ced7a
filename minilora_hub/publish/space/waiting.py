"""Wait until a commit of a Space runs or fails."""

from __future__ import annotations

import time

from huggingface_hub import HfApi

from minilora_hub.errors import PublishError
from minilora_hub.hub.errors import FAILURES, explain, patiently
from minilora_hub.publish.push.progress import Stages

BUSY_STAGES = frozenset({"BUILDING", "RUNNING_BUILDING", "APP_STARTING", "RUNNING_APP_STARTING"})
LATE_SECONDS = 60.0
"""Seconds after a commit during which the Hub may still report the stage of the previous commit."""


def wait_until_it_runs(api: HfApi, space: str, commit: str, seconds: float, stages: Stages, poll: float = 2.0) -> str:
    """Wait until a commit runs, and return the stage.

    The client's own `wait_for_space` returns the first stage other than a building one, which directly after a commit
    may still be the stage of the previous commit.

    Raises:
        PublishError: it failed, or did not run in time; the message has the log's last line.
    """
    began, shown = time.monotonic(), ""
    while True:
        try:
            runtime = patiently(lambda: api.get_space_runtime(space))
        except FAILURES as error:
            raise PublishError(explain(error, space, "waiting for the Space") + "; its files are there") from None
        now, waited = str(getattr(runtime.stage, "value", runtime.stage)), time.monotonic() - began
        about = runtime.raw.get("sha")
        # If the Hub does not say which commit the stage belongs to, a build must have been seen first.
        late = now == "NO_APP_FILE" or (about != commit if about else not shown)
        if now not in BUSY_STAGES and (not late or waited > LATE_SECONDS):
            if now in ("RUNNING", "PAUSED", "STOPPED"):
                return now
            raise PublishError(f"{space}: {now}: {_last_line(api, space, build=now == 'BUILD_ERROR')}")
        if now in BUSY_STAGES and now != shown:
            stages.start({"BUILDING": "Building", "RUNNING_BUILDING": "Building"}.get(now, "Starting"))
            shown = now
        if waited > seconds:
            raise PublishError(
                f"{space} does not run after {seconds:g} s ({now}): look at {api.endpoint}/spaces/{space}"
            )
        time.sleep(min(poll, max(0.0, seconds - waited) + 0.01))


def _last_line(api: HfApi, space: str, *, build: bool) -> str:
    try:
        lines = [line.strip() for line in api.fetch_space_logs(space, build=build) if line.strip()]
    except FAILURES:
        lines = []
    last = lines[-1] if lines else "its log is empty"
    return f"{last} (the whole log: {api.endpoint}/spaces/{space}?logs={'build' if build else 'container'})"
