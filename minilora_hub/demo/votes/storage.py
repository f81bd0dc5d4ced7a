"""Lock the folders of votes and shared comparisons, and append lines atomically. No Gradio."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from minilora_hub.errors import PageError

LOCK_SECONDS = 20


@contextmanager
def locked(folder: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Lock a folder against other threads and processes that write into it; create it if it does not exist.

    Raises:
        PageError: another writer holds it for longer than `seconds`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A new object each time, because a shared lock is reentrant in its thread.
        with FileLock(folder / ".lock", timeout=seconds, is_singleton=False):
            yield
    except Timeout:
        raise PageError(f"the page's data is held by another writer for more than {seconds} s") from None


def append_line(file: Path, line: bytes) -> None:
    """Append one line and flush it to disk. The folder must be `locked`.

    If a killed writer left an incomplete line, the new line starts after it. If the disk is full, nothing is appended.

    Raises:
        OSError: it cannot be written.
    """
    # Unbuffered: on close, a buffer would retry the data whose write has failed.
    with file.open("a+b", buffering=0) as out:
        size = out.seek(0, os.SEEK_END)
        if size:
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":
                line = b"\n" + line
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[out.write(rest) :]
            os.fsync(out.fileno())
        except OSError:
            out.truncate(size)
            raise
