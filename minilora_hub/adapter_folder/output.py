"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minilora_hub.errors import AdapterError


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `out` when the block ends well, and vanishes when it does not.

    It lies beside `out`, so that the last step is a rename on one file system.

    Args:
        out: a folder that is empty, or not there yet.

    Raises:
        AdapterError: it is something else. Nothing was written then.
    """
    out = Path(out)
    require_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out.parent) as scratch:
        folder = Path(scratch, "folder")
        folder.mkdir()
        yield folder
        if out.exists():
            out.rmdir()
        os.replace(folder, out)


def require_free(out: str | Path) -> None:
    """Raise an AdapterError unless `out` can be written: it is an empty folder, or not there yet."""
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise AdapterError(f"out={str(out)!r}: must be a folder that is empty, or not there yet")
