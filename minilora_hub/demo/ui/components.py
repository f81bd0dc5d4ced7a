"""Components made of ``static/<name>.html`` and ``<name>.js``, and the page's style sheets and scripts.

Text of visitors and models is passed to a component as its value, and its script inserts it as text, never as HTML.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

STATIC = Path(__file__).resolve().parents[1] / "static"
STYLES = ("page", "columns", "analysis", "panels")
SCRIPTS = (
    "comparison_model",
    "column",
    "tabs",
    "timeline",
    "heatmap",
    "inspector",
    "tuner",
    "picture",
    "comparison",
    "number_fields",
)
"""The scripts that render a comparison; each uses only those before it."""

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Arguments of every event: no progress overlay, and no public endpoint or MCP tool."""


def component(name: str, **arguments: Any) -> gr.HTML:
    """Build a component; `arguments` are those of `gr.HTML`."""
    return gr.HTML(
        html_template=read(f"{name}.html"), js_on_load=read(f"{name}.js"), apply_default_css=False, **arguments
    )


def read(name: str) -> str:
    """Read a file of ``demo/static/``."""
    return (STATIC / name).read_text(encoding="utf-8")


def page_head() -> str:
    """Return the style sheets and the scripts, whose only global name is ``window.minilora``.

    The style sheets are not passed as `launch(css=)`, which rewrites selectors so that they override media queries.
    """
    styles = "\n".join(read(f"{name}.css") for name in STYLES)
    scripts = "\n".join(read(f"{name}.js") for name in (*SCRIPTS, "number_fields", "api_view"))
    return f"<style>{styles}</style><script>(() => {{\n{scripts}\n}})();\n</script>"


def sent(event: gr.EventData) -> dict[str, Any]:
    """Return the data that a component's script sent with an event."""
    return event._data or {}
