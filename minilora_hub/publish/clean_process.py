"""Runs `stranger.py`: a process that cannot import minilora_hub, and keeps nothing of what it ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

STRANGER = Path(__file__).with_name("stranger.py")


class CleanProcess:
    """A process that loads adapters as somebody does who has only transformers (and PEFT). One job after the other.

    with CleanProcess(token=token) as stranger:
        answer = stranger.run({"target": "user/adapter", ...})
    """

    def __init__(self, token: str | None = None) -> None:
        """Prepare it; it starts with the first job.

        Args:
            token: for private repos; it travels in the environment, never on the command line.
        """
        self._token = token
        self._process: subprocess.Popen[str] | None = None
        self._code: str | None = None

    def __enter__(self) -> CleanProcess:
        """Make the folders it works in."""
        self._scratch = tempfile.TemporaryDirectory(prefix="minilora-verify-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process and remove what it wrote."""
        self._stop()
        self._scratch.cleanup()

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            with suppress(BrokenPipeError):  # what could not be sent to a process that died
                stream.close()
        self._process = None

    def run(self, job: dict[str, Any], code: str | None) -> dict[str, Any]:
        """Do one job (see `stranger.py`) and return its answer, ``{"error": …}`` where it failed or died.

        Args:
            job: what to do.
            code: hash of the code that the job runs. Other code gets another process: transformers registers the
                classes it has loaded, and would take those of the job before.
        """
        if code != self._code:
            self._stop()
        self._code = code
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            process.wait()
            last = self._last_words()
            ended = process.returncode
            self._stop()
            return {"error": f"the process ended with code {ended}" + (f": {last}" if last else "")}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> None:
        # A folder of its own for the repo's code: what another copy left in the user's cache must not be run instead.
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(self._scratch.name, "modules"))}
        environment |= {"TOKENIZERS_PARALLELISM": "false"}
        if self._token:
            environment["HF_TOKEN"] = self._token
        self._log = Path(self._scratch.name, "log").open("w+", encoding="utf-8")  # noqa: SIM115  (lives as long as it)
        # -P: the folder of the script, which is inside minilora_hub, stays off the module path.
        self._process = subprocess.Popen(  # noqa: S603  (our own script)
            [sys.executable, "-P", str(STRANGER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
            encoding="utf-8",
        )

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else ""
