"""Components made of ``static/<name>.html`` and ``<name>.js``, and the page's style sheets and scripts.

What a visitor or a model wrote reaches a component as its value, which its script shows as text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

STATIC = Path(__file__).resolve().parents[1] / "static"
STYLES = ("page", "columns", "analysis", "panels")
SCRIPTS = ("comparison_model", "column", "tabs", "timeline", "heatmap", "inspector", "picture", "comparison")
"""What draws a comparison; each script uses only those before it."""

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Arguments of every event: no spinner over the page, and no endpoint or MCP tool of its own."""


def component(name: str, **arguments: Any) -> gr.HTML:
    """Build a component; `arguments` are those of `gr.HTML`."""
    return gr.HTML(
        html_template=read(f"{name}.html"), js_on_load=read(f"{name}.js"), apply_default_css=False, **arguments
    )


def read(name: str) -> str:
    """Read a file of ``demo/static/``."""
    return (STATIC / name).read_text(encoding="utf-8")


def page_head() -> str:
    """Return the style sheets and the scripts, whose names stay inside but for ``window.minilora``.

    The style sheets are not passed as `launch(css=)`, which rewrites selectors so that media queries lose.
    """
    styles = "\n".join(read(f"{name}.css") for name in STYLES)
    scripts = "\n".join(read(f"{name}.js") for name in SCRIPTS)
    return f"<style>{styles}</style><script>(() => {{\n{scripts}\n}})();\n</script>"


def sent(event: gr.EventData) -> dict[str, Any]:
    """Return what a component's script sent with an event."""
    return event._data or {}
