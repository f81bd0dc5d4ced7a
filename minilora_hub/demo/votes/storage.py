"""Where a page keeps what outlives it: votes and shared comparisons, written whole or not at all. No Gradio."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from minilora_hub.errors import PageError

LOCK_SECONDS = 20


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other threads and processes that write into it; the folder is made if need be.

    Raises:
        PageError: another writer holds it for too long, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Of its own each time: a FileLock object that is shared lets its own thread in twice.
        with FileLock(folder / ".lock", timeout=LOCK_SECONDS, is_singleton=False):
            yield
    except Timeout:
        raise PageError(f"the page's data is held by another writer for more than {LOCK_SECONDS} s") from None


def append_line(file: Path, line: bytes) -> None:
    """Append one line, so that it is on the disk when this returns. Call it while the folder is `locked`.

    A line that a killed writer left torn stays a line of its own. Where the disk is full, nothing is left behind.

    Raises:
        OSError: it cannot be written.
    """
    # Unbuffered: what a full disk refused must not be written by the buffer when the file is closed.
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
