"""Comparisons that visitors shared: on disk, under ids that nobody can guess, the oldest making room. No Gradio."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from minilora_hub.demo.runs.comparison import Record
from minilora_hub.demo.runs.limits import whole_number
from minilora_hub.demo.votes.storage import locked
from minilora_hub.documents import write_whole
from minilora_hub.errors import PageError

IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{22}", re.ASCII)


@dataclass(frozen=True)
class ShareLimits:
    """What sharing may cost: comparisons kept, bytes of all of them, and of one."""

    count: int = 2000
    total_bytes: int = 200 * 10**6
    bytes_each: int = 4 * 10**6

    @classmethod
    def from_environment(cls) -> ShareLimits:
        """Read MINILORA_SHARED and MINILORA_SHARED_MEGABYTES.

        Raises:
            ValueError: one of them is no whole number of at least 1.
        """
        megabytes = whole_number("MINILORA_SHARED_MEGABYTES", cls.total_bytes // 10**6)
        return cls(whole_number("MINILORA_SHARED", cls.count), megabytes * 10**6)


class SharedComparisons:
    """The shared comparisons in a folder.

    Args:
        folder: where they are; it is made when the first comes.
        limits: how much it may hold.
    """

    def __init__(self, folder: Path, limits: ShareLimits | None = None) -> None:
        """Open it; nothing is read or made yet."""
        self.folder, self.limits = folder, limits or ShareLimits()

    def add(self, record: Record) -> str:
        """Store a comparison; the oldest go where there are too many.

        Returns:
            Its id: 128 random bits.

        Raises:
            PageError: it is too large, or cannot be stored.
        """
        content = record.to_json().encode("utf-8", "replace")
        if len(content) > min(self.limits.bytes_each, self.limits.total_bytes):
            largest = f"{self.limits.bytes_each / 1e6:g} MB"
            raise PageError(f"this comparison is {len(content) / 1e6:,.1f} MB: at most {largest} are shared")
        identifier = secrets.token_urlsafe(16)
        try:
            with locked(self.folder):
                self._make_room(len(content))
                write_whole(self.folder / f"{identifier}.json", content)
        except OSError as error:
            raise PageError(f"the comparison could not be stored: {error}") from error
        return identifier

    def get(self, identifier: str) -> Record:
        """Return a comparison that was shared.

        Raises:
            PageError: there is none of this id, or what is there is damaged.
        """
        if not isinstance(identifier, str) or not IDENTIFIER.fullmatch(identifier):
            raise PageError("this is no link that the page has given out")
        try:
            content = (self.folder / f"{identifier}.json").read_bytes()
        except FileNotFoundError:
            raise PageError("there is no such comparison, or it has made room for newer ones") from None
        except OSError as error:
            raise PageError(f"the comparison cannot be read: {error}") from error
        return Record.from_json(content)

    def _make_room(self, size: int) -> None:
        """Remove the oldest until another one of `size` bytes fits."""
        files = [(file.stat(), file) for file in self.folder.glob("*.json") if IDENTIFIER.fullmatch(file.stem)]
        kept = sorted((stat.st_mtime_ns, stat.st_size, file) for stat, file in files)
        count, total = len(kept) + 1, sum(entry[1] for entry in kept) + size
        for _, freed, file in kept:
            if count <= self.limits.count and total <= self.limits.total_bytes:
                return
            file.unlink(missing_ok=True)
            count, total = count - 1, total - freed
