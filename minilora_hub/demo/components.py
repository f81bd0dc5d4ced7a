"""Components out of ``<name>.html`` and ``<name>.js``: what a visitor or a model wrote reaches them as text only."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

HERE = Path(__file__).parent


def component(name: str, **arguments) -> gr.HTML:
    """Build a component whose values its script paints; see `gr.HTML` for the arguments."""
    return gr.HTML(
        html_template=read(f"{name}.html"), js_on_load=read(f"{name}.js"), apply_default_css=False, **arguments
    )


def read(name: str) -> str:
    """Read a file of this folder."""
    return (HERE / name).read_text(encoding="utf-8")
