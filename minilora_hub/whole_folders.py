"""Write a folder completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minilora_hub.errors import AdapterError


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `out` when the block succeeds, and removed when it fails.

    Args:
        out: a folder that is empty or does not exist.

    Raises:
        AdapterError: `out` is something else, or the disk is full. Nothing is left of it then.
    """
    out = Path(out)
    require_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out.parent) as scratch:  # on the file system of `out`
        folder = Path(scratch, "folder")
        try:
            folder.mkdir()
            yield folder
            if out.exists():
                out.rmdir()
            os.replace(folder, out)
        except OSError as error:
            if error.filename is not None:
                raise
            # A full disk is an error of a write, which knows no path.
            raise AdapterError(
                f"out={str(out)!r}: cannot be written ({error.strerror or error}); nothing is left of it"
            ) from error


def require_free(out: str | Path) -> None:
    """Raise an AdapterError unless `out` is an empty folder or does not exist, and can be written."""
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise AdapterError(f"out={str(out)!r}: must be a folder that is empty or does not exist")
    require_writable(out)


def require_writable(folder: Path, argument: str = "out") -> None:
    """Raise an AdapterError unless files can be written into a folder, or into its closest parent that exists.

    It is called before long work whose result goes there.
    """
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise AdapterError(f"{argument}={str(folder)!r}: cannot be written ({error.strerror or error})") from error
