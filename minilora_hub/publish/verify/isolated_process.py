"""Run `isolated_worker.py` in a process that cannot import minilora_hub and has no secrets.

Its environment has no token and no other secret, its home folder is an empty one, and its Hub client is offline, so
everything that it loads must be in the Hub's cache or in a folder. This keeps secrets from code that merely looks for
them; it is not a sandbox, since the process runs as the same user.
"""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import constants

WORKER = Path(__file__).with_name("isolated_worker.py")

PASSED_ON = re.compile(
    "PATH|LANG|LANGUAGE|LC_.*|TZ|TMPDIR|TEMP|TMP|USER|LOGNAME|USERNAME|VIRTUAL_ENV|PYTHON.*|LD_.*|DYLD_.*"
    "|SYSTEMROOT|WINDIR|COMSPEC|PATHEXT|NUMBER_OF_PROCESSORS|PROCESSOR_.*"
    "|OMP_.*|GOMP_.*|KMP_.*|MKL_.*|OPENBLAS_.*|DNNL_.*|ONEDNN_.*|ATEN_.*|TORCH_.*|PYTORCH_.*|TRITON_.*"
    "|CUDA_.*|CUBLAS_.*|CUDNN_.*|NVIDIA_.*|HIP_.*|ROCR_.*|ROCM_.*|HSA_.*",
    re.IGNORECASE,
)
"""Environment variables that Python, torch and their libraries need. Others may hold secrets and are not passed on."""


class IsolatedProcess:
    """A process that runs jobs in turn and loads adapters with transformers and PEFT only, without minilora_hub.

    with IsolatedProcess() as process:
        answer = process.run({"target": "user/adapter", ...}, code=None)
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._code: str | None = None

    def __enter__(self) -> IsolatedProcess:
        """Create its folders; the process starts with the first job."""
        self._scratch = tempfile.TemporaryDirectory(prefix="minilora-verify-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process and remove its folders."""
        self._stop()
        self._scratch.cleanup()

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            with suppress(BrokenPipeError):  # unsent input of a process that died
                stream.close()
        self._process = None

    def run(self, job: dict[str, Any], code: str | None) -> dict[str, Any]:
        """Run one job and return its answer, ``{"error": …}`` where it failed or the process died.

        Args:
            job: see `isolated_worker.py`.
            code: hash of the code that the job runs. A job with different code gets a new process, because
                transformers registers the classes it has loaded and would use those of the previous job.
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
            last = self._last_log_line()
            ended = process.returncode
            self._stop()
            return {"error": f"the process ended with code {ended}" + (f": {last}" if last else "")}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> None:
        self._log = Path(self._scratch.name, "log").open("w+", encoding="utf-8")  # noqa: SIM115  (lives as long as it)
        # -P keeps the script's folder, which is inside minilora_hub, off the module path.
        self._process = subprocess.Popen(  # noqa: S603  (our own script)
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(Path(self._scratch.name)),
            text=True,
            encoding="utf-8",
        )

    def _last_log_line(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else ""


def _environment(scratch: Path) -> dict[str, str]:
    """Return the environment of the process: it can read the Hub's cache and cannot reach the Hub."""
    home = scratch / "home"
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    if site.ENABLE_USER_SITE:  # found through the home folder otherwise
        environment["PYTHONUSERBASE"] = site.getuserbase()
    return environment | {
        "HOME": str(home),
        "USERPROFILE": str(home),
        "HF_HOME": str(home / "huggingface"),  # here the Hub's client looks for a stored token
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # A separate folder for the repo's code, so that code cached from another repo cannot run instead.
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "TOKENIZERS_PARALLELISM": "false",
        "MINILORA_PRODUCTS": "plain",  # the logits were recorded this way; another choice would round differently
    }
