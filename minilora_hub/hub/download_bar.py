"""Draw one progress bar for a download from the Hub, instead of the three of its client."""

from __future__ import annotations

import sys
from typing import Any

FORMAT = "{desc}: {percentage:3.0f}% of {total_fmt}B, {elapsed}"


def download_bar(what: str, shown: bool) -> type[Any]:
    """Return the class that `snapshot_download` draws its bars with, as its `tqdm_class`.

    The bar is shown on a terminal or in a notebook, and removed when the download is complete.

    Args:
        what: what is fetched.
        shown: whether there is a bar at all.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    visible = shown and (sys.stderr.isatty() or "ipykernel" in sys.modules)

    class DownloadBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The one of the client's three bars that counts bytes written to the disk.
            of_bytes = str(kwargs.get("desc", "")).startswith("Reconstructing")
            ours = {"desc": f"Fetching {what}", "bar_format": FORMAT, "leave": False}
            super().__init__(*args, **(kwargs | ours | {"disable": not (visible and of_bytes)}))

        def refresh(self, *args: Any, **kwargs: Any) -> bool:
            """Draw the bar as soon as the size of the download is known."""
            return bool(self.total and super().refresh(*args, **kwargs))

        def set_description(self, *args: Any, **kwargs: Any) -> None:
            """Remove the bar: the client calls this when the download is complete."""
            self.close()

        set_description_str = set_description

    return DownloadBar
