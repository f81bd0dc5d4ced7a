"""Lock the output folder of a run, and store the state of the run in it.

The state allows a run to be resumed, but only with the data it started with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minilora_hub.documents import write_whole
from minilora_hub.errors import TrainingError
from minilora_hub.training.settings import SETTINGS_FILE, TrainingSettings, make_settings, read_yaml

LOCK_FILE, STATE_FILE = ".lock", "run.json"


@contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder, creating the folder if it is missing.

    The operating system releases the lock even after SIGKILL. The lock file holds the id of its process; it is removed
    at the end, as is the folder if it was created here and nothing was written into it.

    Raises:
        TrainingError: another run holds the lock, or the folder cannot be created.
    """
    new = not out.exists()
    lock, file = FileLock(out / LOCK_FILE), out / LOCK_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except FileExistsError:
        raise TrainingError(f"out={str(out)!r}: is a file") from None
    except Timeout:
        raise TrainingError(
            f"out={str(out)!r}: another run writes into it{_holder(file)}: wait for its end, or pass another --out"
        ) from None
    except OSError as error:
        raise TrainingError(f"out={str(out)!r}: cannot be written ({error.strerror or error})") from error
    try:
        with suppress(OSError):
            file.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()
        if new:
            with suppress(OSError):  # it is no longer empty
                out.rmdir()


def _holder(file: Path) -> str:
    try:
        number = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return f" (process {number})" if number.isdigit() else ""


def is_empty(out: Path) -> bool:
    """Return whether a folder holds nothing but a lock, or does not exist."""
    return not out.is_dir() or all(path.name == LOCK_FILE for path in out.iterdir())


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        data_sha256: hash of its tokens and labels.
        seconds: training time up to the last checkpoint.
        finished: whether the result is written.
        begun: start time in ISO format, which chat templates use as the date even after a resume on another day.
        inputs: hashes of the adapters and texts that the run reads besides base and data.
    """

    data_sha256: str
    seconds: float = 0.0
    finished: bool = False
    begun: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)

    def save(self, out: Path) -> None:
        """Write ``run.json``."""
        write_whole(out / STATE_FILE, json.dumps(asdict(self), indent=2) + "\n")


def reason_of(error: Exception) -> str:
    """Return why a file could not be written, of an OSError or of safetensors' error."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]


def how_to_resume(out: Path, saved: str | None) -> str:
    """Say what of a run in `out` is saved (the name of its last complete checkpoint), and how it continues."""
    if saved is None:
        return "no checkpoint was saved before"
    return f"{saved} is complete: free disk space, then minilora train --resume --out {out} goes on from it"


def read_state(out: Path) -> RunState | None:
    """Return the state of the run in a folder, or None if there is none.

    Raises:
        TrainingError: the file is damaged.
    """
    file = out / STATE_FILE
    if not file.is_file():
        return None
    try:
        return RunState(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise TrainingError(f"{STATE_FILE} in {out.name!r} cannot be read ({error}): use another --out") from error


def resumed_settings(out: Path, given: dict[str, Any], config: str | Path | None) -> TrainingSettings | None:
    """Return the settings that a run began with, or None if it never began; given settings must be equal to them."""
    if not (out / SETTINGS_FILE).is_file():
        if given.get("method") or given.get("from_adapter") or config:
            return None
        raise TrainingError(f"--resume: {str(out)!r} holds no {SETTINGS_FILE}, so no run to resume")
    before = read_yaml(out / SETTINGS_FILE)
    settings = make_settings(before)
    asked = make_settings(before, read_yaml(Path(config)) if config else {}, given).to_dict()
    for name, value in settings.to_dict().items():
        if asked[name] != value:
            raise TrainingError(
                f"--resume: the run began with {name}={value!r}, now it is {asked[name]!r}: leave it out"
            )
    return settings
