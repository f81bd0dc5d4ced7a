"""One run at a time in an output folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from minilora_hub.errors import TrainingError

LOCK_FILE = ".lock"


@contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is made if it is missing.

    The operating system gives the lock back also after SIGKILL. The file in the folder says which process holds it; it
    is removed at the end, and so is the folder if it was made here and nothing was written into it.

    Raises:
        TrainingError: another run holds the lock, or the folder cannot be made.
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
            with suppress(OSError):  # it holds something by now
                out.rmdir()


def is_empty(out: Path) -> bool:
    """Return whether a folder holds nothing but a lock, or does not exist."""
    return not out.is_dir() or all(path.name == LOCK_FILE for path in out.iterdir())


def _holder(file: Path) -> str:
    try:
        number = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return f" (process {number})" if number.isdigit() else ""
