"""What stands around the comparison: voting, the Board page, history, export, links, batches, the adapter picker."""

from __future__ import annotations

import gradio as gr

from minilora_hub.demo.layout import Parts
from minilora_hub.demo.live import LiveRuns


def build_extras(demo: gr.Blocks, runs: LiveRuns, parts: Parts) -> None:
    """Build them below the columns, inside the open page; `parts.finished.change` tells that a comparison has ended.

    Args:
        demo: the page.
        runs: runs comparisons.
        parts: what is there already, and wired.
    """
