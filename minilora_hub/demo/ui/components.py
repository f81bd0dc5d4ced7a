"""Components out of ``<name>.html`` and ``<name>.js``: what a visitor or a model wrote reaches them as text only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

STATIC = Path(__file__).resolve().parents[1] / "static"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of every event: no spinner over the page, and no endpoint or MCP tool of its own."""


def component(name: str, **arguments) -> gr.HTML:
    """Build a component whose values its script paints; see `gr.HTML` for the arguments."""
    return gr.HTML(
        html_template=read(f"{name}.html"), js_on_load=read(f"{name}.js"), apply_default_css=False, **arguments
    )


def read(name: str) -> str:
    """Read a file of ``demo/static/``."""
    return (STATIC / name).read_text(encoding="utf-8")


SCRIPTS = ("model", "column", "tabs", "timeline", "heatmap", "inspector", "picture", "stage_view")
"""What draws the comparison, in an order in which each uses only those before it."""


STYLES = ("page", "columns", "panels", "extras")


def page_style() -> str:
    """Join the page's style sheets; not for `launch(css=)`, which rewrites selectors, so that media queries lose."""
    return "\n".join(read(f"{name}.css") for name in STYLES)


def page_script() -> str:
    """Join these scripts into one, whose names stay inside it but for ``window.minilora``."""
    return "(() => {\n" + "\n".join(read(f"{name}.js") for name in SCRIPTS) + "\n})();\n"
