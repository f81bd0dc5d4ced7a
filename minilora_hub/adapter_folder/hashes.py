"""sha256 of files, each read once: one hash serves verification.json, the checks, the plan and the commit.

Large files are copied and hashed in the background, which costs the rest of the work next to nothing on two cores.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

LARGE = 2**20
Stamp = tuple[int, int, int]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        if path.stat().st_size < LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        # Mapped, so that it is one call: read in pieces, it would wait for the other threads after each of them.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


class Hashes:
    """The hashes of files that do not change; one that was changed all the same is read again."""

    def __init__(self) -> None:
        """Start without any."""
        self._known: dict[Path, Future[tuple[Stamp, str]]] = {}

    def start(self, path: Path) -> None:
        """Begin to hash a file in the background, where that was not begun yet."""
        if path not in self._known:
            self._known[path] = _background().submit(_stamped_hash, path)

    def copy(self, source: Path, out: Path, *, link: bool = False) -> Future[tuple[Stamp, Stamp]]:
        """Begin to copy a file in the background. Its hash is that of `source`, which is read meanwhile.

        Where `source` does not stay the same from before it is hashed until it is copied, the copy itself is hashed.

        Args:
            source: the file.
            out: where to.
            link: a hard link will do, where the system makes one: for a folder that is read once and removed.

        Returns:
            What tells when the copy is there, and raises OSError if it cannot be made.
        """
        self.start(source)
        if link and _link(source, out):
            self._known[out] = self._known[source]
            there: Future[tuple[Stamp, Stamp]] = Future()
            there.set_result((stamp(source), stamp(out)))
            return there
        copied = _background().submit(_copy, source, out)
        self._known[out] = _background().submit(_hash_of_copy, copied, self._known[source], out)
        return copied

    def moved(self, source: Path, out: Path) -> Hashes:
        """Return the hashes of the files under `source` after that folder became `out`."""
        there = Hashes()
        there._known = {out / p.relative_to(source): h for p, h in self._known.items() if p.is_relative_to(source)}
        return there

    def of(self, path: Path) -> str:
        """Return a file's sha256, in hexadecimal digits."""
        if path not in self._known or self._known[path].result()[0] != stamp(path):
            known: Future[tuple[Stamp, str]] = Future()
            known.set_result(_stamped_hash(path))
            self._known[path] = known
        return self._known[path].result()[1]


@cache
def _background() -> ThreadPoolExecutor:
    # What waits for another task was handed in after it, so it never keeps that one from running.
    return ThreadPoolExecutor(2, thread_name_prefix="minilora-hash")


def _link(source: Path, out: Path) -> bool:
    """Whether there is a hard link now: not to an executable file, as a copy is none, nor between file systems."""
    source = source.resolve()
    try:
        if source.stat().st_mode & 0o111:
            return False
        os.link(source, out)
    except OSError:
        return False
    return True


def _copy(source: Path, out: Path) -> tuple[Stamp, Stamp]:
    before = stamp(source)
    shutil.copyfile(source, out)
    return before, stamp(source)


def _hash_of_copy(
    copied: Future[tuple[Stamp, Stamp]], of_source: Future[tuple[Stamp, str]], out: Path
) -> tuple[Stamp, str]:
    stamps = copied.result()
    if of_source.exception() is None:
        hashed, digest = of_source.result()
        if stamps == (hashed, hashed):
            return stamp(out), digest
    return _stamped_hash(out)


def _stamped_hash(path: Path) -> tuple[Stamp, str]:
    return stamp(path), file_sha256(path)


def stamp(path: Path) -> Stamp:
    """Return what is another one once a file was changed: size, time of the change, and inode."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
