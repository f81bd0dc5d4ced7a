"""Store shared comparisons on disk under unguessable ids; the oldest are removed to make room. No Gradio."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from minilora_hub.demo.runs.comparison import Comparison
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.votes.storage import locked
from minilora_hub.documents import write_whole
from minilora_hub.errors import PageError

IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{22}", re.ASCII)
MOST_BYTES = 4 * 10**6
"""Maximum size of one comparison."""


class SharedComparisons:
    """The shared comparisons in a folder.

    Args:
        folder: created when the first comparison is stored.
        limits: maximum number and total size of the comparisons.
    """

    def __init__(self, folder: Path, limits: PageLimits | None = None) -> None:
        self.folder, self._limits = folder, limits or PageLimits()
        self._bytes = self._limits.shared_megabytes * 10**6

    def add(self, comparison: Comparison) -> str:
        """Store a comparison; the oldest are removed if there are too many.

        Returns:
            Its id: 128 random bits.

        Raises:
            PageError: it is too large, or cannot be stored.
        """
        content = comparison.to_json().encode("utf-8", "replace")
        if len(content) > (most := min(MOST_BYTES, self._bytes)):
            raise PageError(f"this comparison is {len(content) / 1e6:,.1f} MB: at most {most / 1e6:g} MB are shared")
        identifier = secrets.token_urlsafe(16)
        try:
            with locked(self.folder):
                self._make_room(len(content))
                write_whole(self.folder / f"{identifier}.json", content)
        except OSError as error:
            raise PageError(f"the comparison could not be stored: {error}") from error
        return identifier

    def get(self, identifier: str) -> Comparison:
        """Return a comparison by its id.

        Raises:
            PageError: there is none with this id, or its file is damaged.
        """
        if not isinstance(identifier, str) or not IDENTIFIER.fullmatch(identifier):
            raise PageError("this is not a share link of this page")
        try:
            content = (self.folder / f"{identifier}.json").read_bytes()
        except FileNotFoundError:
            raise PageError("there is no such comparison, or it was removed to make room for newer ones") from None
        except OSError as error:
            raise PageError(f"the comparison cannot be read: {error}") from error
        return Comparison.from_json(content)

    def _make_room(self, size: int) -> None:
        """Remove the oldest until another one of `size` bytes fits."""
        files = [(file.stat(), file) for file in self.folder.glob("*.json") if IDENTIFIER.fullmatch(file.stem)]
        kept = sorted((stat.st_mtime_ns, stat.st_size, file) for stat, file in files)
        count, total = len(kept) + 1, sum(entry[1] for entry in kept) + size
        for _, freed, file in kept:
            if count <= self._limits.shared and total <= self._bytes:
                return
            file.unlink(missing_ok=True)
            count, total = count - 1, total - freed
