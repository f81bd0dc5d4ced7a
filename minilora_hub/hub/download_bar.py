"""One bar for a download from the Hub, in place of the three that its client draws."""

from __future__ import annotations

import sys
from typing import Any

FORMAT = "{desc}: {percentage:3.0f}% of {total_fmt}B, {elapsed}"


def download_bar(what: str, shown: bool) -> type[Any]:
    """Return the class that `snapshot_download` draws its bars with, as its `tqdm_class`.

    The bar is drawn on a terminal or in a notebook, and removed when the download is complete.

    Args:
        what: what is fetched.
        shown: whether there is a bar at all.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    visible = shown and (sys.stderr.isatty() or "ipykernel" in sys.modules)

    class DownloadBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Of the client's three bars, the one that counts bytes as they reach the disk.
            of_bytes = str(kwargs.get("desc", "")).startswith("Reconstructing")
            ours = {"desc": f"Fetching {what}", "bar_format": FORMAT, "leave": False}
            super().__init__(*args, **(kwargs | ours | {"disable": not (visible and of_bytes)}))

        def refresh(self, *args: Any, **kwargs: Any) -> bool:
            """Draw the bar, as soon as it is known how much there is to fetch."""
            return bool(self.total and super().refresh(*args, **kwargs))

        def set_description(self, *args: Any, **kwargs: Any) -> None:
            """Remove the bar: the client calls this when everything is there."""
            self.close()

        set_description_str = set_description

    return DownloadBar
